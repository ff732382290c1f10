"""Places are given back by everybody who held one, and by nobody who did not, whenever they are cancelled."""

import asyncio
import random

import pytest

from klatch_agents.gateway.errors import ExpiredError
from klatch_agents.gateway.fair import Claim
from klatch_agents.gateway.places import Places


async def never() -> None:
    """Nothing changes."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("seed", range(20))
async def test_whenever_callers_are_cancelled_no_place_is_lost_and_none_is_made(seed: int) -> None:
    chance, places, held, most = random.Random(seed), Places(3), 0, 0  # noqa: S311 - no secret

    async def hold() -> None:
        nonlocal held, most
        async with places.hold(Claim(chance.choice("abc")), never):
            held += 1
            most = max(most, held)
            try:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                held -= 1

    tasks = [asyncio.create_task(hold()) for _ in range(40)]
    while not all(task.done() for task in tasks):
        chance.choice(tasks).cancel()
        await asyncio.sleep(0)
    assert (places.queue.used, places.queue.waiting, held) == (0, 0, 0)
    assert most <= 3
    assert not all(task.cancelled() for task in tasks)


async def test_a_place_that_was_granted_to_somebody_who_is_cancelled_in_that_moment_goes_to_the_next() -> None:
    places = Places(1)
    leave = asyncio.Event()

    async def hold() -> None:
        async with places.hold(Claim(), never):
            await leave.wait()

    first, second, third = (asyncio.create_task(hold()) for _ in range(3))
    await asyncio.sleep(0)
    assert (places.queue.used, places.queue.waiting) == (1, 2)
    first.cancel()
    await asyncio.wait([first])
    second.cancel()  # it was granted its place just now, and did not run since
    leave.set()
    await asyncio.wait([second, third])
    assert (second.cancelled(), third.cancelled()) == (True, False)
    assert (places.queue.used, places.queue.waiting) == (0, 0)


async def test_who_waits_past_the_deadline_is_told_and_holds_nothing() -> None:
    now = 100.0
    places = Places(1, lambda: now)
    async with places.hold(Claim(), never):
        with pytest.raises(ExpiredError, match="deadline"):
            async with places.hold(Claim(expires=100.02), never):
                pytest.fail("there is no place")
        assert places.queue.waiting == 0
    now = 200.0
    async with places.hold(Claim(), never):
        pass


async def test_more_places_let_in_who_waits() -> None:
    places = Places(1)
    entered = asyncio.Event()

    async def hold() -> None:
        async with places.hold(Claim(), never):
            entered.set()

    async with places.hold(Claim(), never):
        waiting = asyncio.create_task(hold())
        await asyncio.sleep(0)
        assert not entered.is_set()
        places.resize(2)
        await asyncio.wait_for(waiting, 1)
    assert places.queue.used == 0
