"""The `Log` port's consumer groups, the same in memory and on Kafka."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from klatch_schemas.records import Draft, Partition, Record
from klatch_streams.log import LogError, Membership, MembershipLost, OffsetGone

if TYPE_CHECKING:
    from tests.conformance.conftest import World

PATIENCE_S = 30
"""For a machine that pauses; Kafka's long poll is longer here."""


class Told:
    """A listener that remembers, and that can be made to wait or to fail."""

    def __init__(self) -> None:
        self.log = list[tuple[str, list[int]]]()
        self.owned = list[Partition]()
        self.may_assign = asyncio.Event()
        self.may_assign.set()
        self.before_revoked: Callable[[], object] | None = None
        self._changed = asyncio.Condition()

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        await self._say("assigning", partitions)
        await self.may_assign.wait()
        self.owned = list(partitions)
        await self._say("assigned", partitions)

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        if self.before_revoked and asyncio.iscoroutine(call := self.before_revoked()):
            await call
        self.owned = []
        await self._say("revoked", partitions)

    async def until(self, ready: "Callable[[Told], bool]") -> None:
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: ready(self))

    async def has(self, *numbers: int) -> None:
        await self.until(lambda told: [one.number for one in told.owned] == list(numbers))

    async def _say(self, what: str, partitions: Sequence[Partition]) -> None:
        self.log.append((what, [one.number for one in partitions]))
        async with self._changed:
            self._changed.notify_all()


def a_group() -> str:
    return f"g-{uuid4().hex}"


async def fill(world: "World", topic: str, *numbers: int, count: int = 4) -> None:
    await world.log.append([Draft(topic, None, b"v", partition=number) for number in numbers for _ in range(count)])


async def read_until(member: Membership, count: int, wait_ms: int = 1_000) -> list[Record]:
    records = list[Record]()
    async with asyncio.timeout(PATIENCE_S):
        while len(records) < count:
            for some in (await member.read(wait_ms)).values():
                records += some
    return records


def places(records: Sequence[Record]) -> list[tuple[int, int]]:
    return sorted((record.partition.number, record.offset) for record in records)


async def test_a_new_group_reads_everything_from_the_first_record(world: "World") -> None:
    topic = await world.topic(2)
    await fill(world, topic, 0, 1)
    await world.truncate_before(Partition(topic, 1), 2)
    told = Told()
    member = await world.log.join(a_group(), topic, told)
    assert told.log == []
    assert places(await read_until(member, 6)) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert told.log == [("assigning", [0, 1]), ("assigned", [0, 1])]
    await member.close()
    assert told.log[2:] == [("revoked", [0, 1])]
    with pytest.raises(LogError, match="closed"):
        await member.read(1)


async def test_no_record_comes_out_while_its_owner_is_getting_ready(world: "World") -> None:
    topic = await world.topic(2)
    await fill(world, topic, 0, 1)
    told = Told()
    told.may_assign.clear()
    member = await world.log.join(a_group(), topic, told)
    await told.until(lambda told: bool(told.log))
    for _ in range(10):
        assert not await member.read(50)
    assert told.log == [("assigning", [0, 1])]
    told.may_assign.set()
    assert len(await read_until(member, 8)) == 8


async def test_what_is_committed_is_where_the_next_member_begins(world: "World") -> None:
    topic, group = await world.topic(2), a_group()
    zero, one = Partition(topic, 0), Partition(topic, 1)
    await fill(world, topic, 0, 1)
    first = await world.log.join(group, topic, Told())
    await read_until(first, 8)
    assert await first.committed(zero) is None
    await first.commit({zero: 3})
    await first.commit({one: 4})
    assert (await first.committed(zero), await first.committed(one)) == (3, 4)
    await first.close()
    await fill(world, topic, 1, count=1)
    second = await world.log.join(group, topic, Told())
    assert places(await read_until(second, 2)) == [(0, 3), (1, 4)]


async def test_an_owner_can_ask_for_its_offset_and_seek_while_it_gets_ready(world: "World") -> None:
    topic, group = await world.topic(1), a_group()
    zero = Partition(topic, 0)
    await fill(world, topic, 0)
    first = await world.log.join(group, topic, Told())
    await read_until(first, 4)
    await first.commit({zero: 3})
    await first.close()

    class Seeker(Told):
        async def assigned(self, partitions: Sequence[Partition]) -> None:
            committed = await second.committed(zero)
            assert committed == 3
            second.seek(zero, committed - 2)
            await super().assigned(partitions)

    second = await world.log.join(group, topic, Seeker())
    assert places(await read_until(second, 3)) == [(0, 1), (0, 2), (0, 3)]


