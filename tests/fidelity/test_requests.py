"""What goes up to the model server, and how: [45] to [48]."""

from typing import TYPE_CHECKING, Any

import pytest
from tests.fidelity.conftest import finishes, said_in, text_of
from tests.fidelity.wire import finish, role, sends, usage_chunk, whole, words

from klatch_schemas.events import ChatAdmitted

if TYPE_CHECKING:
    from tests.fidelity.conftest import Stack

UNKNOWN: dict[str, Any] = {
    "seed": 7,
    "logit_bias": {"50256": -100},
    "parallel_tool_calls": False,
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "minimal",
    "vendor": {"deep": [1.5, None, 2**60, "\U0001f600", "\ud83d"]},
    "temperature": 0,
    "store": True,
}


async def test_fields_that_klatch_does_not_know_reach_the_model_server(stack: "Stack") -> None:
    """[45] As they were; only `klatch` stays here, and what streaming needs is set."""
    model = stack.model(sends(whole("a")))
    answer = await stack.door.chat(model=model, klatch={"use_case": "test"}, **UNKNOWN)
    await answer.body()
    body = (await stack.wire.talk(model)).body
    sent = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True, **UNKNOWN}
    assert body == {**sent, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("fields", "completion"),
    [
        ({"max_tokens": 300}, 300),
        ({"max_completion_tokens": 500}, 500),
        ({"max_completion_tokens": 500, "max_tokens": 300}, 500),
        ({"max_completion_tokens": 500, "n": 3}, 1500),
    ],
)
async def test_a_reservation_reads_both_names_of_the_limit_and_n(
    stack: "Stack", fields: dict[str, Any], completion: int
) -> None:
    """[46] And each goes up under the name that the client gave it."""
    model = stack.model(sends(role() + words("a") + finish()))
    answer = await stack.door.chat(model=model, **fields)
    await answer.body()
    admitted = await stack.told(answer, ChatAdmitted)
    assert completion <= admitted.reservation.tokens <= completion + 100
    assert fields.items() <= (await stack.wire.talk(model)).body.items()


@pytest.mark.parametrize(
    ("kind", "name"), [("openai", "max_completion_tokens"), ("azure", "max_tokens"), ("vllm", "max_tokens")]
)
async def test_only_openai_itself_is_told_the_newer_name_of_the_limit(stack: "Stack", kind: str, name: str) -> None:
    """[46] Its reasoning models refuse the older one; others may not know the newer one."""
    model = stack.model(whole("a"), kind=kind)
    await (await stack.door.chat(model=model, max_tokens=300)).body()
    body = (await stack.wire.talk(model)).body
    assert {limit: body[limit] for limit in ("max_tokens", "max_completion_tokens") if limit in body} == {name: 300}


async def test_a_stream_that_is_asked_for_again_is_replayed_with_all_its_parts(stack: "Stack") -> None:
    """[47] Klatch has no cache of replies: this is what comes nearest to one. An `Idempotency-Key` or the stream's
    own address give the same events, from the role to the marker, without another call of the model."""
    model = stack.model(sends(whole("once ", "only")))
    asked: dict[str, Any] = {"model": model, "stream_options": {"include_usage": True}}
    key = {"idempotency-key": "again-and-again"}
    first = await (await stack.door.chat(headers=key, **asked)).events()
    again = await stack.door.chat(headers=key, **asked)
    elsewhere = await stack.impatient.call("GET", f"/v1/streams/{again.headers['x-request-id']}?include_usage=true")
    assert await again.events() == first
    assert await elsewhere.events() == first
    assert (text_of(first), finishes(first)) == ("once only", [(0, "stop")])
    assert said_in(first)[-1] == {**usage_chunk(), "klatch": {"deployment": model}}
    assert len(stack.wire.talks[model]) == 1


async def test_a_large_prompt_passes_whole(stack: "Stack") -> None:
    """[48] That it holds up no stream beside it at the door is in `tests/workers/http/test_http_large.py`."""
    large = "wörter und worte " * 22_000
    model = stack.model(sends(whole("read")))
    answer = await stack.door.chat(model=model, messages=[{"role": "user", "content": large}])
    assert text_of(await answer.events()) == "read"
    assert (await stack.wire.talk(model)).body["messages"][0]["content"] == large
