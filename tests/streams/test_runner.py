"""What a runner promises its stage and its group, on `MemoryLog`."""
# pyright: reportPrivateUsage=false

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from klatch_schemas.records import Draft, Partition, Record
from klatch_streams.lane import Room
from klatch_streams.log import AppendFailed, LogError, MembershipLost, OffsetGone
from klatch_streams.memory_log import MemoryLog
from klatch_streams.runner import Runner, RunnerSettings

QUICK = RunnerSettings(commit_s=0.01, drain_s=0.2, room=Room(queue=6, batch=2), read_wait_ms=20)


@dataclass
class Collecting:
    """A stage whose owners keep what they are given, and do what the test says."""

    name: str = "collecting"
    topic: str = "in"
    restore: dict[int, asyncio.Event] = field(default_factory=dict[int, asyncio.Event])
    """By partition: what `own` waits for."""
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """What `take` waits for."""
    taken: list[Record] = field(default_factory=list[Record])
    owned_from: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    calls: list[str] = field(default_factory=list[str])
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.room.set()

    async def own(self, partition: Partition, committed: int) -> "Keeping":
        self.owned_from.append((partition.number, committed))
        if held := self.restore.get(partition.number):
            await held.wait()
        return Keeping(self, committed)


@dataclass
class Keeping:
    stage: Collecting
    next: int

    async def take(self, records: Sequence[Record]) -> None:
        await self.stage.room.wait()
        if self.stage.failure:
            raise self.stage.failure
        self.stage.taken += records
        self.stage.calls.append("take")
        self.next = records[-1].offset + 1

    async def checkpoint(self) -> int:
        self.stage.calls.append("checkpoint")
        return self.next

    async def release(self, drain_s: float) -> None:
        self.stage.calls.append("release" if drain_s else "abandon")


def records(count: int, partition: int, start: int = 0) -> list[Draft]:
    return [Draft("in", b"k", b"%d" % number, (), partition) for number in range(start, start + count)]


@asynccontextmanager
async def running(log: MemoryLog, stage: Collecting, settings: RunnerSettings = QUICK) -> AsyncGenerator[Runner, None]:
    runner = Runner(log, stage, "g", settings)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        runner.stop()
        await task


async def until(ready: Callable[[], object]) -> None:
    """Poll a condition of the system under test; the test's timeout bounds it."""
    while not ready():  # noqa: ASYNC110 - what is waited for tells nobody
        # What is waited for tells nobody.
        await asyncio.sleep(0.002)


async def committed(log: MemoryLog, number: int) -> int | None:
    return log._groups["g"].committed.get(Partition("in", number))


async def test_a_partition_is_fed_only_once_it_is_restored_and_loses_nothing_meanwhile() -> None:
    log, stage = MemoryLog({"in": 2}), Collecting(restore={0: asyncio.Event()})
    await log.append(records(20, 0) + records(20, 1))
    async with running(log, stage) as runner:
        await until(lambda: len(stage.taken) == 20)
        await log.append(records(20, 0, start=20))
        assert {record.partition.number for record in stage.taken} == {1}, "another partition waited, or this did not"
        assert not runner.ready.is_set()
        stage.restore[0].set()
        await runner.ready.wait()
        await until(lambda: len(stage.taken) == 60)
    assert [record.value for record in stage.taken if record.partition.number == 0] == [b"%d" % n for n in range(40)]


async def test_a_stage_begins_at_the_committed_offset_and_at_the_first_record_without_one() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    await log.append(records(5, 0))
    log.truncate_before(Partition("in", 0), 2)
    async with running(log, stage):
        await until(lambda: len(stage.taken) == 3)
    await log.append(records(1, 0, start=5))
    async with running(log, stage):
        await until(lambda: len(stage.taken) == 4)
    assert stage.owned_from == [(0, 2), (0, 5)]


async def test_records_that_expired_before_they_were_read_are_passed_over() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    await log.append(records(2, 0))
    async with running(log, stage):
        await until(lambda: len(stage.taken) == 2)
    await log.append(records(4, 0, start=2))
    log.truncate_before(Partition("in", 0), 4)
    async with running(log, stage):
        await until(lambda: len(stage.taken) == 4)
    assert [record.offset for record in stage.taken] == [0, 1, 4, 5]


