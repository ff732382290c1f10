"""Routes of the ledger in a running worker: in force within a second, and said in what it writes."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
from collections.abc import AsyncIterator
from math import ceil
from typing import Any

import pytest

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import Deployment, ModelRouted, Prices, Usage
from klatch_schemas.topics import MODELS, Namespace
from klatch_streams.ledger import publish
from klatch_workers.generation.conclude import cost_micros, reply_of

WITHIN_S = 3.0
"""A second, and two for a machine that is busy with other tests."""


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


async def route(generation: Any, alias: str, *deployments: Deployment) -> None:
    routed = ModelRouted(alias=alias, deployments=deployments) if deployments else None
    await publish(generation.log, MODELS, alias, routed, Namespace())


async def answered(generation: Any, model: str) -> Assembly:
    ended: Assembly = await generation.ended(await generation.admit(model))
    return ended


async def test_a_change_of_a_route_is_in_force_in_a_running_worker_within_a_second(
    generation: Any, other: Upstream
) -> None:
    async with generation.worker():
        assert (await answered(generation, "fake?text=by default")).state.status == "completed"
        await route(generation, "m", Deployment(name="other", url=other.url, model="fake?text=routed"))
        async with asyncio.timeout(WITHIN_S):
            while not other.calls:
                await answered(generation, "m")
        await route(generation, "m")
        before = len(other.calls)
        async with asyncio.timeout(WITHIN_S):
            while len(other.calls) > before:
                before = len(other.calls)
                await answered(generation, "m")


async def test_the_end_and_the_settlement_say_which_deployment_answered(generation: Any, other: Upstream) -> None:
    await route(
        generation,
        "m",
        Deployment(name="first", url=other.url, model="fake?status=500"),
        Deployment(name="second", url=other.url, model="fake?text=hello", tier=1),
    )
    async with generation.worker():
        request = await generation.admit("m")
        ended, settled = await generation.ended(request), await generation.settled(request)
    assert ended.end is not None
    assert (ended.end.status, ended.end.model, ended.end.deployment) == ("completed", "m", "second")
    assert (settled.model, settled.deployment) == ("m", "second")
    first, *others = ended.standing
    assert (first.seq, first.deployment) == (0, "second"), "readers know it from the first chunk on"
    assert not any(said.deployment for said in others)


async def test_a_filtered_prompt_ends_as_blocked_and_is_sent_to_nobody_else(generation: Any, other: Upstream) -> None:
    """Trap 32."""
    await route(
        generation,
        "m",
        Deployment(name="first", url=other.url, model="fake?prompt_filtered=true"),
        Deployment(name="second", url=generation.upstream.url, model="fake", tier=1),
    )
    async with generation.worker():
        ended = await answered(generation, "m")
    assert ended.end is not None
    assert ended.end.error is not None
    assert (ended.end.status, ended.end.error.code) == ("blocked", "content_filter")
    assert ended.end.error.upstream is not None
    assert "innererror" in ended.end.error.upstream
    assert not generation.upstream.calls


async def test_what_fails_for_good_was_tried_as_often_as_the_route_says_and_no_more(
    generation: Any, other: Upstream
) -> None:
    await route(generation, "m", Deployment(name="one", url=other.url, model="fake?status=500"))
    async with generation.worker():
        assert (await answered(generation, "m")).state.status == "failed"
    assert len(other.calls) == 3


async def test_an_answer_that_breaks_off_is_begun_anew_elsewhere(generation: Any, other: Upstream) -> None:
    """Trap 38: once text went out, only another attempt may mend it, and everybody can see that it did."""
    await route(
        generation,
        "m",
        Deployment(name="first", url=other.url, model="fake?tokens=9&fault=drop&fault_after=4"),
        Deployment(name="second", url=generation.upstream.url, model="fake?text=whole", tier=1),
    )
    async with generation.worker():
        ended = await answered(generation, "m")
    assert ended.end is not None
    assert (ended.end.status, ended.end.attempt, ended.end.deployment) == ("completed", 2, "second")
    assert reply_of(ended).messages()[0]["content"] == "whole"
    assert len(other.calls) == 1


async def test_an_answer_that_breaks_off_is_continued_by_a_deployment_that_can(
    generation: Any, other: Upstream
) -> None:
    """Trap 38."""
    await route(
        generation,
        "m",
        Deployment(name="first", url=other.url, model="fake?tokens=9&fault=drop&fault_after=4"),
        Deployment(name="cannot", url=other.url, model="fake?text=anew", tier=1),
        Deployment(name="can", kind="vllm", url=generation.upstream.url, model="fake?tokens=9", tier=2),
    )
    async with generation.worker():
        ended = await generation.ended(await generation.admit("m", on_crash="continue"))
    assert ended.end is not None
    assert (ended.end.status, ended.end.deployment) == ("completed", "can")
    assert reply_of(ended).messages()[0]["content"] == "The quick brown fox jumps over a lazy dog "
    assert [said.deployment for said in ended.standing if said.deployment] == ["first", "can"]
    [continued] = generation.upstream.calls
    assert continued.body["continue_final_message"] is True


async def test_a_settlement_holds_what_the_tokens_cost_where_they_were_made(generation: Any, other: Upstream) -> None:
    priced = Prices(prompt=2.5, cached=1.25, completion=10)
    await route(generation, "m", Deployment(name="one", url=other.url, model="fake?tokens=8", prices=priced))
    async with generation.worker():
        settled = await generation.settled(await generation.admit("m"))
    usage = settled.usage
    assert usage.completion_tokens == 8
    assert settled.cost_micros == ceil(usage.prompt_tokens * 2.5 + 80)


@pytest.mark.parametrize("room", [512, 4], ids=["all fit in", "more than there is room for"])
async def test_tenants_share_the_places_at_a_deployment(generation: Any, other: Upstream, room: int) -> None:
    model = "fake?tokens=3&rate=20"
    await route(generation, "m", Deployment(name="one", url=other.url, model=model, concurrency=1))
    generation.max_in_flight = room
    # All are there before anybody is served; one tenant has sixteen, on two partitions, and was first.
    flood = [await generation.admit("m", tenant="acme", conversation=f"c{number}") for number in range(16)]
    quiet = await generation.admit("m", tenant="globex", conversation="g")
    async with generation.worker():
        for request in (*flood, quiet):
            await generation.ended(request)
    order = [one.headers["x-request-id"] for one in other.calls]
    assert order.index(quiet.request) < 6


@pytest.mark.parametrize(
    ("usage", "prices", "micros"),
    [
        (Usage(prompt_tokens=1_000_000), Prices(prompt=2.5), 2_500_000),
        (Usage(prompt_tokens=100, cached_tokens=40), Prices(prompt=2, cached=1), 160),
        (Usage(prompt_tokens=100, cached_tokens=40), Prices(prompt=2), 200),
        (Usage(completion_tokens=1), Prices(completion=0.1), 1),
        (Usage(completion_tokens=1), None, 0),
    ],
)
def test_what_tokens_cost(usage: Usage, prices: Prices | None, micros: int) -> None:
    assert cost_micros(usage, prices) == micros
