"""A doer keeps order per key, works on keys side by side, and commits only contiguous prefixes."""

import asyncio
import gc
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import DEAD_LETTERS, Namespace
from klatch_streams.dead_letters import DeadLetter
from klatch_streams.keyed_owner import Doing, Handle, KeyedOwner
from klatch_streams.log import RecordTooLarge
from klatch_streams.memory_log import MemoryLog

HERE = Partition("in", 0)


def record(offset: int, key: str = "k") -> Record:
    return Record(HERE, offset, 1_000, key.encode(), b"{}")


def log_with_dead_letters(limit: int = 1_000_000) -> MemoryLog:
    return MemoryLog({DEAD_LETTERS.name: 1}, max_record_bytes=limit)


def owner_of(handle: Handle, log: MemoryLog | None = None, ahead: int = 10_000) -> KeyedOwner:
    doing = Doing("doer", handle, max_ahead=ahead)
    return KeyedOwner(doing, log or log_with_dead_letters(), Namespace(), 0)


class Gates:
    """A handler that finishes a record when the test opens its gate."""

    def __init__(self) -> None:
        self.open = defaultdict[int, asyncio.Event](asyncio.Event)
        self.begun = list[int]()
        self.done = list[int]()

    async def __call__(self, one: Record) -> None:
        self.begun.append(one.offset)
        await self.open[one.offset].wait()
        self.done.append(one.offset)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def finished(owner: KeyedOwner) -> None:
    while owner.in_flight:  # noqa: ASYNC110 - the owner tells nobody
        await asyncio.sleep(0)


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.sampled_from("abcd"), max_size=30), order=st.randoms(use_true_random=False))
def test_records_of_a_key_are_handled_in_order_and_the_low_water_never_passes_an_unfinished_one(
    keys: list[str], order: object
) -> None:
    async def story() -> None:
        gates, seen = Gates(), dict[str, list[int]]()
        owner = owner_of(gates)
        await owner.take([record(offset, key) for offset, key in enumerate(keys)])
        while len(gates.done) < len(keys):
            await settle()
            ready = [offset for offset in gates.begun if not gates.open[offset].is_set()]
            assert len({keys[offset] for offset in ready}) == len(ready), "two records of a key at once"
            assert len(ready) == len({keys[n] for n in range(len(keys)) if n not in gates.done}), "a key waits"
            gates.open[order.choice(ready)].set()  # type: ignore[attr-defined]
            await settle()
            unfinished = [offset for offset in range(len(keys)) if offset not in gates.done]
            assert await owner.checkpoint() == min(unfinished, default=len(keys))
        for offset in gates.done:
            seen.setdefault(keys[offset], []).append(offset)
        assert all(offsets == sorted(offsets) for offsets in seen.values())
        await owner.release(0)

    asyncio.run(story())


async def test_no_more_than_so_many_records_are_taken_at_once() -> None:
    gates = Gates()
    owner = owner_of(gates, ahead=3)
    taking = asyncio.create_task(owner.take([record(offset, str(offset)) for offset in range(5)]))
    await settle()
    assert gates.begun == [0, 1, 2]
    assert not taking.done()
    gates.open[0].set()
    await settle()
    assert gates.begun == [0, 1, 2, 3]
    for offset in range(5):
        gates.open[offset].set()
    await taking
    await owner.release(1)
    assert owner.low_water == 5


async def test_finished_records_run_only_so_far_ahead_of_one_that_hangs() -> None:
    gates = Gates()
    for offset in range(1, 10):
        gates.open[offset].set()
    owner = owner_of(gates, ahead=4)
    taking = asyncio.create_task(owner.take([record(offset, str(offset)) for offset in range(10)]))
    await settle()
    assert gates.done == [1, 2, 3]
    gates.open[0].set()
    await taking
    await owner.release(1)
    assert owner.low_water == 10


async def test_a_dead_letter_counts_as_done_and_the_others_go_on() -> None:
    async def picky(one: Record) -> None:
        if one.offset == 1:
            raise DeadLetter("unreadable", "not JSON")

    log = log_with_dead_letters()
    owner = owner_of(picky, log)
    await owner.take([record(0), record(1), record(2)])
    await finished(owner)
    assert await owner.checkpoint() == 3
    [letter] = log.records(DEAD_LETTERS.name)
    assert (letter.header("dead-offset"), letter.header("dead-reason")) == (b"1", b"unreadable")


