"""An answer broke off, and those of its route who can continue it do not serve: others begin it anew, if there are."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.workers.generation.test_attempts import modes
from tests.workers.generation.test_routes import leave_said
from tests.workers.generation.test_successors import leave_open

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import ChatRequested, CircuitBreaker, Deployment, ModelRouted, Prices
from klatch_schemas.topics import MODELS, Namespace
from klatch_streams.ledger import publish
from klatch_workers.generation.conclude import cost_micros, reply_of

PRICES = Prices(prompt=2.5, completion=10)
BREAKS = "fake?tokens=9&fault=drop&fault_after=4"
SAID = "The quick brown fox "
"""Of it."""
Made = Callable[[str], Deployment]


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
def first(other: Upstream) -> Made:
    """One that can continue, and is asked first."""
    return lambda model: Deployment(name="first", url=other.url, model=model, continues="prefill", prices=PRICES)


@pytest.fixture
def second(generation: Any) -> Made:
    """One that can only begin anew."""
    return lambda model: Deployment(name="second", url=generation.upstream.url, model=model, tier=1, prices=PRICES)


async def route(generation: Any, *deployments: Deployment, failures: int = 0, tries: int = 3, alias: str = "m") -> None:
    breaker = CircuitBreaker(failures=failures, cool_down_s=60)
    routed = ModelRouted(alias=alias, deployments=deployments, tries=tries, breaker=breaker)
    await publish(generation.log, MODELS, alias, routed, Namespace())


def then(upstream: Upstream, model: str) -> None:
    """After its first call, the server answers as `model` says."""
    upstream.instead = lambda number: model if number else None


def text_of(ended: Assembly) -> str:
    return "".join(str(message["content"]) for message in reply_of(ended).messages())


def error_of(ended: Assembly) -> Any:
    assert ended.end is not None
    return ended.end.error


async def ended(generation: Any, request: ChatRequested | None = None) -> tuple[Assembly, list[str]]:
    """How a request ended, and the modes of its attempts."""
    async with generation.worker():
        request = request or await generation.admit("m", on_crash="continue")
        stream = await generation.ended(request)
    return stream, await modes(generation, request)


@pytest.mark.parametrize("tries", [1, 3])
@pytest.mark.parametrize("down", ["fake?status=500", "fake?status=401", "fake?status=503&retry_after=3600"])
async def test_it_is_begun_anew_by_who_cannot_continue_if_who_can_is_down(
    generation: Any, other: Upstream, first: Made, second: Made, down: str, tries: int
) -> None:
    await route(generation, first(BREAKS), second("fake?text=anew"), tries=tries)
    then(other, down)
    async with generation.worker():
        request = await generation.admit("m", on_crash="continue")
        stream, settled = await generation.ended(request), await generation.settled(request)
    assert stream.end is not None
    assert (stream.end.status, stream.end.deployment, text_of(stream)) == ("completed", "second", "anew")
    assert await modes(generation, request) == ["restart", "continue", "restart"]
    assert (settled.deployment, settled.usage.completion_tokens) == ("second", 1)
    assert settled.cost_micros == cost_micros(settled.usage, PRICES), "nobody is paid for what was taken back"
    [anew] = generation.upstream.calls
    assert [message["role"] for message in anew.body["messages"]] == ["user"]


async def test_it_is_begun_anew_if_who_can_continue_cools_down(
    generation: Any, other: Upstream, first: Made, second: Made
) -> None:
    await route(generation, first(BREAKS), second("fake?text=anew"), failures=1)
    stream, opened = await ended(generation)
    assert (stream.state.status, text_of(stream)) == ("completed", "anew")
    assert opened == ["restart", "continue", "restart"]
    assert len(other.calls) == 1


async def test_so_it_is_by_the_successor_of_a_dead_owner(
    generation: Any, other: Upstream, first: Made, second: Made
) -> None:
    await route(generation, first("fake?status=500"), second("fake?text=anew"))
    request = generation.request("m", on_crash="continue")
    await leave_open(generation, request)
    await leave_said(generation, request, "first", finish=None)
    await generation.write_verdict(request)
    await generation.write_admission(request)
    stream, opened = await ended(generation, request)
    assert (stream.state.status, text_of(stream)) == ("completed", "anew")
    assert opened == ["restart", "continue", "restart"]
    assert len(other.calls) == 3


async def test_what_was_said_stands_where_nobody_may_begin_it_anew_either_and_the_end_says_when_to_come_back(
    generation: Any, other: Upstream, first: Made, second: Made
) -> None:
    busy = second("fake?status=429&retry_after=3600")
    await route(generation, busy, failures=1, alias="n")
    await route(generation, first(BREAKS), busy, failures=1)
    async with generation.worker():
        await generation.ended(await generation.admit("n"))
        request = await generation.admit("m", on_crash="continue")
        stream = await generation.ended(request)
    assert (stream.state.status, text_of(stream)) == ("failed", SAID)
    assert 50_000 < error_of(stream).retry_after_ms <= 60_000
    assert await modes(generation, request) == ["restart", "continue"]
    assert (len(generation.upstream.calls), len(other.calls)) == (1, 1)


async def test_it_is_begun_anew_once(generation: Any, other: Upstream, first: Made, second: Made) -> None:
    await route(generation, first(BREAKS), second("fake?status=500"), tries=2)
    then(other, "fake?status=500")
    stream, opened = await ended(generation)
    assert (stream.state.status, text_of(stream)) == ("failed", "")
    assert opened == ["restart", "continue", "restart"]
    assert len(generation.upstream.calls) == 1


@pytest.mark.parametrize(("says", "status"), [("fake?prompt_filtered=true", "blocked"), ("fake?status=400", "failed")])
async def test_what_the_request_itself_is_refused_for_is_sent_to_nobody_else(
    generation: Any, other: Upstream, first: Made, second: Made, says: str, status: str
) -> None:
    await route(generation, first(BREAKS), second("fake?text=anew"))
    then(other, says)
    stream, opened = await ended(generation)
    assert (stream.state.status, text_of(stream), opened) == (status, SAID, ["restart", "continue"])
    assert not generation.upstream.calls


async def test_what_was_said_stands_where_all_of_the_route_can_continue_and_none_serves(
    generation: Any, other: Upstream, first: Made
) -> None:
    """To begin anew would ask the same servers, and cost the text that stands."""
    await route(generation, first(BREAKS))
    then(other, "fake?status=500")
    stream, opened = await ended(generation)
    assert (stream.state.status, text_of(stream), opened) == ("failed", SAID, ["restart", "continue"])
