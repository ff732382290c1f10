"""Places are given back by everybody who held one, and by nobody who did not, whenever they are cancelled."""

import asyncio
import random
from collections import Counter

import pytest

from klatch_agents.gateway.errors import ExpiredError
from klatch_agents.gateway.fair import Claim
from klatch_agents.gateway.places import Places, hold


async def never() -> None:
    """Nothing changes."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("seed", range(20))
async def test_whenever_callers_are_cancelled_no_place_is_lost_and_none_is_made(seed: int) -> None:
    chance, most = random.Random(seed), Counter[str]()  # noqa: S311 - no secret
    there, held = {name: Places(3) for name in "ab"}, Counter[str]()

    async def come() -> None:
        choice = {name: there[name] for name in chance.choice(["a", "b", "ab", "ba"])}
        async with hold(Claim(chance.choice("abc")), choice, never) as place:
            assert place
            held[place.at] += 1
            most[place.at] = max(most[place.at], held[place.at])
            try:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                held[place.at] -= 1

    tasks = [asyncio.create_task(come()) for _ in range(60)]
    while not all(task.done() for task in tasks):
        chance.choice(tasks).cancel()
        await asyncio.sleep(0)
    assert [(places.queue.used, places.queue.waiting) for places in there.values()] == [(0, 0), (0, 0)]
    assert held.total() == 0
    assert most == {"a": 3, "b": 3}
    assert not all(task.cancelled() for task in tasks)


async def test_who_waits_at_two_has_left_the_one_when_the_other_has_a_place() -> None:
    there = {name: Places(1) for name in "ab"}
    async with hold(Claim(), {"a": there["a"]}, never):
        async with hold(Claim(), {"b": there["b"]}, never):
            both = asyncio.create_task(_taken(there))
            await asyncio.sleep(0)
            assert [places.queue.waiting for places in there.values()] == [1, 1]
        assert [places.queue.waiting for places in there.values()] == [0, 0]
        assert await both == "b"


async def _taken(choice: dict[str, Places]) -> str:
    async with hold(Claim(), choice, never) as place:
        assert place
        return place.at


async def test_where_something_changed_nobody_waits_on() -> None:
    there, change = {name: Places(1) for name in "ab"}, asyncio.Event()

    async def moved() -> None:
        await change.wait()

    async with hold(Claim(), {"a": there["a"]}, never), hold(Claim(), {"b": there["b"]}, never):
        asyncio.get_running_loop().call_soon(change.set)
        async with hold(Claim(), there, moved) as place:
            assert place is None
        assert [places.queue.waiting for places in there.values()] == [0, 0]


async def test_a_place_that_was_granted_to_somebody_who_is_cancelled_in_that_moment_goes_to_the_next() -> None:
    places = Places(1)
    leave = asyncio.Event()

    async def come() -> None:
        async with hold(Claim(), {"a": places}, never):
            await leave.wait()

    first, second, third = (asyncio.create_task(come()) for _ in range(3))
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
    async with hold(Claim(), {"a": places}, never):
        with pytest.raises(ExpiredError, match="deadline"):
            async with hold(Claim(expires=100.02), {"a": places}, never):
                pytest.fail("there is no place")
        assert places.queue.waiting == 0
    now = 200.0
    async with hold(Claim(), {"a": places}, never):
        pass


async def test_more_places_let_in_who_waits() -> None:
    places = Places(1)
    entered = asyncio.Event()

    async def come() -> None:
        async with hold(Claim(), {"a": places}, never):
            entered.set()

    async with hold(Claim(), {"a": places}, never):
        waiting = asyncio.create_task(come())
        await asyncio.sleep(0)
        assert not entered.is_set()
        places.resize(2)
        await asyncio.wait_for(waiting, 1)
    assert places.queue.used == 0
