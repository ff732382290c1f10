"""Follows partitions of the log for several owners with one `Tail`: what each owner folds beside its own input.

`follow` returns when the partition has been read to the end it had when asked, so that an owner can be complete
before it is fed. A handler is called for every record, in order, and must not block; if it raises, the follower
stops and every owner that waits on it fails.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from klatch_schemas.records import Partition, Record
from klatch_streams.log import Log, Tail

Handler = Callable[[Record], None]
Moved = Callable[[int], None]


def _nobody(_: int) -> None:
    """Nobody asks how far the reading is."""


@dataclass(slots=True)
class _Followed:
    handler: Handler
    moved: Moved
    position: int
    target: int
    caught_up: "asyncio.Future[None]" = field(default_factory=asyncio.Future[None])

    def moved_to(self, position: int) -> None:
        self.position = position
        self.moved(position)
        if position >= self.target and not self.caught_up.done():
            self.caught_up.set_result(None)


class Follower:
    """One reader of many partitions."""

    def __init__(self, log: Log, wait_ms: int = 1000) -> None:
        self._log = log
        self._wait_ms = wait_ms
        self._tail: Tail | None = None
        self._followed: dict[Partition, _Followed] = {}
        self._running: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def follow(self, partition: Partition, offset: int, handler: Handler, moved: Moved = _nobody) -> None:
        """Give `handler` the records from `offset` on; returns when it had all that stood when asked.

        `moved` is told the next offset whenever it changes: beyond markers of transactions, too, which are no records.
        An offset that retention has overtaken means the first one that is left. Raises LogError.
        """
        first, end = await self._log.bounds(partition)
        start = max(first, offset)
        tail = await self._started()
        followed = _Followed(handler, moved, start, end)
        self._followed[partition] = followed
        tail.follow(partition, start)
        followed.moved_to(start)
        await self._or_failure(followed.caught_up)

    def unfollow(self, partition: Partition) -> None:
        """Call the partition's handler no more."""
        if self._followed.pop(partition, None) and self._tail:
            self._tail.unfollow(partition)

    def position(self, partition: Partition) -> int:
        """The next offset to be read."""
        return self._followed[partition].position

    async def failure(self) -> None:
        """Wait for ever, or until following fails; then raise why."""
        await self._started()
        assert self._running  # noqa: S101 - made by _started
        await asyncio.shield(self._running)

    async def close(self) -> None:
        """Stop following."""
        if self._running:
            self._running.cancel()
            await asyncio.wait([self._running])
        if self._tail:
            await self._tail.close()

    async def _started(self) -> Tail:
        async with self._starting:
            if self._tail is None:
                self._tail = await self._log.tail()
                self._running = asyncio.create_task(self._run(self._tail), name="follower")
        return self._tail

    async def _or_failure(self, awaited: "asyncio.Future[None]") -> None:
        assert self._running  # noqa: S101 - follow has started it
        await asyncio.wait([awaited, self._running], return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done():
            await self._running
        await awaited

    async def _run(self, tail: Tail) -> None:
        while True:
            for record in await tail.read(self._wait_ms):
                followed = self._followed.get(record.partition)
                if followed and record.offset >= followed.position:
                    followed.handler(record)
                    followed.moved_to(record.offset + 1)
            for partition, followed in self._followed.items():
                if (position := tail.position(partition) or 0) > followed.position:
                    followed.moved_to(position)
