"""Routes of the ledger in a running worker: in force within a second, and said in what it writes."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
from collections.abc import AsyncIterator
from math import ceil
from typing import Any

import pytest
from tests.workers.generation.test_successors import leave_open

from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import ChatRequested, Deployment, ModelRouted, Prices, StreamCancel, Usage
from klatch_schemas.ids import Writer
from klatch_schemas.topics import CHAT_STREAM, MODELS, Namespace
from klatch_streams.ledger import publish
from klatch_workers.generation.conclude import cost_micros, reply_of

PRICES = Prices(prompt=2.5, completion=10)
WITHIN_S = 30.0
"""A second, and the rest for a machine that is busy with other tests."""


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


async def route(generation: Any, alias: str, *deployments: Deployment) -> None:
    routed = ModelRouted(alias=alias, deployments=deployments) if deployments else None
    await publish(generation.log, MODELS, alias, routed, Namespace())


def cancel_of(request: ChatRequested) -> StreamCancel:
    return StreamCancel(request=request.request, tenant=request.tenant, conversation=request.conversation, by="test")


async def leave_said(generation: Any, request: ChatRequested, deployment: str, finish: str | None) -> None:
    """Two words of an attempt whose owner is dead."""
    prefix = codec.delta_prefix(request.request, 1, Writer("dead"))
    for seq, word in enumerate(("two ", "words")):
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": finish if seq else None}
        chunk = codec.dumps({"object": "chat.completion.chunk", "choices": [choice]})
        value = codec.encode_delta(prefix, seq, chunk, "" if seq else deployment)
        await generation.log.append([codec.delta_draft(CHAT_STREAM.name, request.conversation.encode(), None, value)])


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


async def test_a_reply_that_is_cut_before_its_first_word_is_billed_by_who_was_asked(
    generation: Any, other: Upstream
) -> None:
    """Its server has read the prompt: a tenant's budget would not see prompts that are cancelled in time."""
    await route(generation, "m", Deployment(name="own", url=other.url, model="fake?first_delay=60", prices=PRICES))
    async with generation.worker():
        request = await generation.admit("m")
        await other.changed(lambda: bool(other.calls))
        await generation.write(CHAT_STREAM, request.conversation, cancel_of(request))
        ended, settled = await generation.ended(request), await generation.settled(request)
    assert ended.state.status == "cancelled"
    assert (settled.deployment, settled.usage.completion_tokens) == ("own", 0)
    assert settled.cost_micros == cost_micros(settled.usage, PRICES) > 0


@pytest.mark.parametrize("ended_as", ["cancelled", "completed"])
async def test_what_a_dead_owner_said_is_billed_by_who_answered_it(
    generation: Any, other: Upstream, ended_as: str
) -> None:
    await route(generation, "m", Deployment(name="own", url=other.url, model="fake", prices=PRICES))
    request = generation.request("m", on_crash="continue")
    await leave_open(generation, request)
    await leave_said(generation, request, "own", finish="stop" if ended_as == "completed" else None)
    if ended_as == "cancelled":
        await generation.write(CHAT_STREAM, request.conversation, cancel_of(request))
    await generation.write_verdict(request)
    await generation.write_admission(request)
    async with generation.worker():
        ended, settled = await generation.ended(request), await generation.settled(request)
    assert ended.state.status == ended_as
    assert (settled.deployment, settled.usage.completion_tokens) == ("own", 2)
    assert settled.cost_micros == cost_micros(settled.usage, PRICES) > 0
    assert not other.calls


async def test_a_reply_that_nobody_served_costs_nothing(generation: Any, other: Upstream) -> None:
    failing = Deployment(name="own", url=other.url, model="fake?status=500", prices=PRICES)
    await route(generation, "m", failing)
    async with generation.worker():
        settled = await generation.settled(await generation.admit("m"))
    assert (settled.status, settled.deployment, settled.cost_micros) == ("failed", "", 0)


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
