"""Runs a stage as a member of its consumer group: hold-back, back-pressure, commits, drains.

The read loop never waits for a lane, so heartbeats and rebalances go on whatever the work does. A failure of any
lane, append, checkpoint or commit is fatal: the runner leaves without committing unfinished work and raises, and a
supervisor starts another. Losing the membership is such a failure: not even what is finished is committed then.
"""

import asyncio
from collections.abc import Awaitable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from klatch_schemas.records import Partition
from klatch_streams.lane import Lane, Room
from klatch_streams.log import Log, LogError, Membership
from klatch_streams.owner import Stage

T = TypeVar("T")
logger: Final = structlog.stdlib.get_logger()


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """How a runner paces itself."""

    commit_s: float = 0.5
    """Between two commits: what a crash repeats at most."""
    drain_s: float = 5.0
    """What a revoked partition or a stop leaves to work in flight; well under the group's patience."""
    room: Room = Room()
    read_wait_ms: int = 500


@dataclass(frozen=True, slots=True)
class PartitionHealth:
    """How far one partition is."""

    number: int
    restored: bool
    end: int
    """The next offset to be written by anyone."""
    position: int
    """The next offset to be taken by its owner."""
    committed: int | None
    queued: int

    @property
    def lag(self) -> int:
        """Records that are not known to be finished."""
        return self.end - (self.position if self.committed is None else self.committed)

    @property
    def in_flight(self) -> int:
        """Records taken and not committed."""
        return self.position - (self.position if self.committed is None else self.committed)


@dataclass(frozen=True, slots=True)
class RunnerHealth:
    """How a runner does."""

    stage: str
    ready: bool
    partitions: tuple[PartitionHealth, ...]


