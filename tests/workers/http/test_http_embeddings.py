"""Embeddings at the door count like all else a tenant asks for: admitted before, settled after, refused alike."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest

from klatch_agents.gateway.errors import (
    ConnectError,
    ErrorBody,
    MisconfiguredError,
    ModelError,
    RefusedError,
    StalledError,
    UnroutableError,
)
from klatch_agents.gateway.port import Embedded, ModelCall
from klatch_schemas import codec
from klatch_schemas.events import (
    EmbeddingRequested,
    Event,
    Prices,
    RateLimit,
    RateLimits,
    StreamEnd,
    StreamError,
    UsageSettled,
)
from klatch_schemas.ids import Writer
from klatch_workers.http.door import Terms

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kits

LIMITS = RateLimits(requests=RateLimit(name="requests_per_minute", limit=60, remaining=59, reset_ms=60_500))


class Server:
    """A model server that embeds, and says what it counted."""

    def __init__(self, tokens: int | None = 7) -> None:
        self.calls = list[ModelCall]()
        self.tokens = tokens

    async def embed(self, call: ModelCall) -> Embedded:
        self.calls.append(call)
        said: dict[str, Any] = {"object": "list", "model": "m", "data": []}
        if self.tokens is not None:
            said["usage"] = {"prompt_tokens": self.tokens, "total_tokens": self.tokens}
        return Embedded(codec.dumps(said), "own")


class Silent:
    """A model server that is asked, or has no place for the call, and then says nothing."""

    def __init__(self, *, asks: bool = True, fails: bool = False) -> None:
        self.called = asyncio.Event()
        self.fails = fails
        self.left = asyncio.Event()
        self.asks = asks

    async def embed(self, call: ModelCall) -> Embedded:
        assert call.before_send
        if self.asks:
            await call.before_send("own")
        if self.fails:
            assert call.failed
            call.failed(RefusedError(429, ErrorBody("slow down", "requests", None, "rate")))
        self.called.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError


class Refusing:
    """A model server that refuses, or is not there."""

    def __init__(self, error: ModelError) -> None:
        self.error = error

    async def embed(self, _: ModelCall) -> Embedded:
        raise self.error


def price(model: str, deployment: str) -> Prices | None:
    return Prices(prompt=2) if (model, deployment) == ("m", "own") else None


async def test_they_are_admitted_and_settled_for_their_tenant_without_their_text(kits: "Kits") -> None:
    server = Server()
    async with kits.serving(embeddings=server, prices=price) as kit:
        asked = kit.client().embeddings.with_raw_response
        klatch = {"klatch": {"person": "ann", "use_case": "search"}}
        answer = await asked.create(model="m", input=["lighthouse", "stamp"], extra_body=klatch)
        settled: UsageSettled = await kit.until_said(UsageSettled, "chat.requests")
        [requested] = kit.said(EmbeddingRequested, "chat.requests")
        log = b"".join(record.value or b"" for record in kit.log.records("chat.requests"))
    assert answer.headers["x-klatch-deployment"] == "own"
    assert (requested.tenant, requested.person, requested.use_case, requested.model) == ("acme", "ann", "search", "m")
    assert requested.tokens == 9, "15 bytes, and two more tokens for each text"
    assert answer.headers["x-request-id"] == requested.request == settled.request
    assert (settled.tenant, settled.person, settled.status, settled.model) == ("acme", "ann", "completed", "m")
    assert (settled.usage.prompt_tokens, settled.usage.estimated, settled.cost_micros) == (7, False, 14)
    [call] = server.calls
    assert (call.tenant, "klatch" in call.body) == ("acme", False)
    assert b"lighthouse" not in log


async def test_a_server_that_does_not_count_is_settled_by_the_estimate(kits: "Kits") -> None:
    async with kits.serving(embeddings=Server(None)) as kit:
        await (await kit.call("POST", "/v1/embeddings", {"model": "m", "input": [[1, 2, 3], [4]]})).json()
        settled: UsageSettled = await kit.until_said(UsageSettled, "chat.requests")
    assert (settled.usage.prompt_tokens, settled.usage.estimated) == (4, True)


async def test_a_limit_refuses_them_before_a_model_is_asked(kits: "Kits") -> None:
    def refused(names: dict[str, Any]) -> Event:
        why = StreamError(code="rate_limit_exceeded", message="slow", retry_after_ms=1_500, limit="requests_per_minute")
        return StreamEnd(**names, writer=Writer("admission"), status="rejected", error=why, rate_limits=LIMITS)

    server = Server()
    async with kits.serving(embeddings=server) as kit:
        kit.stages.admits = refused
        with pytest.raises(openai.RateLimitError) as error:
            await kit.client().embeddings.create(model="m", input="x")
        assert kit.said(UsageSettled, "chat.requests") == []
    headers = error.value.response.headers
    assert (headers["retry-after"], headers["x-ratelimit-limit-requests"]) == ("2", "60")
    assert not server.calls


async def test_what_a_model_server_refuses_costs_nothing(kits: "Kits") -> None:
    slow = RefusedError(429, ErrorBody("slow down", "requests", None, "rate"))
    async with kits.serving(embeddings=Refusing(slow)) as kit:
        answer = await kit.call("POST", "/v1/embeddings", {"model": "m", "input": "x"})
        settled: UsageSettled = await kit.until_said(UsageSettled, "chat.requests")
    assert answer.status == 429
    assert (settled.status, settled.usage.total_tokens) == ("failed", 0)


@pytest.mark.parametrize(
    ("error", "status", "code", "ours"),
    [
        (RefusedError(429, ErrorBody("slow down", "requests", None, "rate")), 429, "rate", "model_error"),
        (RefusedError(400, ErrorBody("no", None, "input", "content_filter")), 400, "content_filter", "content_filter"),
        (RefusedError(500, ErrorBody("oh")), 500, "model_error", "model_error"),
        (ConnectError("nobody there"), 502, "model_unreachable", "model_error"),
        (StalledError("silence"), 504, "model_stalled", "model_error"),
        (MisconfiguredError("no key"), 502, "model_misconfigured", "model_error"),
        (UnroutableError("no route", status=404), 404, "model_not_found", "model_error"),
        (UnroutableError("cools down", status=503), 503, "model_unavailable", "model_error"),
    ],
    ids=lambda value: value.code if isinstance(value, ModelError) else "",
)
async def test_what_a_model_server_refuses_is_told_as_for_a_chat_completion(
    kits: "Kits", error: ModelError, status: int, code: str, ours: str
) -> None:
    async with kits.serving(embeddings=Refusing(error)) as kit:
        answer = await kit.call("POST", "/v1/embeddings", {"model": "m", "input": "x"})
        said = (await answer.json())["error"]
    assert (answer.status, said["code"], said["message"]) == (status, code, error.message)
    assert (said["klatch"]["code"], answer.headers["x-should-retry"]) == (ours, "true" if status > 404 else "false")


async def test_without_admission_they_are_refused_in_time_and_not_made_later(kits: "Kits") -> None:
    server = Server()
    async with kits.serving(Terms(admission_timeout_s=0.2), embeddings=server) as kit:
        another = {"tenant": "globex", "writer": "admission", "status": "rejected"}
        kit.stages.admits = lambda names: StreamEnd.model_validate({**names, **another})
        answer = await kit.call("POST", "/v1/embeddings", {"model": "m", "input": "x"})
        settled: UsageSettled = await kit.until_said(UsageSettled, "chat.requests")
        [requested] = kit.said(EmbeddingRequested, "chat.requests")
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "unavailable")
    assert requested.deadline_ms
    assert (settled.request, settled.status, settled.usage.total_tokens) == (requested.request, "failed", 0)
    assert not server.calls


async def test_a_field_of_klatchs_that_does_not_exist_is_named(kits: "Kits") -> None:
    async with kits.serving(embeddings=Server()) as kit:
        answer = await kit.call("POST", "/v1/embeddings", {"input": "x", "klatch": {"persom": "ann"}})
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, "klatch.persom")


@pytest.mark.parametrize(
    ("asks", "fails", "tokens", "cost"), [(True, False, 4, 8), (False, False, 0, 0), (True, True, 0, 0)]
)
async def test_who_hangs_up_ends_the_call_and_pays_for_what_a_server_was_asked(
    kits: "Kits", asks: bool, fails: bool, tokens: int, cost: int
) -> None:
    server = Silent(asks=asks, fails=fails)
    async with kits.serving(embeddings=server, prices=price) as kit:
        calling = asyncio.create_task(kit.client().embeddings.create(model="m", input="hello"))
        await server.called.wait()
        calling.cancel()
        await server.left.wait()
        settled: UsageSettled = await kit.until_said(UsageSettled, "chat.requests")
    assert (settled.status, settled.usage.prompt_tokens, settled.cost_micros) == ("cancelled", tokens, cost)


@pytest.mark.parametrize(("asks", "tokens"), [(True, 4), (False, 0)])
async def test_a_deadline_ends_the_call_wherever_it_waits(kits: "Kits", asks: bool, tokens: int) -> None:
    server = Silent(asks=asks)
    klatch = {"klatch": {"timeout_ms": 4_000}}  # far enough for the server to be asked before
    async with kits.serving(embeddings=server) as kit:
        with pytest.raises(openai.InternalServerError) as error:
            await kit.client().embeddings.create(model="m", input="hello", extra_body=klatch)
        settled: UsageSettled = await kit.until_said(UsageSettled, "chat.requests")
    assert (error.value.status_code, error.value.code) == (504, "deadline_exceeded")
    assert server.left.is_set()
    assert (settled.status, settled.usage.prompt_tokens, settled.usage.estimated) == ("expired", tokens, tokens > 0)


async def test_a_call_ends_before_its_reservation_does_whatever_it_asks_for(kits: "Kits") -> None:
    server = Server()
    async with kits.serving(embeddings=server) as kit:
        for ours in ({}, {"timeout_ms": 86_400_000}, {"deadline_ms": time.time_ns()}):
            answer = await kit.call("POST", "/v1/embeddings", {"model": "m", "input": "x", "klatch": ours})
            assert answer.status == 200
    assert [call.deadline and 800 < call.deadline - time.time() <= 900 for call in server.calls] == [True] * 3


async def test_a_deadline_that_passes_before_admission_answers_is_one(kits: "Kits") -> None:
    server = Server()
    async with kits.serving(embeddings=server) as kit:
        another = {"tenant": "globex", "writer": "admission", "status": "rejected"}
        kit.stages.admits = lambda names: StreamEnd.model_validate({**names, **another})
        body = {"model": "m", "input": "x", "klatch": {"timeout_ms": 100}}
        answer = await kit.call("POST", "/v1/embeddings", body)
        settled: UsageSettled = await kit.until_said(UsageSettled, "chat.requests")
        [requested] = kit.said(EmbeddingRequested, "chat.requests")
        assert (answer.status, (await answer.json())["error"]["code"]) == (504, "deadline_exceeded")
    assert (settled.request, settled.status, settled.usage.total_tokens) == (requested.request, "expired", 0)
    assert not server.calls


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_their_id_names_no_stream_and_a_door_says_so_at_once(kits: "Kits", method: str) -> None:
    async with kits.serving(embeddings=Server()) as kit, asyncio.timeout(30):
        made = await kit.call("POST", "/v1/embeddings", {"model": "m", "input": "x"})
        answer = await kit.call(method, f"/v1/streams/{made.headers['x-request-id']}")
        error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (404, "not_found")
    assert "embeddings" in error["message"]
