"""Runs a doer on a partition: in order per key, parallel across keys.

Every record is begun as soon as those of its key before it are finished, so that its handler hears whatever there is
to be heard while it waits; how many of them may do what costs something is the handler's to decide.

What is committed is the contiguous prefix of finished records, so out-of-order completion loses nothing: a crash or
a release repeats what had begun and not ended. A record that cannot be used is raised as `DeadLetter` and done with;
any other exception of the handler is the owner's end, and the next `take` or `checkpoint` raises it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from klatch_schemas.records import Record
from klatch_schemas.topics import Namespace
from klatch_streams.dead_letters import DeadLetter, bury, dead_letter
from klatch_streams.log import Log, RecordTooLarge

logger: Final = structlog.stdlib.get_logger()

Handle = Callable[[Record], Awaitable[None]]


class GivenBack(Exception):
    """Raised by a handler whose owner is being released before it could begin: its record stays uncommitted."""


def record_key(record: Record) -> Hashable:
    """Order by the record's own key."""
    return record.key


async def nothing(_: int) -> None:
    """No snapshot to write."""


@dataclass(frozen=True, slots=True)
class Doing:
    """What an owner does with a record, and how."""

    stage: str
    handle: Handle
    max_bytes: int = 64 * 1024 * 1024
    """Of the values of records taken and not finished; one record may go over it."""
    max_ahead: int = 10_000
    """Records taken from the oldest unfinished one on: at most so many are under way, or are repeated after a crash."""
    order_by: Callable[[Record], Hashable] = record_key
    """Records of which this is equal are handled one after another, in the order in which they were taken."""
    before_commit: Callable[[int], Awaitable[None]] = nothing
    """Awaited by every checkpoint with the offset about to be committed."""


class KeyedOwner:
    """A doer's work on one partition."""

    def __init__(self, doing: Doing, log: Log, namespace: Namespace, committed: int) -> None:
        self._doing = doing
        self._log = log
        self._namespace = namespace
        self._next = committed
        self._bytes = 0
        """Of the values of records taken and not finished."""
        self._open = deque[int]()
        self._done = set[int]()
        self._lines = dict[Hashable, deque[Record]]()
        self._tasks = set[asyncio.Task[None]]()
        self._failure: BaseException | None = None
        self._releasing = False
        self._moved = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Records taken and not finished."""
        return len(self._open) - len(self._done)

    @property
    def low_water(self) -> int:
        """Everything before this offset is finished."""
        return self._open[0] if self._open else self._next

    async def take(self, records: Sequence[Record]) -> None:
        """Put records in line, waiting for room; ends early on release. Raises what a handler failed with."""
        for record in records:
            await self._until(self._has_room)
            if self._releasing:
                return
            self._accept(record)
        self._raise_failure()

    async def checkpoint(self) -> int:
        """The low-water mark, once `before_commit` has seen it. Raises what a handler failed with."""
        self._raise_failure()
        low_water = self.low_water
        await self._doing.before_commit(low_water)
        return low_water

    async def release(self, drain_s: float) -> None:
        """Let work in flight finish within `drain_s`, and cancel the rest: its records stay uncommitted."""
        self._releasing = True
        self._moved.set()
        if drain_s > 0 and self._tasks:
            await asyncio.wait(self._tasks, timeout=drain_s)
        if left := self._tasks:
            logger.info("doer.cancelled", stage=self._doing.stage, in_flight=self.in_flight, low_water=self.low_water)
            for task in left:
                task.cancel()
            await asyncio.wait(left)

    def _has_room(self) -> bool:
        doing = self._doing
        return self._bytes < doing.max_bytes and len(self._open) < doing.max_ahead

    async def _until(self, ready: Callable[[], bool]) -> None:
        while True:
            self._raise_failure()
            if self._releasing or ready():
                return
            self._moved.clear()
            await self._moved.wait()

    def _accept(self, record: Record) -> None:
        self._open.append(record.offset)
        self._bytes += len(record.value or b"")
        self._next = record.offset + 1
        key = self._doing.order_by(record)
        if line := self._lines.get(key):
            line.append(record)
            return
        line = self._lines[key] = deque([record])
        task = asyncio.create_task(self._work(key, line), name=f"{self._doing.stage} {record.partition.number}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _work(self, key: Hashable, line: deque[Record]) -> None:
        while line and not self._releasing:
            try:
                await self._handle(line[0])
            except GivenBack:
                if not self._releasing:
                    raise
                break
            done = line.popleft()
            if not line:
                # First: finishing may let in the key's next record, which then begins a line of its own.
                del self._lines[key]
            self._finish(done)

    async def _handle(self, record: Record) -> None:
        try:
            await self._doing.handle(record)
        except DeadLetter as why:
            await self._set_aside(record, why)
        except RecordTooLarge as error:
            # It would be too large for the next owner too.
            await self._set_aside(record, DeadLetter("too-large", str(error)))

    async def _set_aside(self, record: Record, why: DeadLetter) -> None:
        await bury(self._log, [dead_letter(record, self._namespace, self._doing.stage, why)])

    def _finish(self, record: Record) -> None:
        self._done.add(record.offset)
        self._bytes -= len(record.value or b"")
        while self._open and self._open[0] in self._done:
            self._done.remove(self._open.popleft())
        self._moved.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        failure: BaseException | None = None
        if not task.cancelled():
            failure = task.exception()
        elif not self._releasing:
            failure = RuntimeError("a handler was cancelled, and not by its owner's release")
        self._failure = self._failure or failure
        self._moved.set()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure
