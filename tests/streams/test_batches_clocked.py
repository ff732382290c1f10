"""Batches on a clock of their own: order, one append at a time and partition, interval, urgency, failures, close."""

import asyncio
import selectors
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from klatch_schemas.records import Draft, Partition
from klatch_streams.batches import Batches, Beat, Written
from klatch_streams.log import AppendFailed, RecordTooLarge
from klatch_streams.memory_log import MemoryLog

INTERVAL_S = 0.010


class _Jumping(selectors.DefaultSelector):
    loop: "Clocked"

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "a deadlock"
        self.loop.now += timeout
        return list(super().select(0))


class Clocked(asyncio.SelectorEventLoop):
    """An event loop whose clock stands until a timer is all that it waits for; then it jumps there."""

    def __init__(self) -> None:
        self.now = 1.0
        selector = _Jumping()
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now


class Watched:
    """A log whose appends take `takes_s` each, and which remembers when each began and what it held."""

    def __init__(self, takes_s: float = 0.001, most: int = 4) -> None:
        self.log = MemoryLog({"t": 2}, appending=self._append)
        self.batches = Batches(self.log, Beat(INTERVAL_S), most)
        self.appends: list[tuple[float, int, list[str]]] = []
        self.under_way: list[int] = []
        self.takes_s = takes_s

    def write(self, *names: str, partition: int = 0, urgent: bool = False, hold_s: float = 0.0) -> list[Written]:
        drafts = [Draft("t", None, name.encode(), (), partition) for name in names]
        return [self.batches.write(draft, urgent=urgent, hold_s=hold_s) for draft in drafts]

    def held(self, partition: int = 0) -> list[str]:
        return [(one.value or b"").decode() for one in self.log.held(Partition("t", partition)).records]

    @property
    def leaving(self) -> list[tuple[int, list[str]]]:
        """Milliseconds since the first append, and what left."""
        return [(round((at - self.appends[0][0]) * 1000), names) for at, _, names in self.appends]

    async def _append(self, drafts: Sequence[Draft]) -> None:
        partition = drafts[0].partition or 0
        assert partition not in self.under_way, "two appends to one partition at a time"
        self.under_way.append(partition)
        now = asyncio.get_running_loop().time()
        self.appends.append((now, partition, [(draft.value or b"").decode() for draft in drafts]))
        await asyncio.sleep(self.takes_s)
        self.under_way.remove(partition)


def clocked(story: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=Clocked) as runner:
        runner.run(story)


def test_what_is_written_after_a_pause_leaves_at_once_and_what_follows_leaves_together_after_the_interval() -> None:
    async def story() -> None:
        watched = Watched()
        [first] = watched.write("a")
        await first.durable()
        watched.write("b")
        await asyncio.sleep(0.002)  # the clock is virtual
        [last] = watched.write("c")
        assert await last.durable() == 2
        assert [names for _, names in watched.leaving] == [["a"], ["b", "c"]]
        assert 1 < watched.leaving[1][0] <= 10

    clocked(story())


