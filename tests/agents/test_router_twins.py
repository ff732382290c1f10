"""Deployments that are as good as each other: who waits takes the first place that is free at any of them."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from tests.agents.conftest import World, ask, call
from tests.agents.test_router_changes import LONG, waiting_for
from tests.agents.test_router_waiting import BOTH

from klatch_agents.gateway.errors import ExpiredError, RefusedError
from klatch_schemas.events import CircuitBreaker, Deployment

MANY = 12


def twins(world: World, on_a: str = "text=hello") -> tuple[Deployment, Deployment]:
    """One place each."""
    return world.on_a(on_a, concurrency=1), world.on_b("text=hello", concurrency=1, tier=0)


async def take_both(world: World, held: AsyncExitStack) -> dict[str, AsyncExitStack]:
    """The places of both twins, by name."""
    taken = dict[str, AsyncExitStack]()
    for _ in range(2):
        one = await held.enter_async_context(AsyncExitStack())
        reply = await one.enter_async_context(world.router.stream(call()))
        taken[reply.deployment] = one
    return taken


@BOTH
@pytest.mark.parametrize("free", ["a", "b"])
async def test_who_waits_takes_the_first_place_that_is_free_at_any_of_them(
    world: World, asking: Any, free: str
) -> None:
    world.route(*twins(world))
    async with AsyncExitStack() as held:
        taken = await take_both(world, held)
        assert set(taken) == {"a", "b"}
        waiting = [asyncio.create_task(asking(world.router)) for _ in range(MANY)]
        await asyncio.sleep(0)
        await taken[free].aclose()
        served: list[str] = await waiting_for(asyncio.gather(*waiting))
        assert set(served) == {free}


async def test_the_places_of_both_are_used_and_none_is_taken_twice(world: World) -> None:
    world.route(*twins(world))
    served = await asyncio.gather(*(ask(world.router) for _ in range(MANY)))
    assert len(served) == MANY
    assert min(Counter(deployment for deployment, _ in served).values()) > 1
    async with AsyncExitStack() as held:
        assert set(await take_both(world, held)) == {"a", "b"}


async def test_who_waits_for_the_lower_tier_does_not_take_a_place_of_the_higher(world: World) -> None:
    world.route(world.on_a("text=hello", concurrency=1), world.on_b())
    async with world.router.stream(call()):
        waiting = asyncio.create_task(ask(world.router))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
    assert await waiting_for(waiting) == ("a", "hello")


async def test_a_twin_that_fails_is_the_one_that_failed(world: World) -> None:
    """The breaker of the one that was called counts it, and the next try goes to the other."""
    terms = {"breaker": CircuitBreaker(failures=1, cool_down_s=60)}
    world.clock.stands_still()
    world.route(*twins(world), **terms)
    failures = list[object]()
    async with AsyncExitStack() as held:
        taken = await take_both(world, held)
        waiting = [asyncio.create_task(ask(world.router, call(failed=failures.append))) for _ in range(4)]
        await asyncio.sleep(0)
        world.route(*twins(world, "status=500"), **terms)
        await taken["a"].aclose()
        await world.a.changed(lambda: len(world.a.calls) == 2)
        await taken["b"].aclose()
        assert await waiting_for(asyncio.gather(*waiting)) == [("b", "hello")] * 4
    assert (len(failures), len(world.a.calls)) == (1, 2)


async def test_who_comes_too_late_at_one_has_left_the_other(world: World) -> None:
    world.route(*twins(world))
    async with AsyncExitStack() as held:
        taken = await take_both(world, held)
        with pytest.raises(ExpiredError):
            await ask(world.router, call(deadline=1.0))
        waiting = asyncio.create_task(ask(world.router))
        await asyncio.sleep(0)
        await taken["b"].aclose()
        assert await waiting_for(waiting) == ("b", "hello")


@pytest.mark.parametrize("tier", [0, 1])
async def test_who_waits_goes_to_one_that_is_as_good_or_better_once_it_has_cooled_down(world: World, tier: int) -> None:
    terms = {"breaker": CircuitBreaker(failures=1, cool_down_s=60)}
    on_b = world.on_b(LONG, concurrency=1, tier=tier)
    world.route(world.on_a("status=500", concurrency=1), tries=1, **terms)
    with pytest.raises(RefusedError):
        await ask(world.router)
    clock = world.clock.stands_still()
    world.route(world.on_a("text=well again", concurrency=1), on_b, **terms)
    async with world.router.stream(call()) as reply:
        assert reply.deployment == "b"
        waiting = [asyncio.create_task(ask(world.router)) for _ in range(MANY)]
        await clock.sleeping(MANY)
        assert set(clock.naps[-MANY:]) == {60.0}
        clock.moves_on()
        assert await waiting_for(asyncio.gather(*waiting)) == [("a", "well again")] * MANY
