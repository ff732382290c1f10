"""klatch before a real vLLM: what the gateway relies on, and one request through everything. On demand: `make vllm`.

The model is random, so nothing is said of what it says, only of how it is said, counted, continued and stopped.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from openai import AsyncOpenAI

from klatch_agents.gateway.errors import RefusedError
from klatch_agents.gateway.openai_compatible import OpenAICompatible
from klatch_agents.gateway.port import Chunk, Finished, ModelCall
from klatch_schemas.events import Deployment, ModelRouted
from klatch_schemas.topics import MODELS, Namespace
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_streams.ledger import publish
from klatch_workers import leash

if TYPE_CHECKING:
    from tests.vllm.conftest import Vllm

pytestmark = [pytest.mark.timeout(1_200), pytest.mark.asyncio(loop_scope="session")]

USER = {"role": "user", "content": "Say what comes to your mind."}
MODEL, ADAPTED = "tiny", "adapted"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["celsius", "fahrenheit"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["unit", "days"],
            "additionalProperties": False,
        },
    },
}


def call(model: str = MODEL, prefix: str = "", **body: object) -> ModelCall:
    """A greedy call of sixteen tokens, unless it says otherwise."""
    fixed = {"model": model, "messages": [USER], "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    return ModelCall({**fixed, **body}, prefix=prefix)


async def hear(gateway: OpenAICompatible, asked: ModelCall) -> tuple[list[Chunk], Finished]:
    async with gateway.stream(asked) as reply:
        chunks = [chunk async for batch in reply for chunk in batch]
        assert reply.finished
        return chunks, reply.finished


def text(chunks: Sequence[Chunk]) -> str:
    said = [choice["delta"].get("content") for chunk in chunks for choice in json.loads(chunk.raw)["choices"]]
    return "".join(one for one in said if one)


async def test_a_reply_streams_and_its_tokens_are_counted_once(gateway: OpenAICompatible) -> None:
    chunks, finished = await hear(gateway, call())
    assert sum(chunk.speaks for chunk in chunks) > 1  # vLLM puts tokens together while its client is slow
    assert finished.usage
    assert finished.usage.completion_tokens == 16
    assert finished.finish_reasons == {0: "length"}
    assert finished.ending == "done"
    assert [chunk.usage_only for chunk in chunks].count(True) == 1


async def test_what_was_said_is_counted_wherever_a_reply_is_cut(gateway: OpenAICompatible) -> None:
    async with gateway.stream(call(max_tokens=1_000)) as reply:
        heard = list[Chunk]()
        async for batch in reply:
            heard += batch
            if sum(chunk.speaks for chunk in heard) >= 3:
                break
    counted = [chunk.usage.completion_tokens for chunk in heard if chunk.usage]
    assert counted
    assert 3 <= counted[-1] < 1_000


async def test_a_lora_adapter_is_a_model_of_its_own(gateway: OpenAICompatible) -> None:
    assert {MODEL, ADAPTED} <= set(await gateway.models())
    (plain, _), (again, _), (adapted, _) = [await hear(gateway, call(name)) for name in (MODEL, MODEL, ADAPTED)]
    assert text(plain) == text(again)
    assert text(plain) != text(adapted)


async def test_a_strict_tool_is_called_as_its_schema_says(gateway: OpenAICompatible) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    asked = call(tools=[WEATHER], tool_choice=named, max_tokens=200, ignore_eos=False)
    chunks, finished = await hear(gateway, asked)
    fragments = [
        fragment["function"]
        for chunk in chunks
        for choice in json.loads(chunk.raw)["choices"]
        for fragment in choice["delta"].get("tool_calls") or ()
    ]
    assert next(one["name"] for one in fragments if one.get("name")) == "weather"
    arguments = json.loads("".join(one.get("arguments") or "" for one in fragments))
    assert arguments["unit"] in {"celsius", "fahrenheit"}
    assert arguments["days"] in {1, 2, 3}
    assert finished.finish_reasons == {0: "tool_calls"}  # vLLM says `stop` of a named tool; the gateway puts it right


async def test_whoever_leaves_frees_the_only_place(gateway: OpenAICompatible, vllm: "Vllm") -> None:
    async with gateway.stream(call(max_tokens=1_900)) as reply:
        async for _ in reply:
            assert await vllm.running() == 1
            break
    async with asyncio.timeout(30):
        _, finished = await hear(gateway, call())
    assert finished.finish_reasons == {0: "length"}
    assert await vllm.running() == 0


async def test_a_partial_answer_is_continued_and_not_answered(gateway: OpenAICompatible, vllm: "Vllm") -> None:
    prefix = "The quick brown fox"
    _, finished = await hear(gateway, call(prefix=prefix))
    partial = [USER, {"role": "assistant", "content": prefix}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    continued, answered = await vllm.prompt(partial, **options), await vllm.prompt(partial)
    assert finished.usage
    assert finished.usage.prompt_tokens == len(continued)
    assert len(continued) < len(answered)


async def test_an_unknown_model_is_refused_in_the_servers_words(gateway: OpenAICompatible) -> None:
    with pytest.raises(RefusedError, match="nobody") as refused:
        await hear(gateway, call("nobody"))
    assert refused.value.status == 404


async def test_an_adapter_answers_through_the_whole_stack(vllm: "Vllm", unused_port: int, tmp_path: Path) -> None:
    """Kafka, all stages and the HTTP door, with a route to the adapter in the models ledger."""
    argv = [sys.executable, "-m", "klatch_workers", "up", "--data", str(tmp_path / "data"), "--json"]
    address = f"127.0.0.1:{unused_port}"
    with (tmp_path / "up.log").open("wb") as log:
        up = await leash.spawn([*argv, "--http", address, "--model-url", vllm.url], stdout=PIPE, stderr=log)
    try:
        assert up.stdout
        line = await asyncio.wait_for(up.stdout.readline(), 120)
        assert line, (tmp_path / "up.log").read_text()
        facts = json.loads(line)
        await _route(facts, vllm.url)
        async with AsyncOpenAI(base_url=f"{facts['http']}/v1", api_key=facts["api_key"], max_retries=0) as client:
            await _answers(client)
    finally:
        up.terminate()
        await up.communicate()
    assert up.returncode == 0


async def _route(facts: dict[str, str], url: str) -> None:
    deployment = Deployment(name="lora-1", kind="vllm", url=url, model=ADAPTED)
    log = await KafkaLog.open(KafkaOptions(facts["bootstrap"]))
    try:
        route = ModelRouted(alias="writer", deployments=(deployment,))
        await publish(log, MODELS, "writer", route, Namespace.named(facts["namespace"]))
    finally:
        await log.close()


async def _answers(client: AsyncOpenAI) -> None:
    async with asyncio.timeout(10):
        while "writer" not in [model.id async for model in client.models.list()]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # the ledger is followed, and tells nobody
    stream = await client.chat.completions.create(
        model="writer",
        messages=[{"role": "user", "content": "Say what comes to your mind."}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=16,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 16
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
