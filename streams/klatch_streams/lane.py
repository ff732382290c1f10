"""One assigned partition inside a runner: restored first, then fed from a bounded queue.

The reader puts records in without waiting; when the queue is full the partition is paused, and read again when half
of it is drained. Nothing is fed before the stage's `own` has returned, whatever the log hands out meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from klatch_schemas.records import Partition, Record
from klatch_streams.log import Log, Membership, OffsetGone
from klatch_streams.owner import Owner, Stage

logger: Final = structlog.stdlib.get_logger()


@dataclass(frozen=True, slots=True)
class Room:
    """How much a lane holds and takes."""

    queue: int = 2_000
    """Records; one read may go over it."""
    queue_bytes: int = 16 * 1024 * 1024
    """Likewise, of their values: bodies with pictures are megabytes each."""
    batch: int = 500
    """The most records of one `take`."""


class Lane:
    """The way of one partition's records to their owner."""

    def __init__(self, partition: Partition, room: Room) -> None:
        self.partition = partition
        self.owner: Owner | None = None
        """None while it is being restored."""
        self.position = 0
        """The next offset to be taken."""
        self.committed: int | None = None
        self.task: asyncio.Task[None] | None = None
        self._room = room
        self._queue = deque[Record]()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._paused = True
        self._closed = False

    @property
    def queued(self) -> int:
        """Records read and not taken."""
        return len(self._queue)

    def offer(self, records: Sequence[Record], membership: Membership) -> None:
        """Queue what was read, and pause the partition when that is enough. Never waits."""
        if self._closed or self.owner is None:
            # Restoring: the lane seeks back to where it starts when it is ready.
            return
        self._queue.extend(records)
        self._bytes += sum(len(record.value or b"") for record in records)
        self._filled.set()
        if not self._paused and self._is_filled(1):
            self._paused = True
            membership.pause(self.partition)

    async def restore(self, stage: Stage, log: Log, membership: Membership) -> None:
        """Let the stage restore what it needs, then let records come. Raises what the stage raises."""
        start = await self._start(log, membership)
        self.owner = await stage.own(self.partition, start)
        membership.seek(self.partition, start)
        self._paused = False
        membership.resume(self.partition)

    async def feed(self, membership: Membership) -> None:
        """Hand queued records to the owner, batch by batch, until `close`. Raises what the owner raises."""
        assert self.owner  # noqa: S101 - `restore` has returned
        while not self._closed:
            await self._filled.wait()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._room.batch))]
            self._bytes -= sum(len(record.value or b"") for record in batch)
            if not self._queue:
                self._filled.clear()
            if batch:
                await self.owner.take(batch)
                self.position = batch[-1].offset + 1
            if self._paused and not self._closed and not self._is_filled(0.5):
                self._paused = False
                membership.resume(self.partition)

    def close(self) -> None:
        """Take nothing more; what is queued is dropped, and read again by the next owner."""
        self._closed = True
        self._queue.clear()
        self._bytes = 0
        self._filled.set()

    def _is_filled(self, share: float) -> bool:
        room = self._room
        # Half full is not full: a queue of so many records, or bytes, is refilled from there on.
        return len(self._queue) >= max(1, room.queue * share) or self._bytes >= room.queue_bytes * share

    async def _start(self, log: Log, membership: Membership) -> int:
        committed = await membership.committed(self.partition)
        first, end = await log.bounds(self.partition)
        start = first if committed is None else committed
        if start > end:
            raise OffsetGone(self.partition, start, first, end)
        if start < first:
            logger.error(
                "partition.records_expired",
                topic=self.partition.topic,
                partition=self.partition.number,
                committed=start,
                first=first,
            )
            start = first
        self.position = start
        self.committed = committed
        return start
