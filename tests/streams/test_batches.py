"""Self-clocked batches: what leaves together, what does not wait, and what a failure leaves behind."""

import asyncio
from collections.abc import Sequence

import pytest

from klatch_schemas.records import Draft, Partition
from klatch_streams.batches import Batches, Beat, Place
from klatch_streams.log import AppendFailed
from klatch_streams.memory_log import MemoryLog


class Watched(MemoryLog):
    """A log that keeps the event loop's time and the records of every append, and can refuse."""

    def __init__(self) -> None:
        super().__init__({"t": 4})
        self.appends: list[tuple[float, list[Draft]]] = []
        self.refuses = False

    async def append(self, drafts: Sequence[Draft]) -> Sequence[Place]:
        self.appends.append((asyncio.get_running_loop().time(), list(drafts)))
        if self.refuses:
            raise AppendFailed("refused")
        return await super().append(drafts)


def draft(partition: int, value: bytes = b"v") -> Draft:
    return Draft("t", b"k", value, partition=partition)


async def test_an_urgent_record_leaves_at_once_and_takes_along_what_waits() -> None:
    log = Watched()
    batches = Batches(log, Beat(3600))
    await batches.write(draft(0)).durable()
    waiting = batches.write(draft(0))
    urgent = batches.write(draft(0), urgent=True)
    async with asyncio.timeout(10):
        assert [await waiting.durable(), await urgent.durable()] == [1, 2]
    assert [len(drafts) for _, drafts in log.appends] == [1, 2]


async def test_after_a_refused_append_the_partition_takes_nothing_more_and_others_do() -> None:
    log = Watched()
    batches = Batches(log)
    log.refuses = True
    refused = batches.write(draft(0))
    with pytest.raises(AppendFailed):
        await refused.durable()
    log.refuses = False
    with pytest.raises(AppendFailed):
        batches.write(draft(0))
    assert await batches.write(draft(1)).durable() == 0
    assert log.appends[-1][1][0].partition == Partition("t", 1).number


async def test_whoever_writes_faster_than_the_log_takes_waits_for_room() -> None:
    log = Watched()
    batches = Batches(log, room_bytes=100)
    log.fall_silent()
    for _ in range(3):
        batches.write(draft(0, b"x" * 40))
    waiting = asyncio.create_task(batches.room(0))
    # Nothing is to happen.
    await asyncio.sleep(0.05)
    assert not waiting.done()
    async with asyncio.timeout(10):
        await batches.room(1)  # nobody's business
        log.answer()
        await waiting
        await batches.close()
    assert len(log.records("t")) == 3


async def test_room_that_never_comes_is_told() -> None:
    log = Watched()
    batches = Batches(log, room_bytes=100)
    log.fall_silent()
    for _ in range(3):
        batches.write(draft(0, b"x" * 40))
    waiting = asyncio.create_task(batches.room(0))
    await log.asked()
    log.lose_patience()
    with pytest.raises(AppendFailed):
        await asyncio.wait_for(waiting, 10)


def beats(beat: Beat, *leaving: tuple[float, int]) -> list[float]:
    """The interval after each departure."""
    intervals = list[float]()
    for now, records in leaving:
        beat.leave(now, records)
        intervals.append(beat.interval_s)
    return intervals


def test_beats_are_longer_while_many_records_leave_at_each_whoever_they_are_of() -> None:
    beat = Beat(1, 4, many=10)
    # Two partitions leave together, with ten records in all; so they do again four later; then with nine.
    assert beats(beat, (100, 5), (100, 5), (101, 6), (101, 6), (104, 9)) == [1, 1, 4, 4, 4]
    assert [beat.after(104), beat.after(107.9)] == [108, 108]
    assert beats(beat, (108, 50), (109, 50)) == [1, 4]


def test_beats_are_quick_again_after_a_pause() -> None:
    beat = Beat(1, 4, many=10)
    assert beats(beat, (100, 50), (101, 50), (104, 50), (111.9, 1)) == [1, 4, 4, 4]
    beat = Beat(1, 4, many=10)
    assert beats(beat, (100, 50), (101, 50), (104, 50), (112, 1)) == [1, 4, 4, 1]
