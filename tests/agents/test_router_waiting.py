"""Calls that wait for a place at a deployment which turns out to be ill, and calls that come while one probes it."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.agents.conftest import World, ask, call

from klatch_agents.gateway.errors import ExpiredError, RefusedError, UnroutableError
from klatch_agents.gateway.port import ModelCall
from klatch_agents.gateway.router import Router
from klatch_schemas.events import CircuitBreaker

MANY = 8
TERMS: Any = {"breaker": CircuitBreaker(failures=2, cool_down_s=60)}


async def answered(router: Router) -> str:
    """Who streams a reply."""
    return (await ask(router))[0]


async def embedded(router: Router) -> str:
    """Who answers with an embedding."""
    return (await router.embed(ModelCall({"model": "m", "input": "hello"}))).deployment


BOTH = pytest.mark.parametrize("asking", [answered, embedded], ids=["stream", "embedding"])


@BOTH
@pytest.mark.parametrize(("script", "calls"), [("status=500", 2), ("status=429&retry_after=30", 1)], ids=["500", "429"])
async def test_who_waits_for_a_place_at_what_begins_to_cool_down_goes_elsewhere_uncalled(
    world: World, asking: Any, script: str, calls: int
) -> None:
    """[38] No failure is told of those that made no call."""
    world.route(world.on_a(script, concurrency=1), world.on_b(), **TERMS)
    with capture_logs() as logged:
        assert await asyncio.gather(*(asking(world.router) for _ in range(MANY))) == ["b"] * MANY
    assert len(world.a.calls) == calls
    assert len([line for line in logged if line["event"] == "model.failed"]) == calls


async def test_where_there_is_nothing_else_who_waited_is_told_when_to_come_back(world: World) -> None:
    world.route(world.on_a("status=429&retry_after=30", concurrency=1), tries=1)
    ended = await asyncio.gather(*(ask(world.router) for _ in range(MANY)), return_exceptions=True)
    assert isinstance(ended[0], RefusedError)
    assert [(type(one), getattr(one, "retry_after", 0)) for one in ended[1:]] == [(UnroutableError, 30)] * (MANY - 1)
    assert len(world.a.calls) == 1


async def test_who_waited_for_nothing_leaves_its_place_to_the_next(world: World) -> None:
    world.route(world.on_a("status=429&retry_after=30", concurrency=1), world.on_b(), **TERMS)
    await asyncio.gather(*(ask(world.router) for _ in range(MANY)))
    world.clock.at += 30
    world.route(world.on_a("text=well again", concurrency=1), world.on_b(), **TERMS)
    async with asyncio.timeout(5):
        assert await ask(world.router) == ("a", "well again")


@BOTH
async def test_of_those_who_get_places_at_once_after_a_cool_down_one_probes(world: World, asking: Any) -> None:
    """Both were let through to wait before either had begun."""
    terms = {"breaker": CircuitBreaker(failures=1, cool_down_s=10)}
    world.route(world.on_a("tokens=1000&rate=100", concurrency=3), world.on_b(), **terms)
    async with world.router.stream(call()), world.router.stream(call()):
        world.route(world.on_a("status=500", concurrency=3), world.on_b(), **terms)
        assert await asking(world.router) == "b"
        world.clock.at += 10
        world.route(world.on_a("header_delay=30", concurrency=2), world.on_b(), **terms)
        waiting = [asyncio.create_task(asking(world.router)) for _ in range(2)]
        await asyncio.sleep(0)
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [one.result() for one in waiting if one.done()] == ["b"]
    assert len(world.a.calls) == 4, "two replies, a failure, and one probe"
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)


async def test_a_last_look_before_a_try_lets_no_second_call_probe(world: World) -> None:
    terms = {"breaker": CircuitBreaker(failures=1, cool_down_s=10)}
    world.route(world.on_a("status=500"), world.on_b(), **terms)
    assert (await ask(world.router))[0] == "b"
    world.clock.at += 10
    looked = list[str]()

    async def look() -> None:
        looked.append("once")
        await asyncio.sleep(0)

    asked = replace(call(), before_try=look)
    served = await asyncio.gather(*(ask(world.router, asked) for _ in range(MANY)))
    assert [deployment for deployment, _ in served] == ["b"] * MANY
    assert len(world.a.calls) == 2
    assert len(looked) == MANY + 1, "the probe looks twice, and the others once, each before its own call"


async def test_a_last_look_that_ends_the_call_lets_another_probe(world: World) -> None:
    terms = {"breaker": CircuitBreaker(failures=1, cool_down_s=10)}
    world.route(world.on_a("status=500"), world.on_b(), **terms)
    assert (await ask(world.router))[0] == "b"
    world.clock.at += 10
    world.route(world.on_a("text=well again"), world.on_b(), **terms)

    async def unwanted() -> None:
        raise ExpiredError("nobody wants it any more")

    with pytest.raises(ExpiredError):
        await ask(world.router, replace(call(), before_try=unwanted))
    assert await ask(world.router) == ("a", "well again")
