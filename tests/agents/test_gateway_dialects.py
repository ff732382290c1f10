"""What reaches a server of each kind: paths, keys, and what is translated in a body. Numbers in brackets are traps of
`STREAMING.md`."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from klatch_agents.gateway.dialect import AZURE_VERSION, Dialect
from klatch_agents.gateway.errors import MisconfiguredError, RefusedError
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import ModelCall
from klatch_agents.testing.upstream import Call, Upstream

KEY = "sk-secret-of-dialects"
BODY: dict[str, object] = {
    "messages": [{"role": "user", "content": "hello"}],
    "seed": 7,
    "made_up": {"by": "the caller"},
}


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(key=KEY) as server:
        yield server


@asynccontextmanager
async def opened(upstream: Upstream, dialect: Dialect, **endpoint: Any) -> AsyncGenerator[OpenAICompatible]:
    url = upstream.url.removesuffix("/v1") if dialect.kind == "azure" else upstream.url
    told: dict[str, Any] = {"key": KEY, "dialect": dialect, **endpoint}
    async with OpenAICompatible(Endpoint(url, **told)) as gateway:
        yield gateway


async def said(gateway: OpenAICompatible, **call: Any) -> bytes:
    told: dict[str, Any] = {"body": {**BODY, "model": "fake"}, **call}
    async with gateway.stream(ModelCall(**told)) as reply:
        return b"\n".join([chunk.raw async for batch in reply for chunk in batch])


async def reached(upstream: Upstream, dialect: Dialect, **call: Any) -> Call:
    async with opened(upstream, dialect) as gateway:
        await said(gateway, **call)
    return upstream.calls[-1]


async def test_azure_is_asked_at_the_path_of_its_deployment(upstream: Upstream) -> None:
    """[33]"""
    called = await reached(upstream, Dialect("azure"), model="gpt-4o eu/1")
    assert called.path == "/openai/deployments/gpt-4o%20eu%2F1/chat/completions"


@pytest.mark.parametrize("dialect", [Dialect("azure"), Dialect("azure", auth="token")])
async def test_azure_embeds_at_the_path_of_its_deployment(upstream: Upstream, dialect: Dialect) -> None:
    async with opened(upstream, dialect) as gateway:
        assert b'"embedding"' in await gateway.embed({"model": "ada", "input": "hello"})
    assert upstream.calls[-1].path == "/openai/deployments/ada/embeddings"


def test_azure_is_told_the_version_that_a_deployment_names() -> None:
    assert Dialect("azure").path("models", "").endswith(f"?api-version={AZURE_VERSION}")
    assert Dialect("azure", "2025-01-01-preview").path("models", "").endswith("?api-version=2025-01-01-preview")


@pytest.mark.parametrize(
    ("dialect", "header"),
    [
        (Dialect("azure"), {"api-key": KEY}),
        (Dialect("azure", auth="token"), {"Authorization": f"Bearer {KEY}"}),
        (Dialect("openai"), {"Authorization": f"Bearer {KEY}"}),
        (Dialect("vllm"), {"Authorization": f"Bearer {KEY}"}),
    ],
)
def test_a_key_is_said_in_the_header_that_its_kind_reads(dialect: Dialect, header: dict[str, str]) -> None:
    assert dialect.key_headers(KEY) == header
    assert dialect.key_headers("") == {}


async def test_azures_filter_events_are_heard_and_passed_on(upstream: Upstream) -> None:
    """[30, 31]"""
    async with opened(upstream, Dialect("azure")) as gateway:
        heard = await said(gateway, model="fake?text=all of it")
    assert b"prompt_filter_results" in heard
    assert b"content_filter_offsets" in heard
    assert b"all " in heard


async def test_a_prompt_that_azure_filters_is_refused_with_what_it_found(upstream: Upstream) -> None:
    """[32]"""
    async with opened(upstream, Dialect("azure")) as gateway:
        with pytest.raises(RefusedError) as refused:
            await said(gateway, model="fake?prompt_filtered=true")
    error = refused.value
    assert (error.status, error.code, error.retriable) == (400, "content_filter", False)
    assert error.body is not None
    assert error.body.extra is not None
    assert "innererror" in error.body.extra


@pytest.mark.parametrize("kind", ["openai", "azure", "vllm", "openai-compatible"])
async def test_members_that_klatch_has_never_heard_of_reach_every_server(upstream: Upstream, kind: Any) -> None:
    """[45]"""
    called = await reached(upstream, Dialect(kind))
    assert (called.body["seed"], called.body["made_up"]) == (7, {"by": "the caller"})


async def test_vllm_is_asked_for_a_running_total_and_for_an_adapter_by_its_name(upstream: Upstream) -> None:
    """[27]"""
    called = await reached(upstream, Dialect("vllm"), model="support-lora")
    assert called.body["model"] == "support-lora"
    assert called.body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert "priority" not in called.body, "vLLM refuses it unless it schedules by priority"


async def test_vllm_is_told_the_priority_where_it_schedules_by_it(upstream: Upstream) -> None:
    called = await reached(upstream, Dialect("vllm", priority=True), priority=2)
    assert called.body["priority"] == 2


async def test_a_body_gives_itself_no_better_priority_than_its_tenant_has(upstream: Upstream) -> None:
    asked = {**BODY, "model": "fake", "priority": -9}
    called = await reached(upstream, Dialect("vllm", priority=True), body=asked, priority=5)
    assert called.body["priority"] == 5


@pytest.mark.parametrize(("kind", "name"), [("openai", "max_completion_tokens"), ("openai-compatible", "max_tokens")])
async def test_a_limit_on_tokens_goes_by_the_name_that_its_server_takes(
    upstream: Upstream, kind: Any, name: str
) -> None:
    """[46]"""
    called = await reached(upstream, Dialect(kind), body={**BODY, "model": "fake", "max_tokens": 3})
    assert {"max_tokens", "max_completion_tokens"} & called.body.keys() == {name}


async def test_a_key_is_asked_for_before_every_call_so_that_it_may_change(upstream: Upstream) -> None:
    keys, told = iter([KEY, "sk-stale-secret", KEY]), list[str]()

    async def next_key(refused: str = "") -> str:
        told.append(refused)
        return next(keys)

    async with opened(upstream, Dialect(), key="", key_of=next_key) as gateway:
        await said(gateway)
        with pytest.raises(RefusedError) as refused:
            await said(gateway)
        await said(gateway)
    assert told == ["", "", "sk-stale-secret"]
    assert "sk-stale-secret" not in f"{refused.value!r} {refused.value.body} {gateway!r}"


async def test_a_key_that_cannot_be_had_fails_the_call_before_it_is_made(upstream: Upstream) -> None:
    async def no_key(refused: str = "") -> str:  # noqa: ARG001 - there is none
        raise MisconfiguredError("mend the keys file")

    async with opened(upstream, Dialect(), key_of=no_key) as gateway:
        with pytest.raises(MisconfiguredError, match="mend the keys file"):
            await said(gateway)
    assert not upstream.calls