async def test_a_committed_offset_past_the_end_of_the_log_stops_the_runner() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    await log.append(records(1, 0))
    async with running(log, stage):
        await until(lambda: len(stage.taken) == 1)
    log._groups["g"].committed[Partition("in", 0)] = 7
    with pytest.raises(OffsetGone):
        await Runner(log, stage, "g", QUICK).run()


async def test_a_slow_stage_is_given_no_more_than_its_room_and_the_rest_stays_in_the_log() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    stage.room.clear()
    async with running(log, stage) as runner:
        await runner.ready.wait()
        # One at a time: a single read may go over the room.
        for number in range(40):
            await log.append(records(1, 0, start=number))
            # The load's own pace.
            await asyncio.sleep(0.001)
        [partition] = (await runner.health()).partitions
        assert partition.queued <= QUICK.room.queue
        assert partition.end == partition.lag == 40
        stage.room.set()
        await until(lambda: len(stage.taken) == 40)
    assert [record.offset for record in stage.taken] == list(range(40))


async def test_a_slow_stage_is_given_no_more_bytes_than_its_room_but_a_record_that_is_larger_passes() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    stage.room.clear()
    room = Room(queue=1_000, queue_bytes=300, batch=2)
    async with running(log, stage, RunnerSettings(commit_s=0.01, room=room, read_wait_ms=20)) as runner:
        await runner.ready.wait()
        for number in range(40):
            await log.append([one._replace(value=b"x" * 100) for one in records(1, 0, start=number)])
            # The load's own pace.
            await asyncio.sleep(0.001)
        [partition] = (await runner.health()).partitions
        assert partition.queued <= 3
        await log.append([one._replace(value=b"x" * 1_000) for one in records(1, 0, start=40)])
        stage.room.set()
        await until(lambda: len(stage.taken) == 41)


async def test_a_stage_stalls_while_the_log_is_silent_and_goes_on_where_it_was() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    async with running(log, stage):
        await log.append(records(3, 0))
        await until(lambda: len(stage.taken) == 3)
        log.fall_silent()
        writing = asyncio.create_task(log.append(records(3, 0, start=3)))
        # Nothing is to happen.
        await asyncio.sleep(0.1)
        assert len(stage.taken) == 3
        log.answer()
        await writing
        await until(lambda: len(stage.taken) == 6)
    assert [record.offset for record in stage.taken] == list(range(6))


async def test_a_stage_whose_log_stays_silent_fails_once_and_its_successor_repeats_no_committed_work() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    await log.append(records(3, 0))
    runner = Runner(log, stage, "g", QUICK)
    task = asyncio.create_task(runner.run())
    await until(lambda: "g" in log._groups and log._groups["g"].committed.get(Partition("in", 0)) == 3)
    log.fall_silent()
    await log.asked()
    log.lose_patience()
    await asyncio.sleep(0)
    log.answer()
    with pytest.raises(LogError, match="no broker"):
        await task
    await log.append(records(1, 0, start=3))
    async with running(log, stage):
        await until(lambda: len(stage.taken) == 4)
    assert [record.offset for record in stage.taken] == list(range(4))


async def test_the_group_goes_on_while_a_stage_is_slow() -> None:
    log, slow, quick = MemoryLog({"in": 2}), Collecting(), Collecting()
    slow.room.clear()
    await log.append(records(4, 0) + records(4, 1))
    async with running(log, slow) as first:
        await first.ready.wait()
        async with running(log, quick) as second:
            await second.ready.wait()
            await until(lambda: len(quick.taken) == 4)
            slow.room.set()
            await until(lambda: len({(r.partition, r.offset) for r in slow.taken + quick.taken}) == 8)


