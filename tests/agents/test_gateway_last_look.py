"""A call looks twice whether it is still wanted: before it is tried, and on the connection, before a byte has left."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from tests.agents.conftest import World, call, text_in

from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import ModelCall
from klatch_agents.testing.upstream import Upstream


class UnwantedError(Exception):
    """Nobody waits for the answer any more."""


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as server:
        yield server


@pytest.fixture
async def gateway(upstream: Upstream) -> AsyncIterator[OpenAICompatible]:
    async with OpenAICompatible(Endpoint(upstream.url)) as opened:
        yield opened


def looking(look: Callable[[str], Awaitable[None]]) -> ModelCall:
    body = {"model": "fake?text=hello", "messages": [{"role": "user", "content": "hello"}]}
    return ModelCall(body, before_send=look)


async def text_of(gateway: OpenAICompatible, asked: ModelCall) -> str:
    async with gateway.stream(asked) as reply:
        return "".join([text_in(batch) async for batch in reply])


async def unwanted(_: str) -> None:
    raise UnwantedError


async def test_the_last_look_is_on_the_connection_and_before_anything_left(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    seen = list[tuple[int, int]]()

    async def look(_: str) -> None:
        # What had left by now, the server would have by the time it answers another.
        async with OpenAICompatible(Endpoint(upstream.url)) as other:
            await other.models()
            seen.append((upstream.open_connections, len(upstream.calls)))

    assert await text_of(gateway, looking(look)) == "hello"
    assert seen == [(2, 0)]
    assert len(upstream.calls) == 1


async def test_who_is_not_wanted_any_more_sends_nothing_and_the_next_call_goes_on(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    with pytest.raises(UnwantedError):
        async with gateway.stream(looking(unwanted)):
            raise AssertionError("it was called")
    assert not upstream.calls
    assert await text_of(gateway, replace(looking(unwanted), before_send=None)) == "hello"
    assert (upstream.open_connections, len(upstream.calls)) == (1, 1)


async def test_the_router_looks_before_it_connects_and_again_before_it_sends(world: World) -> None:
    asked = list[str]()

    async def look() -> None:
        asked.append("")

    async def last_look(deployment: str) -> None:
        asked.append(deployment)
        raise UnwantedError

    world.route(world.on_a(), world.on_b(), tries=3)
    with pytest.raises(UnwantedError):
        async with world.router.stream(replace(call(), before_try=look, before_send=last_look)):
            raise AssertionError("it was called")
    assert asked == ["", "a"], "it was stopped between the two, and is tried nowhere else"
    assert not world.a.calls
    assert not world.b.calls
