"""Readers of the log while the run goes on: one fold a request, as any Kafka client makes it, from before it is asked.

One connection follows all partitions for all readers. When the log is away it is opened again where it was left, so
that no reader misses a record.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf

from klatch_schemas.assembly import Ended, ReplyReader, Said, Standing
from klatch_schemas.client import Stream
from klatch_schemas.errors import StreamBroken, Superseded
from klatch_schemas.events import ChatRequested, StreamEnd, UsageSettled
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Partition, Record, partition_of
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, Namespace
from klatch_streams.log import Log, LogError
from klatch_workers.torture.evidence import Observation
from klatch_workers.torture.system import Read, by_contract
from klatch_workers.torture.told import outcome_told, text_of

_AGAIN_S = 0.5


@dataclass(slots=True)
class LiveReader:
    """One reader of one stream."""

    request: RequestId
    chunks: int = 0
    """How many it was shown since it last began."""
    outcomes: list[str] = field(default_factory=list[str])
    ended_ms: float = inf
    """When it was first told of an end."""
    published_ms: int = 0
    """When its request was written; 0: the log does not hold it."""
    refused: bool = False
    settled: bool = False
    raced: bool = False
    """Whether a cancel came before an end that meant another outcome: who comes late must not hear of that."""
    bare: bool = False
    """Whether no bill is to come."""
    _reply: ReplyReader = field(default_factory=ReplyReader)
    _heard: list[tuple[int, Said]] = field(default_factory=list[tuple[int, Said]])
    _shown: list[Standing] = field(default_factory=list[Standing])
    _voided: list[str] = field(default_factory=list[str])
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        # It is there before the first record: whatever comes is shown as it comes.
        self._reply.go_live()

    @property
    def published(self) -> bool:
        """Whether the log holds its request."""
        return self.published_ms > 0

    @property
    def over(self) -> bool:
        """Whether it was told of an end."""
        return bool(self.outcomes)

    @property
    def opened(self) -> bool:
        """Whether somebody has begun to answer."""
        return self._reply.state.attempt > 0

    @property
    def concluded(self) -> bool:
        """Whether nothing more is to come: the end, and the bill."""
        return self.over and (self.settled or self.refused or self.bare)

    def hear(self, offset: int, said: Said) -> None:
        """Take a record of the stream."""
        self._heard.append((offset, said))
        self.raced = self.raced or (
            isinstance(said, StreamEnd) and said.status != "cancelled" and self.outcomes[:1] == ["cancelled"]
        )
        self.refused = self.refused or (
            isinstance(said, StreamEnd) and said.attempt == 0 and said.writer == "admission"
        )
        try:
            self._show(self._reply.hear(offset, said))
        except Superseded:
            self._begin_anew()
        except StreamBroken:
            self.outcomes.append("broken")
        self._news.set()

    def hear_request(self, timestamp_ms: int, said: Said) -> None:
        """Take a record of `chat.requests`."""
        if isinstance(said, ChatRequested):
            self.published_ms = self.published_ms or timestamp_ms
        self.settled = self.settled or isinstance(said, UsageSettled)
        self._news.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until `true()`, which is asked again after every record."""
        while not true():
            self._news.clear()
            await self._news.wait()

    def observation(self) -> Observation:
        """What it was shown."""
        outcome = self.outcomes[-1] if self.outcomes else None
        voided, outcomes = tuple(self._voided), tuple(self.outcomes)
        text = text_of(self._shown)
        return Observation("live", self.request, text, outcome, voided, outcomes, until_ms=self.ended_ms)

    def _show(self, heard: Standing | Ended | None) -> None:
        match heard:
            case Standing():
                self._shown.append(heard)
                self.chunks += 1
            case Ended():
                self.ended_ms = min(self.ended_ms, time.time() * 1000)
                self.outcomes.append(outcome_told(heard))
            case None:
                pass

    def _begin_anew(self) -> None:
        """Do what the contract says: what was shown is void, read again from the start."""
        self._voided.append(text_of(self._shown))
        self._shown, self._reply, self.chunks = [], ReplyReader(), 0
        for offset, said in self._heard:
            self._reply.hear(offset, said)
        for shown in self._reply.go_live():
            self._show(shown)


class LiveLog:
    """Follows `chat.stream` and `chat.requests` for all readers."""

    def __init__(self, log: Log, namespace: Namespace, read: Read = by_contract, *, bare: bool = False) -> None:
        self._log, self._read_stream, self._bare = log, read, bare
        self._stream, self._requests = namespace.of(CHAT_STREAM), namespace.of(CHAT_REQUESTS)
        self._readers = dict[str, LiveReader]()
        self._positions = dict[Partition, int]()
        self._streams = 0

    def reader(self, request: RequestId) -> LiveReader:
        """The reader of a request's stream, there from now on."""
        return self._readers.setdefault(request, LiveReader(request, bare=self._bare))

    def place(self, tenant: Tenant, request: RequestId, conversation: Conversation) -> Stream:
        """Where the stream of a request stands that nobody has asked yet."""
        number = partition_of(conversation.encode(), self._streams)
        start = self._positions[Partition(self._stream, number)]
        return Stream(tenant, request, conversation, number, start)

    async def locate(self) -> None:
        """Take the place from which all is read. Raises LogError."""
        self._streams = await self._log.partitions(self._stream)
        for topic in (self._stream, self._requests):
            for number in range(await self._log.partitions(topic)):
                partition = Partition(topic, number)
                self._positions[partition] = (await self._log.bounds(partition))[1]

    async def follow(self) -> None:
        """Read until cancelled."""
        while True:
            with suppress(LogError):
                await self._read()
            await asyncio.sleep(_AGAIN_S)

    async def _read(self) -> None:
        tail = await self._log.tail()
        try:
            for partition, offset in self._positions.items():
                tail.follow(partition, offset)
            while True:
                for record in await tail.read(1000):
                    if record.offset >= self._positions[record.partition]:
                        self._positions[record.partition] = record.offset + 1
                        self._hear(record)
        finally:
            await tail.close()

    def _hear(self, record: Record) -> None:
        of_stream = record.partition.topic == self._stream
        for said in (self._read_stream if of_stream else by_contract)(record):
            reader = self._readers.get(str(getattr(said, "request", "")))
            if reader and of_stream:
                reader.hear(record.offset, said)
            elif reader:
                reader.hear_request(record.timestamp_ms, said)
