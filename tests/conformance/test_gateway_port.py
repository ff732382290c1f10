"""What every gateway does with every server, whichever it is: the scripted upstream, which is
exact, in every dialect and behind the router, and the small local model, which is real. Numbers in
brackets are traps of `STREAMING.md`."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from klatch_agents.gateway.dialect import Dialect
from klatch_agents.gateway.errors import RefusedError
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import Catalogue, Chunk, Finished, Gateway, ModelCall, Timeouts
from klatch_agents.gateway.router import Router
from klatch_agents.testing.upstream import Upstream
from klatch_schemas.events import Deployment, ModelRouted, RouteTimeouts

KEY = "sk-conformance"
TIMEOUTS = Timeouts(connect=60, first_token=120, idle=60)
LONG = 16_000
"""Tokens of a reply that nobody waits for."""


SCRIPTED: dict[str, Dialect] = {
    "openai-compatible": Dialect(),
    "openai": Dialect("openai"),
    "azure by key": Dialect("azure"),
    "azure by token": Dialect("azure", auth="token"),
    "vllm": Dialect("vllm", priority=True),
}
"""The scripted upstream, spoken to in each dialect."""


@dataclass(frozen=True)
class Server:
    """A model server to call, and the name of a model that it lists."""

    url: str
    model: str
    dialect: Dialect = Dialect()
    routed: bool = False

    def opened(self, key: str = KEY) -> "OpenAICompatible | Router":
        """A gateway to it."""

        def adapter(_: Deployment | None = None) -> OpenAICompatible:
            return OpenAICompatible(
                Endpoint(self.url, key=key, model=self.model, continues="prefill", dialect=self.dialect)
            )

        if not self.routed:
            return adapter()
        one = Deployment(name="one", url=self.url, model=self.model, concurrency=4, continues="prefill")
        route = ModelRouted(alias="*", deployments=(one,), timeouts=RouteTimeouts(first_token_s=120))
        return Router(NoRoutes(), adapter, default=route)


class NoRoutes:
    """A ledger without routes."""

    def find(self, alias: str) -> None:  # noqa: ARG002 - there is none
        return None

    def aliases(self) -> list[str]:
        return []

    async def changed(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture(scope="session", params=[*SCRIPTED, "routed", "local model"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    if request.param != "local model":
        async with Upstream(key=KEY) as upstream:
            upstream.models = ["fake?tokens=20000&rate=200&first_delay=0.2"]
            dialect = SCRIPTED.get(request.param, Dialect())
            url = upstream.url.removesuffix("/v1") if dialect.kind == "azure" else upstream.url
            yield Server(url, upstream.models[0], dialect, routed=request.param == "routed")
        return
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "klatch_workers.local_model", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "KLATCH_LOCAL_API_KEY": KEY},
    )
    assert process.stdout is not None
    try:
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 120))
        yield Server(ready["url"], ready["model"])
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0, "it ends cleanly on SIGTERM"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def gateway(server: Server) -> AsyncIterator[Gateway]:
    async with server.opened() as opened:
        yield opened


def call(max_tokens: int = 12) -> ModelCall:
    messages = [{"role": "user", "content": "Count from one to fifty, in words."}]
    return ModelCall({"model": "asked-for", "messages": messages, "max_tokens": max_tokens}, timeouts=TIMEOUTS)


async def hear(gateway: Gateway, call: ModelCall) -> tuple[list[Chunk], Finished]:
    chunks: list[Chunk] = []
    async with gateway.stream(call) as reply:
        async for batch in reply:
            assert batch
            chunks += batch
        assert reply.finished is not None
        return chunks, reply.finished


async def test_a_reply_has_text_a_finish_reason_and_a_usage(gateway: Gateway) -> None:
    """[13, 14, 24]"""
    chunks, finished = await hear(gateway, call())
    assert any(chunk.speaks for chunk in chunks)
    assert all(isinstance(json.loads(chunk.raw), dict) for chunk in chunks)
    assert finished.finish_reasons[0] in ("stop", "length")
    assert finished.ending == "done"
    assert finished.usage is not None
    assert 0 < finished.usage.completion_tokens <= 12
    assert finished.usage.prompt_tokens > 0
    assert [chunk.usage_only for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_a_limit_on_tokens_ends_the_reply_with_length(gateway: Gateway) -> None:
    _, finished = await hear(gateway, call(max_tokens=3))
    assert finished.finish_reasons == {0: "length"}
    assert finished.usage is not None
    assert finished.usage.completion_tokens == 3


async def test_the_first_token_does_not_wait_for_the_last(gateway: Gateway) -> None:
    """[11] Nor any of the first for one much later; of a reply so long that no pause lets all of it come at once."""
    async with gateway.stream(call(max_tokens=LONG)) as reply:
        batches = aiter(reply)
        few = [len(await anext(batches)) for _ in range(6)]
        assert reply.finished is None
    assert min(few) < 10


async def test_a_reply_goes_on_behind_its_prefix_and_does_not_repeat_it(gateway: Gateway) -> None:
    """[38]"""
    begun = "The quick brown fox jumps over a lazy dog and "
    assert gateway.continues(call())
    chunks, finished = await hear(gateway, replace(call(max_tokens=4), prefix=begun))
    said = [choice.get("delta", {}).get("content") for chunk in chunks for choice in json.loads(chunk.raw)["choices"]]
    assert finished.finish_reasons
    assert "".join(text for text in said if text)
    assert "quick brown fox" not in "".join(text for text in said if text)


async def test_readers_who_leave_free_their_places_at_the_server(gateway: Gateway) -> None:
    """[40, 43] The local model has four places: a fifth call would wait for a place that leaks."""
    for _ in range(6):
        async with gateway.stream(call(max_tokens=2000)) as reply:
            async for _batch in reply:
                break
    async with asyncio.timeout(30):
        _, finished = await hear(gateway, call(max_tokens=3))
    assert finished.finish_reasons


async def test_a_call_cancelled_before_its_first_token_ends_at_once(gateway: Gateway) -> None:
    """[40]"""
    task = asyncio.create_task(hear(gateway, call(max_tokens=LONG)))
    await asyncio.sleep(0.02)  # under way, and no server here says its first token so soon
    task.cancel()
    started = asyncio.get_running_loop().time()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.get_running_loop().time() - started < 30, "the scripted reply takes more than a minute"


async def test_replies_at_once_all_come_to_their_ends(gateway: Gateway) -> None:
    replies = await asyncio.gather(*(hear(gateway, call(max_tokens=4)) for _ in range(4)))
    assert [finished.finish_reasons for _, finished in replies] == [{0: "length"}] * 4


async def test_a_wrong_key_is_refused_and_not_shown(server: Server) -> None:
    async with server.opened(key="sk-wrong-key-5") as gateway:
        with pytest.raises(RefusedError) as refused:
            await hear(gateway, call())
    assert refused.value.status == 401
    assert not refused.value.retriable
    assert "sk-wrong-key-5" not in f"{refused.value!r} {refused.value.body} {gateway!r}"


async def test_the_served_model_is_listed(gateway: Catalogue, server: Server) -> None:
    assert server.model in await gateway.models()