async def test_a_paused_partition_waits_and_the_others_go_on(world: "World") -> None:
    topic = await world.topic(2)
    zero, one = Partition(topic, 0), Partition(topic, 1)
    member = await world.log.join(a_group(), topic, told := Told())
    await told.has(0, 1)
    member.pause(zero)
    await fill(world, topic, 0, 1)
    assert {number for number, _ in places(await read_until(member, 4))} == {1}
    assert not await member.read(50)
    member.pause(one)
    member.resume(zero)
    assert places(await read_until(member, 4)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    member.seek(one, 2)
    assert not await member.read(50)
    member.resume(one)
    assert places(await read_until(member, 2)) == [(1, 2), (1, 3)]
    with pytest.raises(LogError, match="not assigned"):
        member.seek(Partition(topic, 7), 0)


async def test_a_resumed_partition_is_read_at_once(world: "World") -> None:
    topic = await world.topic(2)
    member = await world.log.join(a_group(), topic, told := Told())
    await told.has(0, 1)
    member.pause(Partition(topic, 0))
    await fill(world, topic, 0)
    reading = asyncio.create_task(read_until(member, 4, wait_ms=3 * PATIENCE_S * 1000))
    # Long enough for a paused partition's records to have come out, if they did.
    await asyncio.sleep(0.2)
    member.resume(Partition(topic, 0))
    assert places(await reading) == [(0, 0), (0, 1), (0, 2), (0, 3)]


async def test_two_members_share_and_one_gets_all_when_the_other_leaves(world: "World") -> None:
    topic, group = await world.topic(4), a_group()
    one = await world.log.join(group, topic, first := Told())
    await first.has(0, 1, 2, 3)
    await fill(world, topic, 0, 1, 2, 3)
    await read_until(one, 16)

    async def commit() -> None:
        await one.commit(dict.fromkeys(first.owned, 4))

    first.before_revoked = commit
    two = await world.log.join(group, topic, second := Told())
    await asyncio.gather(
        first.until(lambda told: len(told.owned) == 2), second.until(lambda told: len(told.owned) == 2)
    )
    assert first.log[2] == ("revoked", [0, 1, 2, 3])
    assert sorted(first.owned + second.owned) == [Partition(topic, number) for number in range(4)]
    assert {tuple(one.number for one in told.owned) for told in (first, second)} == {(0, 1), (2, 3)}
    await fill(world, topic, 0, 1, 2, 3, count=1)
    read = await asyncio.gather(read_until(one, 2), read_until(two, 2))
    assert places([*read[0], *read[1]]) == [(number, 4) for number in range(4)]
    assert {record.partition for record in read[1]} == set(second.owned)
    theirs = second.owned
    await two.commit(dict.fromkeys(theirs, 5))
    await two.close()
    assert second.log[-1] == ("revoked", [one.number for one in theirs])
    await first.has(0, 1, 2, 3)
    await fill(world, topic, 0, 1, 2, 3, count=1)
    again = places(await read_until(one, 6))
    mine = {0, 1, 2, 3} - {one.number for one in theirs}
    assert again == sorted([(number, 5) for number in range(4)] + [(number, 4) for number in mine])


async def test_nobody_is_assigned_what_another_has_not_let_go(world: "World") -> None:
    topic, group = await world.topic(1), a_group()
    owners = list[str]()
    let_go = asyncio.Event()
    first, second = Told(), Told()

    async def slow() -> None:
        await let_go.wait()
        owners.append("first lets go")

    first.before_revoked = slow
    await world.log.join(group, topic, first)
    await first.has(0)
    await world.log.join(group, topic, second)
    for told in (first, second):
        told.may_assign.clear()
    # Long enough for records to come out too early, if they did.
    await asyncio.sleep(0.5)
    assert second.log == []
    let_go.set()
    getting_ready = [
        asyncio.create_task(told.until(lambda told: told.log[-1:] == [("assigning", [0])])) for told in (first, second)
    ]
    done, others = await asyncio.wait(getting_ready, return_when=asyncio.FIRST_COMPLETED)
    for other in others:
        other.cancel()
    await asyncio.gather(*done)
    assert owners == ["first lets go"]
    for told in (first, second):
        told.may_assign.set()


async def test_an_expelled_member_learns_it_and_its_partitions_go_to_others(world: "World") -> None:
    topic, group = await world.topic(2), a_group()
    zero = Partition(topic, 0)
    await fill(world, topic, 0, 1)
    one = await world.log.join(group, topic, first := Told())
    await read_until(one, 8)
    await world.expel(group, one)
    with pytest.raises(MembershipLost):
        await one.commit({zero: 4})
    with pytest.raises(MembershipLost):
        await read_until(one, 1)
    assert [what for what, _ in first.log] == ["assigning", "assigned"]
    two = await world.log.join(group, topic, second := Told())
    await second.has(0, 1)
    assert len(await read_until(two, 8)) == 8
    with pytest.raises(MembershipLost):
        await one.commit({zero: 4})
    await one.close()
    assert [what for what, _ in first.log] == ["assigning", "assigned"]
    await two.commit({zero: 4})


async def test_a_read_in_progress_ends_when_the_member_is_expelled(world: "World") -> None:
    topic, group = await world.topic(1), a_group()
    member = await world.log.join(group, topic, told := Told())
    await told.has(0)
    reading = asyncio.create_task(member.read(3 * PATIENCE_S * 1000))
    # The read shall be waiting already; nothing tells when it is.
    await asyncio.sleep(0.05)
    await world.expel(group, member)
    with pytest.raises(MembershipLost):
        async with asyncio.timeout(PATIENCE_S):
            await reading


async def test_nobody_commits_for_a_partition_that_is_not_theirs(world: "World") -> None:
    topic, group = await world.topic(2), a_group()
    first, second = Told(), Told()
    one = await world.log.join(group, topic, first)
    await first.has(0, 1)
    await world.log.join(group, topic, second)
    await asyncio.gather(*[told.until(lambda told: len(told.owned) == 1) for told in (first, second)])
    with pytest.raises(MembershipLost, match=topic):
        await one.commit({second.owned[0]: 1})


async def test_a_committed_offset_that_is_gone_is_an_error_not_a_jump(world: "World") -> None:
    topic, group = await world.topic(1), a_group()
    zero = Partition(topic, 0)
    await fill(world, topic, 0)
    first = await world.log.join(group, topic, Told())
    await read_until(first, 4)
    await first.commit({zero: 1})
    await first.close()
    await world.truncate_before(zero, 3)
    second = await world.log.join(group, topic, Told())
    with pytest.raises(OffsetGone) as gone:
        await read_until(second, 1)
    assert (gone.value.offset, gone.value.first, gone.value.end) == (1, 3, 4)
    second.seek(zero, 3)
    assert places(await read_until(second, 1)) == [(0, 3)]


async def test_leaving_does_not_wait_for_an_owner_that_is_getting_ready(world: "World") -> None:
    topic = await world.topic(1)
    told = Told()
    told.may_assign.clear()
    member = await world.log.join(a_group(), topic, told)
    await told.until(lambda told: bool(told.log))
    async with asyncio.timeout(PATIENCE_S):
        await member.close()
    assert told.log == [("assigning", [0]), ("revoked", [0])]


async def test_a_listener_that_fails_ends_its_membership(world: "World") -> None:
    class Broken(Told):
        async def assigned(self, partitions: Sequence[Partition]) -> None:
            raise ValueError(f"no state for {len(partitions)} partitions")

    topic, group = await world.topic(1), a_group()
    await fill(world, topic, 0)
    member = await world.log.join(group, topic, Broken())
    with pytest.raises(LogError, match="no state for 1 partitions"):
        await read_until(member, 1)
    await member.close()
    healthy = await world.log.join(group, topic, Told())
    assert len(await read_until(healthy, 4)) == 4


async def test_members_that_come_and_go_lose_and_double_nothing(world: "World") -> None:
    topic, group, total = await world.topic(4), a_group(), 200
    seen = list[tuple[int, int]]()
    done = asyncio.Event()

    async def work(rounds: int) -> None:
        member = await world.log.join(group, topic, Told())
        for _ in range(rounds):
            got = await member.read(100)
            try:
                # Taken only if the commit stands, as a stage with idempotent effects would have it.
                await member.commit({partition: records[-1].offset + 1 for partition, records in got.items()})
            except MembershipLost:
                continue
            seen.extend((record.partition.number, record.offset) for some in got.values() for record in some)
            if len(seen) >= total:
                done.set()
        await member.close()

    async def write() -> None:
        for number in range(total):
            await world.log.append([Draft(topic, None, b"v", partition=number % 4)])
            # The load's own pace.
            await asyncio.sleep(0.005)

    async with asyncio.timeout(60):
        steady = asyncio.create_task(work(1_000_000))
        writing = asyncio.create_task(write())
        for rounds in (2, 3, 4):
            await asyncio.gather(work(rounds), work(rounds + 1))
        await writing
        await done.wait()
        steady.cancel()
        await asyncio.wait([steady])
    assert sorted(seen) == [(number, offset) for number in range(4) for offset in range(total // 4)]
