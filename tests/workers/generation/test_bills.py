"""What is billed for a reply that no model server counted: it was cut, or nobody was asked at all."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import time
from typing import Any

import pytest
from tests.workers.generation.test_routes import leave_said
from tests.workers.generation.test_successors import leave_open

from klatch_schemas.events import (
    ChatRequested,
    CircuitBreaker,
    Deployment,
    ModelRouted,
    Prices,
    PromptPublished,
    PromptReference,
    StreamCancel,
    Usage,
)
from klatch_schemas.topics import CHAT_STREAM, MODELS, Namespace
from klatch_streams.estimate import Estimate
from klatch_streams.ledger import publish
from klatch_workers.generation.conclude import cost_micros

PRICES = Prices(prompt=2.5, completion=10)

SILENT = "fake?first_delay=60"
"""A model that reads its prompt, and says nothing."""


def body(model: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


async def route(generation: Any, url: str, model: str, *, failures: int = 0, **more: Any) -> None:
    """A route of the model `m` to one deployment with a price; its breaker opens after so many failures."""
    own = Deployment(name="own", url=url, model=model, prices=PRICES, **more)
    routed = ModelRouted(alias="m", deployments=(own,), breaker=CircuitBreaker(failures=failures))
    await publish(generation.log, MODELS, "m", routed, Namespace())


async def cancel(generation: Any, request: ChatRequested) -> None:
    named = {"request": request.request, "tenant": request.tenant, "conversation": request.conversation}
    await generation.write(CHAT_STREAM, request.conversation, StreamCancel(**named, by="test"))


async def cancelled_once_asked(generation: Any, request: ChatRequested) -> Any:
    """Its settlement, cancelled before the first word."""
    await generation.upstream.changed(lambda: bool(generation.upstream.calls))
    await cancel(generation, request)
    return await generation.settled(request)


async def test_an_image_is_billed_as_it_was_reserved_and_not_by_its_bytes(generation: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 600_000}}
    asked = body(SILENT, [{"type": "text", "text": "What is this? " * 100}, image])
    async with generation.worker():
        settled = await cancelled_once_asked(generation, await generation.admit(SILENT, body=asked))
    assert settled.usage.estimated
    assert 1_200 + 350 < settled.usage.prompt_tokens < Estimate().of(asked).prompt


async def test_tools_are_read_with_the_prompt_and_billed_with_it(generation: Any) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "Looks. " * 1_000}}
    async with generation.worker():
        request = await generation.admit(SILENT, body=body(SILENT, "hello", tools=[tool]))
        settled = await cancelled_once_asked(generation, request)
    assert settled.usage.prompt_tokens > 1_750


@pytest.mark.parametrize("ends", ["cancelled", "expired"])
async def test_who_waited_for_a_place_in_vain_has_asked_nobody(generation: Any, ends: str) -> None:
    await route(generation, generation.upstream.url, SILENT, concurrency=1)
    async with generation.worker():
        first = await generation.admit("m")
        await generation.upstream.changed(lambda: bool(generation.upstream.calls))
        # Far enough for its attempt to begin before.
        deadline_ms = int(time.time() * 1000) + 4_000 if ends == "expired" else None
        waits = await generation.admit("m", conversation="c2", deadline_ms=deadline_ms)
        await generation.assembled(waits, lambda assembly: assembly.state.attempt)
        if ends == "cancelled":
            await cancel(generation, waits)
        settled = await generation.settled(waits)
        await cancel(generation, first)
        paid = await generation.settled(first)
    assert (settled.status, settled.usage, settled.deployment) == (ends, Usage(), "")
    assert (paid.deployment, paid.cost_micros) == ("own", cost_micros(paid.usage, PRICES))
    assert paid.cost_micros
    assert len(generation.upstream.calls) == 1


@pytest.mark.parametrize(
    ("url", "more"),
    [("http://127.0.0.1:1/v1", {}), ("", {"key": "that-nobody-has"})],
    ids=["it refuses connections", "its key is not here"],
)
async def test_a_server_that_got_nothing_is_paid_nothing(generation: Any, url: str, more: dict[str, Any]) -> None:
    await route(generation, url or generation.upstream.url, "fake", **more)
    async with generation.worker():
        settled = await generation.settled(await generation.admit("m"))
    assert (settled.status, settled.usage, settled.cost_micros) == ("failed", Usage(), 0)
    assert not generation.upstream.calls


async def test_deployments_that_failed_and_that_cool_down_are_paid_nothing(generation: Any) -> None:
    await route(generation, generation.upstream.url, "fake?status=500", failures=1)
    async with generation.worker():
        asked = await generation.settled(await generation.admit("m"))
        calls = len(generation.upstream.calls)
        cooling = await generation.settled(await generation.admit("m"))
    assert (asked.status, asked.usage) == ("failed", Usage())
    assert (cooling.status, cooling.usage) == ("failed", Usage())
    assert calls == len(generation.upstream.calls) > 0


async def test_a_cancel_after_all_that_were_asked_failed_pays_none_of_them(generation: Any) -> None:
    await route(generation, generation.upstream.url, "fake?status=503&retry_after=5")
    async with generation.worker():
        request = await generation.admit("m")
        await generation.upstream.changed(lambda: any(call.outcome == "refused" for call in generation.upstream.calls))
        # Another one goes there and back meanwhile: by then the refusal has been read.
        await generation.settled(await generation.admit("fake?text=hello", conversation="c2"))
        await cancel(generation, request)
        settled = await generation.settled(request)
    assert (settled.status, settled.usage, settled.deployment) == ("cancelled", Usage(), "")


async def test_a_filter_that_refuses_has_read_the_prompt(generation: Any) -> None:
    await route(generation, generation.upstream.url, "fake?prompt_filtered=true")
    async with generation.worker():
        settled = await generation.settled(await generation.admit("m"))
    assert (settled.status, settled.deployment) == ("blocked", "own")
    assert settled.cost_micros == cost_micros(settled.usage, PRICES) > 0


async def test_a_cut_reply_is_billed_for_the_prompt_that_its_model_was_sent(generation: Any) -> None:
    generation.book.prompts["long"] = PromptPublished(name="long", version=1, template="Be brief. " * 1_000)
    async with generation.worker():
        request = await generation.admit(SILENT, prompt=PromptReference(name="long"))
        settled = await cancelled_once_asked(generation, request)
    assert settled.usage.prompt_tokens > 2_500


async def no_route(generation: Any) -> None:
    await publish(generation.log, MODELS, "m", None, Namespace())


async def test_a_route_that_goes_while_its_reply_runs_does_not_make_it_free(generation: Any) -> None:
    await route(generation, generation.upstream.url, "fake?tokens=400&rate=100")
    async with generation.worker() as worker:
        request = await generation.admit("m")
        await generation.upstream.changed(lambda: bool(generation.upstream.calls))
        await no_route(generation)
        while worker.routes.get("m"):
            await worker.routes.changed()
        await cancel(generation, request)
        settled = await generation.settled(request)
    assert (settled.status, settled.deployment) == ("cancelled", "own")
    assert settled.cost_micros == cost_micros(settled.usage, PRICES) > 0


async def test_a_dead_owners_reply_by_a_deployment_that_is_gone_costs_the_highest_price_there_is(
    generation: Any,
) -> None:
    cheap = Deployment(name="cheap", url=generation.upstream.url, prices=Prices(prompt=1, completion=20))
    dear = Deployment(name="dear", url=generation.upstream.url, prices=PRICES)
    for one in (cheap, dear):
        await publish(generation.log, MODELS, one.name, ModelRouted(alias=one.name, deployments=(one,)), Namespace())
    request = generation.request("m", on_crash="continue")
    await leave_open(generation, request)
    await leave_said(generation, request, "own", finish="stop")
    await generation.write_verdict(request)
    await generation.write_admission(request)
    async with generation.worker():
        settled = await generation.settled(request)
    assert (settled.status, settled.deployment) == ("completed", "own")
    assert settled.cost_micros == cost_micros(settled.usage, Prices(prompt=2.5, completion=20)) > 0


async def test_models_without_a_route_cost_nothing_whatever_others_cost(generation: Any) -> None:
    await route(generation, generation.upstream.url, "fake")
    async with generation.worker():
        settled = await generation.settled(await generation.admit("fake?text=hello"))
    assert (settled.status, settled.deployment, settled.cost_micros) == ("completed", "default", 0)
