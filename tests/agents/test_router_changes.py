"""Routes that change while calls wait: nobody stays where the route no longer says, and nobody loses its turn."""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from tests.agents.conftest import World, ask, call, open_server
from tests.agents.test_router_waiting import BOTH

from klatch_agents.gateway.errors import RefusedError, UnroutableError
from klatch_agents.gateway.health import Breaker
from klatch_agents.gateway.lines import MOST_KNOWN, Lines
from klatch_agents.gateway.router import Router
from klatch_agents.gateway.routing import MOST_UNMADE
from klatch_schemas.events import CircuitBreaker, Deployment, ModelRouted

T = TypeVar("T")

LONG = "tokens=1000&rate=100"
"""A reply that lasts for as long as somebody reads it."""


@asynccontextmanager
async def full(world: World, **fields: Any) -> AsyncGenerator[None]:
    """While the only place at `a` is taken."""
    world.route(world.on_a(LONG, concurrency=1), **fields)
    async with world.router.stream(call()):
        yield


async def waiting_for(asked: "asyncio.Future[T]") -> T:
    async with asyncio.timeout(5):
        return await asked


@BOTH
async def test_more_places_let_in_who_waits_without_another_call(world: World, asking: Any) -> None:
    async with full(world):
        waiting = [asyncio.create_task(asking(world.router)) for _ in range(2)]
        await asyncio.sleep(0)
        world.route(world.on_a("text=hello", concurrency=3))
        assert await waiting_for(asyncio.gather(*waiting)) == ["a", "a"]


CHANGES: dict[str, tuple[Callable[[World], None], str]] = {
    "removed": (lambda world: world.route(world.on_b()), "b"),
    "weight 0": (lambda world: world.route(world.on_a(concurrency=1, weight=0), world.on_b()), "b"),
    "behind another": (lambda world: world.route(world.on_a(concurrency=1, tier=2), world.on_b()), "b"),
    "replaced": (lambda world: world.route(world.on_a(concurrency=2, url=world.b.url)), "a"),
}
"""And who serves then."""


@BOTH
@pytest.mark.parametrize("name", CHANGES)
async def test_who_waits_for_a_place_goes_where_the_route_says_by_now(world: World, asking: Any, name: str) -> None:
    change, served = CHANGES[name]
    async with full(world):
        waiting = asyncio.create_task(asking(world.router))
        await asyncio.sleep(0)
        change(world)
        assert await waiting_for(waiting) == served
    assert (len(world.a.calls), len(world.b.calls)) == (1, 1)


@BOTH
async def test_who_waits_where_there_is_no_route_any_more_is_told_so(world: World, asking: Any) -> None:
    async with full(world):
        waiting = asyncio.create_task(asking(world.router))
        await asyncio.sleep(0)
        world.book.put(None)
        with pytest.raises(UnroutableError) as refused:
            await waiting_for(waiting)
        assert refused.value.status == 404


async def test_who_waits_for_a_cool_down_goes_where_the_route_says_by_now(world: World) -> None:
    napping = asyncio.Event()

    async def for_ever(_: float) -> None:
        napping.set()
        await asyncio.Event().wait()

    terms = {"breaker": CircuitBreaker(failures=1, cool_down_s=5)}
    world.route(world.on_a("status=500"), tries=1, **terms)
    async with Router(world.book, open_server, sleep=for_ever) as router:
        with pytest.raises(RefusedError):
            await ask(router)
        waiting = asyncio.create_task(ask(router))
        await waiting_for(asyncio.ensure_future(napping.wait()))
        world.route(world.on_b(), tries=1, **terms)
        assert await waiting_for(waiting) == ("b", "from b")
    assert len(world.a.calls) == 1


async def test_however_often_its_route_changes_a_call_waits_on(world: World) -> None:
    async with full(world):
        waiting = asyncio.create_task(ask(world.router))
        for number in range(2 * MOST_UNMADE):
            world.route(world.on_a("text=hello", concurrency=1), tries=1 + number % 2)
            for _ in range(5):
                await asyncio.sleep(0)
        assert not waiting.done()
    assert await waiting_for(waiting) == ("a", "hello")


async def test_who_waits_grows_no_younger_when_the_route_changes(world: World) -> None:
    now = 0.0
    served = list[str]()
    world.route(world.on_a(LONG, concurrency=1))
    async with Router(world.book, open_server, wall=lambda: now) as router:

        async def wait(priority: int) -> None:
            async with router.stream(call(priority=priority)):
                served.append(f"class {priority}")

        async with router.stream(call()):
            old = asyncio.create_task(wait(9))
            await asyncio.sleep(0)
            now = 60.0
            young = asyncio.create_task(wait(5))
            await asyncio.sleep(0)
            world.route(world.on_a(LONG, concurrency=1), tries=2)
            for _ in range(5):
                await asyncio.sleep(0)
        await waiting_for(asyncio.gather(old, young))
    assert served == ["class 9", "class 5"]


@pytest.mark.parametrize("order", [(5, 9), (9, 5)], ids=str)
async def test_places_that_a_change_brings_go_to_whose_turn_it_is(world: World, order: tuple[int, int]) -> None:
    served = list[int]()

    async def wait(priority: int) -> None:
        async with world.router.stream(call(priority=priority)):
            served.append(priority)

    async with full(world):
        waiting = [asyncio.create_task(wait(priority)) for priority in order]
        await asyncio.sleep(0)
        world.route(world.on_a(LONG, concurrency=2))
        await waiting_for(asyncio.gather(*waiting))
    assert served == [5, 9]


TERMS: dict[str, Any] = {"breaker": CircuitBreaker(failures=1, cool_down_s=3600), "tries": 1}


@pytest.mark.parametrize("field", ["url", "key", "model"])
async def test_a_deployment_that_is_pointed_elsewhere_is_called_whatever_the_old_one_did(
    world: World, field: str
) -> None:
    old = world.on_a("status=500")
    new = {"url": world.b.url, "key": "mended", "model": "fake?text=hello"}[field]
    world.route(old, **TERMS)
    with pytest.raises(RefusedError):
        await ask(world.router)
    with pytest.raises(UnroutableError):
        await ask(world.router)
    called = len(world.a.calls) + len(world.b.calls)
    changed = old.model_copy(update={field: new})
    world.route(changed, **TERMS)
    await asyncio.gather(ask(world.router), return_exceptions=True)
    assert len(world.a.calls) + len(world.b.calls) == called + 1


async def test_what_is_not_of_the_server_changes_no_health(world: World) -> None:
    """Also of a deployment that two routes give other weights."""
    world.route(world.on_a("status=500"), **TERMS)
    with pytest.raises(RefusedError):
        await ask(world.router)
    world.route(world.on_a("status=500", weight=2, tier=1, concurrency=5), **TERMS)
    with pytest.raises(UnroutableError):
        await ask(world.router)
    assert len(world.a.calls) == 1


def test_deployments_that_were_not_called_for_long_are_forgotten() -> None:
    lines = Lines(open_server)

    def breaker_of(model: str) -> Breaker:
        one = Deployment(name="a", url="http://a/v1", model=model)
        return lines.line(ModelRouted(alias="m", deployments=(one,)), one).breaker

    used, unused = breaker_of("used"), weakref.ref(breaker_of("unused"))
    for number in range(MOST_KNOWN):
        breaker_of(str(number))
        assert breaker_of("used") is used
    assert unused() is None
