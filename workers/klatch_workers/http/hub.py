"""The one reader of `chat.stream` in a door process: follows a partition while somebody waits for a stream in it.

A record costs one decode, one lookup and one append, and a batch wakes each of its readers once, because wake-ups
are what tokens cost. A partition without readers is followed for a while longer, so that the next request in it
needs no new fetch session. The hub outlives errors of the log; its readers then continue where they were. After
a fault of ours they are told, and read on by a new request.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from klatch_schemas.errors import KlatchError, LogMoved, Unavailable
from klatch_schemas.records import Partition, Record
from klatch_streams.dead_letters import describe
from klatch_streams.log import Log, LogError, OffsetGone, Tail
from klatch_workers.http.door import Terms
from klatch_workers.http.reader import Reader, Stream, said_in

log = structlog.get_logger("klatch.http.hub")

_READ_MS = 1_000
_RETRY_S = 0.5


@dataclass(slots=True)
class Channel:
    """A followed partition: the next offset to be read, and who waits, by request id."""

    position: int
    readers: dict[str, list[Reader]] = field(default_factory=dict[str, list[Reader]])
    idle_since: float = 0.0


class Hub:
    """Registers readers and brings them their records. `start` before use, `close` after."""

    def __init__(self, log: Log, terms: Terms) -> None:
        self.log = log
        self._terms = terms
        self._channels: dict[Partition, Channel] = {}
        self._open: set[Reader] = set()
        self._tail: Tail | None = None
        self._needed = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to read."""
        self._running = asyncio.create_task(self._run(), name="http-hub")

    async def close(self) -> None:
        """Stop reading."""
        if self._running:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running
        if self._tail:
            await self._tail.close()

    async def open(self, stream: Stream, partition: Partition, start: int | None = None) -> Reader:
        """A reader from `start`, or from the next record on: its place is known when this returns. Raises LogError."""
        reader = Reader(self, stream, partition, self._terms.buffer_bytes)
        await reader.join(start)
        self._open.add(reader)
        return reader

    @property
    def followed(self) -> list[Partition]:
        """The partitions that cost a fetch."""
        return list(self._channels)

    def position(self, partition: Partition) -> int:
        """Up to where a partition that somebody waits in was read."""
        channel, tail = self._channels.get(partition), self._tail
        # The tail gets past markers of transactions, which are no records.
        return max(channel.position if channel else 0, (tail.position(partition) if tail else None) or 0)

    async def register(self, reader: Reader) -> int:
        """See `Registry.register`. Raises LogError."""
        if reader.partition not in self._channels:
            _, end = await self.log.bounds(reader.partition)
            self._follow(reader.partition, end)
        channel = self._channels[reader.partition]
        channel.readers.setdefault(reader.stream.request, []).append(reader)
        return channel.position

    def leave(self, reader: Reader) -> None:
        """See `Registry.leave`."""
        channel = self._channels.get(reader.partition)
        readers = channel.readers.get(reader.stream.request, []) if channel else []
        if channel and reader in readers:
            readers.remove(reader)
            if not readers:
                del channel.readers[reader.stream.request]
            channel.idle_since = asyncio.get_running_loop().time()

    def closed(self, reader: Reader) -> None:
        """See `Registry.closed`."""
        self.leave(reader)
        self._open.discard(reader)

    def tick(self, now: float) -> None:
        """Give up the partitions that nobody has waited for in a while."""
        for partition, channel in list(self._channels.items()):
            if not channel.readers and now - channel.idle_since > self._terms.linger_s:
                self._unfollow(partition)

    def _follow(self, partition: Partition, position: int) -> None:
        # Another reader may have come first while this one asked for the end.
        if partition not in self._channels:
            self._channels[partition] = Channel(position)
            if self._tail:
                self._tail.follow(partition, position)
            self._needed.set()

    def _unfollow(self, partition: Partition) -> None:
        del self._channels[partition]
        if self._tail:
            self._tail.unfollow(partition)

    async def _run(self) -> None:
        while True:
            if not self._channels:
                self._needed.clear()
                await self._needed.wait()
            try:
                await self._read()
            except OffsetGone as gone:
                self._lose(gone)
            except LogError as error:
                log.warning("hub.log_failed", error=str(error))
                await self._reopen()
            except Exception as error:  # noqa: BLE001 - the boundary: a hub that ended would leave its readers waiting
                # It may have been in the middle of what they were to hear: they read again from where they are.
                log.error("hub.failed", fault=describe(error))  # noqa: TRY400 - never message text
                self.fail_all(Unavailable("the door failed while it read this stream: read on after the last event"))
                await self._reopen()

    async def _read(self) -> None:
        if self._tail is None:
            self._tail = await self.log.tail()
            for partition, channel in self._channels.items():
                self._tail.follow(partition, channel.position)
        self._dispatch(await self._tail.read(_READ_MS))

    async def _reopen(self) -> None:
        # Channels keep their positions: after a new start no reader has missed anything.
        tail, self._tail = self._tail, None
        if tail:
            with suppress(LogError):
                await tail.close()
        await asyncio.sleep(_RETRY_S)

    def _lose(self, gone: OffsetGone) -> None:
        log.warning("hub.offset_gone", partition=gone.partition.number, offset=gone.offset, first=gone.first)
        channel = self._channels.get(gone.partition)
        if channel is None:
            return
        self._unfollow(gone.partition)
        for readers in channel.readers.values():
            for reader in readers:
                reader.fail(LogMoved("the log was cut off before this stream was read to its end"))

    def fail_all(self, error: KlatchError) -> None:
        """End every reading with `error`, after what has arrived."""
        for reader in self._open:
            reader.fail(error)

    def _dispatch(self, records: Sequence[Record]) -> None:
        touched: dict[Reader, None] = {}
        partition: Partition | None = None
        channel: Channel | None = None
        for record in records:
            if record.partition is not partition:
                partition = record.partition
                channel = self._channels.get(partition)
            if channel is None:
                continue
            channel.position = record.offset + 1
            if not channel.readers or (said := said_in(record)) is None:
                continue
            for reader in tuple(channel.readers.get(said.request, ())):
                touched[reader] = None
                if not reader.offer(record.offset, said, len(record.value or b"")):
                    log.info("reader.left_behind", request=said.request, offset=record.offset)
                    self.leave(reader)
        for reader in touched:
            reader.wake()
