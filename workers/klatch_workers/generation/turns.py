"""A conversation's past, read from the log: every finished turn names the offset of the one before it.

Only the last turn's offset is kept in memory and in snapshots, a few dozen bytes a conversation; the turns
themselves are read when they are needed, and the latest read stay cached, within bounds. So a conversation goes on
after every process was restarted, and costs next to nothing while nobody speaks.
"""

import asyncio
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import structlog

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, TurnFinished
from klatch_schemas.records import Partition, Record
from klatch_streams.log import Log, LogError, OffsetGone, Tail
from klatch_workers.generation.heads import Head, Heads

log = structlog.get_logger("klatch.generation.turns")

CACHED = 2_000
"""How many turns a process has at hand."""
CACHED_BYTES = 32 * 1024 * 1024
"""And how large they are together, as records; a single one may be as large as a record."""
SILENT_S = 10
"""How long a read waits for a turn that should stand in the log."""


class _Cached(NamedTuple):
    turn: TurnFinished
    size: int


class TurnReader:
    """Reads single turns at known offsets; one reader a process."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._reading = defaultdict[Partition, asyncio.Lock](asyncio.Lock)
        """One at a time reads a partition: what waits for one that does not answer keeps nobody from the others."""
        self._tails, self._idle = list[Tail](), list[Tail]()
        self._cache: OrderedDict[tuple[Partition, int], _Cached] = OrderedDict()
        self.cached_bytes = 0
        """The size of what is at hand, as records."""

    def keep(self, partition: Partition, offset: int, turn: TurnFinished, size: int) -> None:
        """Have a turn at hand, whose record is of that size, instead of those that were used longest ago."""
        if before := self._cache.pop((partition, offset), None):
            self.cached_bytes -= before.size
        self._cache[partition, offset] = _Cached(turn, size)
        self.cached_bytes += size
        while len(self._cache) > CACHED or self.cached_bytes > CACHED_BYTES:
            self.cached_bytes -= self._cache.popitem(last=False)[1].size

    async def read(self, partition: Partition, offset: int) -> TurnFinished:
        """The turn at `offset`. Raises OffsetGone once the log does not hold it, LogError, Unreadable."""
        if cached := self._at_hand(partition, offset):
            return cached
        async with self._reading[partition]:
            return self._at_hand(partition, offset) or await self._fetch(partition, offset)

    def _at_hand(self, partition: Partition, offset: int) -> TurnFinished | None:
        cached = self._cache.get((partition, offset))
        if cached is None:
            return None
        self._cache.move_to_end((partition, offset))
        return cached.turn

    async def _fetch(self, partition: Partition, offset: int) -> TurnFinished:
        tail = self._idle.pop() if self._idle else await self._open()
        tail.follow(partition, offset)
        try:
            record = await self._first(tail, partition, offset)
        finally:
            tail.unfollow(partition)
            self._idle.append(tail)
        turn = codec.decode_as(TurnFinished, record.value)
        self.keep(partition, offset, turn, len(record.value or b""))
        return turn

    async def _open(self) -> Tail:
        tail = await self._log.tail()
        self._tails.append(tail)
        return tail

    async def _first(self, tail: Tail, partition: Partition, offset: int) -> Record:
        for _ in range(SILENT_S):
            if records := await tail.read(1000):
                return records[0]
        first, end = await self._log.bounds(partition)
        if offset >= end:
            # Its leader says so: the log has lost what it had acknowledged, and waiting brings it back no more.
            raise OffsetGone(partition, offset, first, end)
        raise LogError(f"{partition.topic}/{partition.number} fell silent at {offset}")

    async def close(self) -> None:
        """Give back connections."""
        for tail in self._tails:
            await tail.close()


class Conversations:
    """The conversations of one partition of `chat.turns`."""

    def __init__(self, partition: Partition, reader: TurnReader) -> None:
        self._partition = partition
        self._reader = reader
        self.heads = Heads()
        self.changed: dict[str, str] = {}
        """Keys of heads that no snapshot holds yet, and whose turns they are."""

    def head(self, tenant: str, conversation: str) -> Head | None:
        """The conversation's last turn."""
        return self.heads.get(conversation_key(tenant, conversation))

    async def recent(self, tenant: str, conversation: str, most: int) -> list[TurnFinished]:
        """The conversation's last turns, oldest first, at most `most`; those that the log has no more are left out.

        Raises LogError, Unreadable.
        """
        head = self.head(tenant, conversation)
        offset = head.offset if head else None
        turns: dict[str, TurnFinished] = {}
        while offset is not None and len(turns) < most:
            try:
                turn = await self._reader.read(self._partition, offset)
            except OffsetGone:
                break
            if (turn.tenant, turn.conversation) != (tenant, conversation):
                # A log that lost what it had acknowledged has given its place to another's, whose it is alone.
                log.error("turns.misplaced", partition=self._partition.number, offset=offset)
                break
            # A crash may have written one turn twice, the second following the first.
            turns.setdefault(turn.request, turn)
            offset = turn.previous
        return list(reversed(turns.values()))

    def append(self, request: ChatRequested, offset: int, turn: TurnFinished, size: int, applied: int) -> None:
        """The request's `turn` now stands at `offset`, in a record of that size, and is the conversation's last."""
        if request.stands_alone:
            # Nobody asks for it again.
            return
        key = conversation_key(turn.tenant, turn.conversation)
        self.heads.put(key, Head(offset, applied))
        self.changed[key] = turn.request
        self._reader.keep(self._partition, offset, turn, size)


def conversation_key(tenant: str, conversation: str) -> str:
    """One string for a tenant's conversation; a tenant's name holds no slash."""
    return f"{tenant}/{conversation}"
