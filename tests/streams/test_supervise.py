"""What failed is run again, later and later, until it is healthy or told to stop."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_streams.supervise import Backoff, Means, supervise


@dataclass
class Story:
    """Runs that last so long and then fail, on a clock of their own; when they are used up, one returns."""

    lasting: list[float]
    now: float = 0.0
    waits: list[float] = field(default_factory=list[float])

    async def run(self) -> None:
        await asyncio.sleep(0)
        if not self.lasting:
            return
        self.now += self.lasting.pop(0)
        raise OSError("the broker is away")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.waits.append(seconds)
        self.now += seconds

    def means(self, chance: float = 0.0) -> Means:
        return Means(clock=lambda: self.now, sleep=self.sleep, chance=lambda: chance)


async def test_each_failure_in_a_row_is_waited_out_longer_up_to_a_bound() -> None:
    story = Story([1.0] * 6)
    await supervise(story.run, name="x", backoff=Backoff(0.5, 2, 4, 60), means=story.means())
    assert story.waits == [0.5, 1, 2, 4, 4, 4]


async def test_a_healthy_spell_starts_the_intervals_over() -> None:
    story = Story([1.0, 1.0, 90.0, 1.0])
    await supervise(story.run, name="x", backoff=Backoff(0.5, 2, 4, 60), means=story.means())
    assert story.waits == [0.5, 1, 0.5, 1]


async def test_it_gives_up_when_told_to() -> None:
    story = Story([1.0, 1.0])
    with pytest.raises(OSError, match="away"):
        await supervise(story.run, name="x", gives_up=lambda error: isinstance(error, OSError), means=story.means())
    assert story.waits == []


async def test_cancelling_it_cancels_what_it_runs() -> None:
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(supervise(forever, name="x"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


@given(failures=st.integers(1, 5_000), chance=st.floats(0, 1, exclude_max=True))
def test_jitter_takes_at_most_half_and_no_number_of_failures_overflows(failures: int, chance: float) -> None:
    backoff = Backoff()
    whole = backoff.wait_s(failures, 0.0)
    assert whole / 2 <= backoff.wait_s(failures, chance) <= whole <= backoff.most_s
