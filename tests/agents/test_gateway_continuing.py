"""A broken-off answer is continued: what each kind of server is asked, and what the scripted one answers."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from klatch_agents.gateway.continuing import Continues, continuing_body
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import ModelCall
from klatch_agents.testing.upstream import Upstream
from klatch_agents.testing.upstream.answer import said_already

USER = {"role": "user", "content": "go"}
BEGUN = {"role": "assistant", "content": "Once"}
WORDS = ["The ", "quick ", "brown "]


def asked(how: Continues, *messages: object, **members: object) -> dict[str, object]:
    return continuing_body({"model": "m", "messages": list(messages), **members}, " upon", how)


def test_vllm_is_told_to_continue_the_final_message() -> None:
    assert asked("vllm", USER, seed=7) == {
        "model": "m",
        "seed": 7,
        "messages": [USER, {"role": "assistant", "content": " upon"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_a_prefilling_server_takes_the_final_assistant_message_for_the_beginning() -> None:
    assert asked("prefill", USER) == {
        "model": "m",
        "messages": [USER, {"role": "assistant", "content": " upon"}],
    }


@pytest.mark.parametrize("how", ["vllm", "prefill"])
def test_a_beginning_that_the_caller_gave_is_one_message_with_it(how: Continues) -> None:
    flags = {"continue_final_message": True} if how == "vllm" else {}
    body = asked(how, USER, BEGUN, **flags)
    assert body["messages"] == [USER, {"role": "assistant", "content": "Once upon"}]


def test_a_final_message_of_the_assistant_that_vllm_was_not_to_continue_stays_a_turn_of_its_own() -> None:
    assert asked("vllm", USER, BEGUN)["messages"] == [USER, BEGUN, {"role": "assistant", "content": " upon"}]


def test_the_bodys_own_messages_are_left_alone() -> None:
    body: dict[str, object] = {"messages": [USER]}
    continuing_body(body, "a", "vllm")
    assert body == {"messages": [USER]}


def test_a_server_that_does_not_continue_is_never_asked_to() -> None:
    with pytest.raises(ValueError, match="partial answer"):
        asked("none", USER)


@pytest.mark.parametrize(
    ("tokens", "partial", "said"),
    [
        (["<<c2:0>>", "<<c2:1>>"], "<<c1:0>>", 1),
        (["<<c2:0>>", "<<c2:1>>"], "<<c0:0>><<c1:1>>", 2),
        (["<<c2.1:0>>", "<<c2.1:1>>"], "<<c1.1:0>>", 1),
        (WORDS, "", 0),
        (WORDS, "The ", 1),
        (WORDS, "The quick brown ", 3),
        (WORDS, "The qui", 0),
        (WORDS, "A quick ", 0),
    ],
)
def test_the_scripted_server_knows_what_was_said_already(tokens: list[str], partial: str, said: int) -> None:
    assert said_already(tokens, partial) == said


@pytest.fixture(params=["vllm", "prefill"])
async def gateway(request: pytest.FixtureRequest, upstream: Upstream) -> AsyncIterator[OpenAICompatible]:
    async with OpenAICompatible(Endpoint(upstream.url, continues=request.param)) as opened:
        yield opened


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as serving:
        yield serving


async def test_a_continued_reply_holds_only_what_follows(gateway: OpenAICompatible, upstream: Upstream) -> None:
    first = ModelCall({"model": "fake?reply=unique&tokens=4", "messages": [USER]})
    begun = (await texts(gateway, first))[:2]
    rest = await texts(gateway, ModelCall(first.body, prefix="".join(begun)))
    assert [*begun, *rest] == ["<<c0:0>>", "<<c0:1>>", "<<c1:2>>", "<<c1:3>>"]
    messages = cast("Sequence[object]", upstream.calls[1].body["messages"])
    assert messages[-1] == {"role": "assistant", "content": "<<c0:0>><<c0:1>>"}


async def test_an_endpoint_continues_if_somebody_said_how(gateway: OpenAICompatible, upstream: Upstream) -> None:
    call = ModelCall({"messages": [USER]})
    assert gateway.continues(call)
    async with OpenAICompatible(Endpoint(upstream.url)) as unknown:
        assert not unknown.continues(call)


async def texts(gateway: OpenAICompatible, call: ModelCall) -> list[str]:
    async with gateway.stream(call) as reply:
        chunks = [json.loads(chunk.raw) async for batch in reply for chunk in batch]
    said = [choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"]]
    return [text for text in said if text]