async def test_work_whose_outcome_is_too_large_for_the_log_is_set_aside() -> None:
    async def verbose(_: Record) -> None:
        raise RecordTooLarge("out", 2_000_000, 1_000_000)

    log = log_with_dead_letters(limit=70_000)
    owner = owner_of(verbose, log)
    await owner.take([record(0)._replace(value=b"x" * 69_900)])
    await finished(owner)
    assert await owner.checkpoint() == 1
    [letter] = log.records(DEAD_LETTERS.name)
    assert letter.header("dead-cut") == b"69900"
    assert letter.value == b"x" * 65_536


async def test_any_other_exception_ends_the_owner() -> None:
    async def broken(_: Record) -> None:
        raise LookupError("a bug")

    owner = owner_of(broken)
    await owner.take([record(0)])
    await settle()
    with pytest.raises(LookupError):
        await owner.checkpoint()
    with pytest.raises(LookupError):
        await owner.take([record(1)])
    assert owner.low_water == 0


async def test_a_take_that_waits_for_room_hears_of_a_failure() -> None:
    async def broken(_: Record) -> None:
        await asyncio.sleep(0)
        raise LookupError("a bug")

    owner = owner_of(broken, ahead=1)
    with pytest.raises(LookupError):
        await owner.take([record(0), record(1, "other")])


async def test_release_waits_for_what_is_in_flight_and_begins_nothing_new() -> None:
    gates = Gates()
    owner = owner_of(gates)
    await owner.take([record(0, "a"), record(1, "a"), record(2, "b")])
    await settle()
    releasing = asyncio.create_task(owner.release(5))
    await settle()
    for offset in range(3):
        gates.open[offset].set()
    await releasing
    assert sorted(gates.done) == [0, 2]
    assert await owner.checkpoint() == 1


async def test_release_cancels_at_its_deadline_and_leaves_the_rest_uncommitted() -> None:
    gates = Gates()
    owner = owner_of(gates, ahead=2)
    taking = asyncio.create_task(owner.take([record(offset, str(offset)) for offset in range(4)]))
    await settle()
    gates.open[0].set()
    await settle()
    await owner.release(0.01)
    await taking
    assert gates.done == [0]
    assert await owner.checkpoint() == 1


async def test_the_stage_writes_its_snapshot_before_the_offset_is_told() -> None:
    told = list[int]()

    async def before(low_water: int) -> None:
        await asyncio.sleep(0)
        told.append(low_water)

    async def fine(_: Record) -> None:
        return

    owner = KeyedOwner(Doing("doer", fine, before_commit=before), log_with_dead_letters(), Namespace(), 0)
    await owner.take([record(0)])
    await finished(owner)
    assert await owner.checkpoint() == 1
    assert told == [1]


async def test_no_more_bytes_are_in_flight_than_may_be_but_a_single_record_may_be_larger() -> None:
    gates = Gates()
    doing = Doing("doer", gates, max_bytes=100)
    owner = KeyedOwner(doing, log_with_dead_letters(), Namespace(), 0)
    records = [record(offset)._replace(key=b"%d" % offset, value=b"x" * 60) for offset in range(4)]
    taking = asyncio.create_task(owner.take(records))
    await settle()
    assert gates.begun == [0, 1]
    gates.open[0].set()
    await settle()
    assert gates.begun == [0, 1, 2]
    for gate in (1, 2, 3):
        gates.open[gate].set()
    await taking
    await finished(owner)
    large = record(4)._replace(value=b"x" * 1_000)
    gates.open[4].set()
    await asyncio.wait_for(owner.take([large]), 10)
    await finished(owner)
    assert await owner.checkpoint() == 5


async def test_no_failure_of_a_handler_is_left_for_the_loop_to_complain_of() -> None:
    async def fail(one: Record) -> None:
        raise ValueError(one.key)

    complaints = list[dict[str, object]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    try:
        owner = owner_of(fail)
        await owner.take([record(0, "a"), record(1, "b")])
        await settle()
        with pytest.raises(ValueError, match="a"):
            await owner.checkpoint()
        await owner.release(0)
        del owner
        gc.collect()
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    # The loop is every test's: of what another left behind, it complains here too.
    assert [one for one in complaints if isinstance(one.get("exception"), ValueError)] == []