class Runner:
    """One member of a stage's consumer group. Runs once: make another to start over."""

    def __init__(self, log: Log, stage: Stage, group: str, settings: RunnerSettings | None = None) -> None:
        self.ready = asyncio.Event()
        """Set once the first assignment, be it empty, is restored."""
        self._log = log
        self._stage = stage
        self._group = group
        self._settings = settings or RunnerSettings()
        self._lanes = dict[Partition, Lane]()
        self._tasks = set[asyncio.Task[None]]()
        self._membership: Membership | None = None
        self._committing = asyncio.Lock()
        self._over = asyncio.Event()
        self._failure: BaseException | None = None
        self._facts = logger.bind(stage=stage.name, group=group)

    async def run(self) -> None:
        """Work until `stop`, then drain and return. Raises what failed; nothing of it goes on then."""
        self._membership = await self._log.join(self._group, self._stage.topic, self)
        try:
            self._start(self._read(self._membership), "read")
            self._start(self._commit_again_and_again(), "commit")
            await self._over.wait()
            if self._failure is None:
                await self._let_go(list(self._lanes))
        finally:
            await self._leave(self._membership)
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Make `run` drain and return."""
        self._over.set()

    async def health(self) -> RunnerHealth:
        """Where every partition stands; asks the log for their ends. Raises LogError."""
        lanes = sorted(self._lanes.values(), key=lambda lane: lane.partition.number)
        bounds = await asyncio.gather(*[self._log.bounds(lane.partition) for lane in lanes])
        partitions = [
            PartitionHealth(
                lane.partition.number, lane.owner is not None, end, lane.position, lane.committed, lane.queued
            )
            for lane, (_, end) in zip(lanes, bounds, strict=True)
        ]
        return RunnerHealth(self._stage.name, self.ready.is_set(), tuple(partitions))

    # The group's calls.

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        """See `Listener.assigned`. Returns before anything is restored, so that the group need not wait."""
        membership = self._membership
        if membership is None or self._over.is_set():
            return  # stopping: `close` gives them back
        self._facts.info("runner.assigned", partitions=[partition.number for partition in partitions])
        for partition in partitions:
            membership.pause(partition)
            lane = self._lanes[partition] = Lane(partition, self._settings.room)
            lane.task = self._start(self._work(lane, membership), f"partition {partition.number}")
        self._see_whether_ready()

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        """See `Listener.revoked`. What is finished is committed, unless the runner has failed."""
        self._facts.info("runner.revoked", partitions=[partition.number for partition in partitions])
        try:
            await self._let_go(partitions)
        except Exception as error:  # noqa: BLE001 - a boundary: the listener may not raise, the runner will
            self._fail(error)

    # The loops.

    async def _read(self, membership: Membership) -> None:
        while True:
            for partition, records in (await membership.read(self._settings.read_wait_ms)).items():
                if lane := self._lanes.get(partition):
                    lane.offer(records, membership)

    async def _work(self, lane: Lane, membership: Membership) -> None:
        await lane.restore(self._stage, self._log, membership)
        self._facts.info("runner.restored", partition=lane.partition.number, position=lane.position)
        self._see_whether_ready()
        await lane.feed(membership)

    async def _commit_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(self._settings.commit_s)
            async with self._committing:
                await self._checkpoint(list(self._lanes.values()))

    # The order of writes.

    async def _checkpoint(self, lanes: Sequence[Lane]) -> None:
        """Make finished work of `lanes` permanent.

        A crash between any two of these repeats work, and loses none:

        1. The effects are acknowledged: `Owner.take` does not count a record before they are.
        2. Each owner writes its state, and names the offset before which all is done.
        3. The offsets are committed.
        """
        owners = [(lane, lane.owner) for lane in lanes if lane.owner]
        # 2. Together, because a checkpoint costs a round trip to the log and partitions are many.
        offsets = await _all([owner.checkpoint() for _, owner in owners])
        # 3. Only what moved.
        moved = {
            lane: offset
            for (lane, _), offset in zip(owners, offsets, strict=True)
            if offset is not None and offset != lane.committed
        }
        if moved and self._membership and self._failure is None:
            await self._membership.commit({lane.partition: offset for lane, offset in moved.items()})
            for lane, offset in moved.items():
                lane.committed = offset

    async def _let_go(self, partitions: Sequence[Partition]) -> None:
        """Hand partitions over.

        1. Take nothing more.
        2. Let work in flight finish, up to the deadline.
        3. Checkpoint and commit what is finished.
        4. Forget them.
        """
        lanes = [self._lanes[partition] for partition in partitions if partition in self._lanes]
        try:
            # 1. One that is still being restored has nothing to finish.
            for lane in lanes:
                lane.close()
            await _end([lane.task for lane in lanes if lane.task and not lane.owner])
            # 2.
            if self._failure is None:
                await _all([lane.owner.release(self._settings.drain_s) for lane in lanes if lane.owner])
            await _end([lane.task for lane in lanes if lane.task])
            # 3. After a round that is on its way: an owner checkpoints once at a time.
            if self._failure is None:
                async with self._committing:
                    await self._checkpoint(lanes)
        finally:
            # 4.
            await self._forget(lanes)

    # Tasks and ends.

    def _start(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"{self._stage.name} {name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            self._facts.error("runner.failed", error=type(error).__name__)
        self._over.set()

    def _see_whether_ready(self) -> None:
        if all(lane.owner for lane in self._lanes.values()):
            self.ready.set()

    async def _leave(self, membership: Membership) -> None:
        self._over.set()
        if self._lanes:
            # Whoever comes here with partitions has failed or was cancelled: nothing more is committed.
            self._failure = self._failure or asyncio.CancelledError("the runner was cancelled")
        try:
            await _end(self._tasks)
        finally:
            # Also when whoever waits for us gives up in the middle: what an owner has begun would go on for ever.
            await self._forget(list(self._lanes.values()))
        try:
            await membership.close()
        except LogError as error:
            self._failure = self._failure or error

    async def _forget(self, lanes: Sequence[Lane]) -> None:
        try:
            await _end([lane.task for lane in lanes if lane.task])
        finally:
            # Nothing is left to drain, or something failed: that is what is raised, not what follows from it.
            await asyncio.gather(*[lane.owner.release(0) for lane in lanes if lane.owner], return_exceptions=True)
            for lane in lanes:
                self._lanes.pop(lane.partition, None)


async def _all(work: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all; raises the first failure once none goes on."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending)