def test_what_comes_within_a_beat_leaves_in_one_append_a_partition_all_at_the_same_time() -> None:
    async def story() -> None:
        watched = Watched(most=500)
        for partition in (0, 1):
            await asyncio.sleep(partition * 0.003)  # each leaves at a time of its own; the clock is virtual
            [alone] = watched.write("alone", partition=partition)
            await alone.durable()
        watched.appends.clear()
        written = list[Written]()
        for number in range(10):
            written += watched.write("abcde"[number // 2], partition=number % 2)
            await asyncio.sleep(0.000_2)  # the clock is virtual
        assert [await one.durable() for one in written] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert [names for _, _, names in watched.appends] == [list("abcde")] * 2
        assert len({at for at, _, _ in watched.appends}) == 1

    clocked(story())


def test_a_trickle_of_single_records_costs_one_append_an_interval() -> None:
    async def story() -> None:
        watched = Watched(takes_s=0.000_5, most=500)
        for number in range(100):
            watched.write(str(number))
            await asyncio.sleep(0.002)  # longer than an append: nothing is in line in between
        await watched.batches.close()
        assert len(watched.appends) <= 23, "200 ms are 20 intervals"

    clocked(story())


def test_an_urgent_record_does_not_wait_for_the_interval_and_takes_along_what_waits() -> None:
    async def story() -> None:
        watched = Watched()
        [first] = watched.write("a")
        await first.durable()
        watched.write("b")
        [urgent] = watched.write("c", urgent=True)
        await urgent.durable()
        assert watched.leaving[1] == (1, ["b", "c"])

    clocked(story())


def test_a_record_that_is_held_leaves_with_the_urgent_one_that_follows() -> None:
    async def story() -> None:
        watched = Watched()
        began = asyncio.get_running_loop().time()
        watched.write("opening", hold_s=0.004)
        await asyncio.sleep(0.002)  # the model thinks, on the clock of the test
        watched.write("role")
        [urgent] = watched.write("first", urgent=True)
        await urgent.durable()
        assert watched.leaving == [(0, ["opening", "role", "first"])]
        assert watched.appends[0][0] - began == pytest.approx(0.002)

    clocked(story())


def test_a_record_that_is_held_leaves_alone_if_nothing_follows() -> None:
    async def story() -> None:
        watched = Watched()
        began = asyncio.get_running_loop().time()
        [held] = watched.write("opening", hold_s=0.004)
        await held.durable()
        assert watched.appends[0][0] - began == pytest.approx(0.004)

    clocked(story())


def test_a_record_that_is_held_waits_no_longer_for_a_beat_than_it_would_alone() -> None:
    async def story() -> None:
        watched = Watched()
        [first] = watched.write("a")
        await first.durable()
        watched.write("b")
        await asyncio.sleep(0)
        [held] = watched.write("opening", hold_s=0.004)
        await held.durable()
        assert watched.leaving[1] == (5, ["b", "opening"])

    clocked(story())


def test_an_urgent_record_behind_a_full_batch_does_not_wait_either() -> None:
    async def story() -> None:
        watched = Watched()
        watched.write("a")
        await asyncio.sleep(0)
        watched.write("b", "c", "d", "e", "f")
        [urgent] = watched.write("g", urgent=True)
        await urgent.durable()
        assert watched.leaving == [(0, ["a"]), (1, ["b", "c", "d", "e"]), (2, ["f", "g"])]

    clocked(story())


def test_records_of_many_writers_stand_in_the_order_of_their_writes() -> None:
    async def story() -> None:
        watched = Watched()
        written = list[Written]()
        for number in range(60):
            written += watched.write(str(number), partition=number % 2, urgent=number % 7 == 0)
            if number % 3 == 0:
                await asyncio.sleep(0.001)  # the clock is virtual
        offsets = [await one.durable() for one in written]
        assert watched.held(0) == [str(number) for number in range(0, 60, 2)]
        assert watched.held(1) == [str(number) for number in range(1, 60, 2)]
        assert offsets == [number // 2 for number in range(60)]

    clocked(story())


def test_one_slow_partition_holds_up_no_other() -> None:
    async def story() -> None:
        watched = Watched()
        watched.takes_s = 60
        watched.write("slow")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        watched.takes_s = 0.001
        [quick] = watched.write("quick", partition=1)
        await quick.durable()
        assert watched.held(0) == []

    clocked(story())


@pytest.mark.parametrize("stands", [False, True])
def test_a_failed_append_reaches_everybody_who_waits_and_everybody_who_writes_later(stands: bool) -> None:
    async def story() -> None:
        watched = Watched()
        watched.log.fail_next_append(stands=stands)
        [leaving] = watched.write("a")
        await asyncio.sleep(0)
        in_line = watched.write("b", "c", "d", "e", "f")
        for one in (leaving, *in_line):
            with pytest.raises(AppendFailed):
                await one.durable()
        with pytest.raises(AppendFailed):
            watched.write("g")
        assert watched.held() == (["a"] if stands else [])
        # Other partitions are not concerned, and closing does not hang.
        [other] = watched.write("h", partition=1)
        await watched.batches.close()
        assert await other.durable() == 0

    clocked(story())


def test_a_failure_that_nobody_waits_for_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        watched = Watched()
        watched.log.fail_next_append()
        watched.write("a")
        await watched.batches.close()

    clocked(story())
    assert not caplog.records


def test_a_record_that_is_too_large_fails_alone() -> None:
    async def story() -> None:
        watched = Watched()
        one, wide, other = watched.write("a", "x" * 2_000_000, "b")
        assert await one.durable() == 0
        assert await other.durable() == 1
        with pytest.raises(RecordTooLarge):
            await wide.durable()
        [later] = watched.write("c")
        assert await later.durable() == 2

    clocked(story())


def test_whoever_stops_waiting_does_not_stop_the_append() -> None:
    async def story() -> None:
        watched = Watched()
        [one] = watched.write("a")
        waiting = asyncio.create_task(one.durable())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await one.durable() == 0

    clocked(story())


def test_closing_appends_all_that_is_in_line_without_waiting_for_intervals() -> None:
    async def story() -> None:
        watched = Watched()
        watched.write(*"abcdefghij")
        await watched.batches.close()
        assert watched.held() == list("abcdefghij")
        assert watched.leaving[-1][0] <= 2

    clocked(story())