async def test_a_revoked_partition_is_drained_then_checkpointed_then_committed() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    await log.append(records(2, 0))
    slow_commits = RunnerSettings(commit_s=60, drain_s=0.2, read_wait_ms=20)
    async with running(log, stage, slow_commits):
        await until(lambda: len(stage.taken) == 2)
    assert stage.calls[:3] == ["take", "release", "checkpoint"]
    assert await committed(log, 0) == 2


async def test_a_failed_take_is_raised_and_commits_nothing() -> None:
    log, stage = MemoryLog({"in": 2}), Collecting(failure=AppendFailed("no broker"))
    await log.append(records(3, 0))
    runner = Runner(log, stage, "g", RunnerSettings(commit_s=60, drain_s=0.2, read_wait_ms=20))
    with pytest.raises(AppendFailed, match="no broker"):
        await runner.run()
    assert await committed(log, 0) is None
    assert stage.calls.count("checkpoint") == 0
    assert stage.calls.count("abandon") == 2
    assert not log.members("g"), "it has not left its group"


async def test_a_stage_that_cannot_restore_stops_the_runner() -> None:
    class Broken(Collecting):
        async def own(self, partition: Partition, committed: int) -> Keeping:
            raise ValueError(f"{partition.number} from {committed}")

    log = MemoryLog({"in": 1})
    with pytest.raises(ValueError, match="0 from 0"):
        await Runner(log, Broken(), "g", QUICK).run()


async def test_a_lost_membership_stops_the_runner_at_once_and_commits_nothing() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    await log.append(records(3, 0))
    runner = Runner(log, stage, "g", RunnerSettings(commit_s=60, drain_s=0.2, read_wait_ms=20))
    task = asyncio.create_task(runner.run())
    await until(lambda: len(stage.taken) == 3)
    log.expel(log.members("g")[0])
    with pytest.raises(MembershipLost):
        await task
    assert await committed(log, 0) is None
    assert stage.calls[-1] == "abandon"
    assert "checkpoint" not in stage.calls


async def test_a_cancelled_runner_leaves_its_group_and_commits_nothing() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting()
    await log.append(records(3, 0))
    task = asyncio.create_task(Runner(log, stage, "g", RunnerSettings(commit_s=60, read_wait_ms=20)).run())
    await until(lambda: len(stage.taken) == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not log.members("g")
    assert await committed(log, 0) is None


async def test_a_runner_that_is_cancelled_while_it_leaves_still_ends_what_its_owners_have_begun() -> None:
    @dataclass
    class Slow(Keeping):
        async def take(self, records: Sequence[Record]) -> None:
            try:
                await super().take(records)
            except asyncio.CancelledError:
                leaving.set()
                await ends.wait()
                raise

    class Leaving(Collecting):
        async def own(self, partition: Partition, committed: int) -> Keeping:
            return Slow(self, (await super().own(partition, committed)).next)

    leaving, ends = asyncio.Event(), asyncio.Event()
    log, stage = MemoryLog({"in": 1}), Leaving()
    stage.room.clear()
    await log.append(records(1, 0))
    task = asyncio.create_task((runner := Runner(log, stage, "g", QUICK)).run())
    await runner.ready.wait()
    await until(lambda: log.members("g") and runner._lanes[Partition("in", 0)].queued == 0)
    log.expel(log.members("g")[0])
    await leaving.wait()
    task.cancel()
    ends.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.calls[-1] == "abandon"


async def test_a_member_that_is_assigned_nothing_is_ready() -> None:
    log, stage, idle = MemoryLog({"in": 1}), Collecting(), Collecting()
    async with running(log, stage) as first:
        await first.ready.wait()
        async with running(log, idle) as second:
            await second.ready.wait()


async def test_a_partition_revoked_while_it_is_restored_goes_over_whole() -> None:
    log, stage = MemoryLog({"in": 1}), Collecting(restore={0: asyncio.Event()})
    await log.append(records(5, 0))
    task = asyncio.create_task((first := Runner(log, stage, "g", QUICK)).run())
    await until(lambda: stage.owned_from)
    first.stop()
    await task
    assert stage.taken == []
    next_stage = Collecting()
    async with running(log, next_stage):
        await until(lambda: len(next_stage.taken) == 5)
