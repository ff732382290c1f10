"""The stock clients, by base URL alone: they read every kind of reply, and meet every error as they expect it."""

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from klatch_schemas.errors import ERRORS
from klatch_schemas.events import ChatRequested, StreamError

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit, Teller

HI: Any = [{"role": "user", "content": "hi"}]


async def test_the_openai_client_streams_a_reply(kit: "Kit") -> None:
    stream = await kit.client().chat.completions.create(model="tiny", messages=HI, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello wörld"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.id for chunk in chunks} == {"chatcmpl-1"}
    assert all((chunk.model_extra or {})["vendor_extra"] == {"x": 1} for chunk in chunks)


async def test_the_openai_client_gets_a_whole_reply_with_usage(kit: "Kit") -> None:
    reply = await kit.client().chat.completions.create(model="tiny", messages=HI)
    assert reply.choices[0].message.content == "Hello wörld"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage
    assert reply.usage.total_tokens == 10


async def test_the_usage_chunk_comes_only_to_those_who_ask_trap_24_26(kit: "Kit") -> None:
    client = kit.client()
    plain = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
    assert all(chunk.choices for chunk in [chunk async for chunk in plain])
    asked = await client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    *_, before, last = [chunk async for chunk in asked]
    assert before.choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 3)
    assert last.id == "chatcmpl-1"


async def test_the_model_servers_own_usage_chunk_is_passed_on_unchanged_trap_28(kit: "Kit") -> None:
    theirs: dict[str, Any] = {
        "id": "u",
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": {"total_tokens": 5, "new": 1},
    }

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("a")
        await teller.end(trailer=(theirs,))

    kit.stages.script = script
    events = await (await kit.chat(stream_options={"include_usage": True})).events()
    assert events[-2].json == theirs
    assert events[-1].data == "[DONE]"


async def _two_calls(teller: "Teller") -> None:
    def call(index: int, **fields: Any) -> dict[str, Any]:
        return {"index": index, **fields}

    await teller.open()
    named = {"name": "weather", "arguments": ""}
    await teller.delta(role="assistant", content=None, tool_calls=[call(0, id="a", type="function", function=named)])
    await teller.delta(tool_calls=[call(1, id="b", type="function", function=named)])
    await teller.delta(tool_calls=[call(1, function={"arguments": '{"city":"\\ud83d'})])
    await teller.delta(tool_calls=[call(0, function={"arguments": '{"city":"Rome"}'})])
    await teller.delta(tool_calls=[call(1, function={"arguments": '\\ude00"}'})])
    await teller.delta(finish="tool_calls")
    await teller.end()


@pytest.mark.parametrize("streamed", [True, False])
async def test_interleaved_tool_calls_survive_trap_17(kit: "Kit", streamed: bool) -> None:
    kit.stages.script = _two_calls
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    completions = kit.client().chat.completions
    if streamed:
        async with completions.stream(model="tiny", messages=HI, tools=tools) as stream:
            reply: Any = await stream.get_final_completion()
    else:
        reply = await completions.create(model="tiny", messages=HI, tools=tools)
    calls = reply.choices[0].message.tool_calls
    assert [(call.id, json.loads(call.function.arguments)["city"]) for call in calls] == [("a", "Rome"), ("b", "😀")]
    assert reply.choices[0].finish_reason == "tool_calls"
    assert kit.said(ChatRequested, "chat.requests")[0].body["tools"] == tools


async def _two_choices(teller: "Teller") -> None:
    await teller.open()
    await teller.delta(1, content="b")
    await teller.delta(0, content="a")
    await teller.delta(1, finish="length")
    await teller.delta(0, content="A", logprobs=None)
    await teller.delta(0, finish="stop")
    await teller.end()


async def test_two_choices_keep_their_texts_and_their_finishes_trap_16(kit: "Kit") -> None:
    kit.stages.script = _two_choices
    reply = await kit.client().chat.completions.create(model="tiny", messages=HI, n=2)
    told = [(choice.index, choice.message.content, choice.finish_reason) for choice in reply.choices]
    assert told == [(0, "aA", "stop"), (1, "b", "length")]


async def test_refusal_reasoning_and_logprobs_survive_trap_19_20(kit: "Kit") -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]}
    choice = {"index": 0, "delta": {"refusal": "No", "reasoning_content": "hm"}, "finish_reason": None}
    said = json.dumps({"id": "x", "choices": [{**choice, "logprobs": logprobs}], "model": "tiny"})

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.raw(said.encode(), said.encode())
        await teller.delta(finish="stop")
        await teller.end()

    kit.stages.script = script
    reply = await kit.client().chat.completions.create(model="tiny", messages=HI, logprobs=True)
    message = reply.choices[0].message
    assert (message.refusal, message.content) == ("NoNo", None)
    assert (message.model_extra or {})["reasoning_content"] == "hmhm"
    assert reply.choices[0].logprobs
    assert len(reply.choices[0].logprobs.content or ()) == 2
    assert (await (await kit.chat()).events())[0].data == said


async def test_langchain_streams_and_invokes_by_base_url_alone(kit: "Kit") -> None:
    key = SecretStr("key-of-acme")
    model = ChatOpenAI(model="tiny", base_url=kit.url, api_key=key, max_retries=0, stream_usage=True)
    reply = await model.ainvoke("hi")
    assert reply.content == "Hello wörld"
    parts = [part async for part in model.astream("hi")]
    assert "".join(str(part.content) for part in parts) == "Hello wörld"
    usages = [part.usage_metadata for part in parts if part.usage_metadata]
    assert [usage["total_tokens"] for usage in usages] == [10]


async def test_klatchs_fields_travel_in_extra_body_and_the_rest_is_passed_on_unchanged_trap_45(kit: "Kit") -> None:
    ours = {
        "conversation": "c-1",
        "person": "ann",
        "use_case": "support",
        "prompt": {"name": "greeting", "variables": {"a": 1}},
        "priority": 1,
        "timeout_ms": 60_000,
        "context": {"locale": "de"},
    }
    body = {"seed": 4, "logit_bias": {"1": 2}, "unheard_of": {"deep": [1, None]}, "klatch": ours}
    await kit.client().chat.completions.create(model="tiny", messages=HI, extra_body=body)
    asked: ChatRequested = kit.said(ChatRequested, "chat.requests")[0]
    assert asked.body == {"model": "tiny", "messages": HI, **{k: v for k, v in body.items() if k != "klatch"}}
    assert (asked.tenant, asked.conversation, asked.person, asked.use_case) == ("acme", "c-1", "ann", "support")
    assert (asked.memory.recent, asked.memory.store, asked.memory.recall) == (20, True, 4)
    assert asked.deadline_ms
    assert asked.prompt
    assert asked.prompt.name == "greeting"


async def test_a_request_without_conversation_is_one_of_its_own_and_remembers_nothing(kit: "Kit") -> None:
    await kit.client().chat.completions.create(model="tiny", messages=HI)
    asked: ChatRequested = kit.said(ChatRequested, "chat.requests")[0]
    assert str(asked.conversation) == asked.request
    assert (asked.memory.recent, asked.memory.recall, asked.memory.store) == (0, 0, False)


@pytest.mark.parametrize(
    ("status", "code", "error", "http"),
    [
        ("rejected", "rate_limit_exceeded", openai.RateLimitError, 429),
        ("blocked", "content_filter", openai.BadRequestError, 400),
        ("expired", "deadline_exceeded", openai.InternalServerError, 504),
        ("failed", "model_error", openai.InternalServerError, 502),
        ("failed", "invalid_request", openai.BadRequestError, 400),
        ("cancelled", "cancelled", openai.ConflictError, 409),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_end_before_the_first_token_is_a_status_trap_9(
    kit: "Kit", status: Any, code: str, error: type[openai.APIStatusError], http: int, streamed: bool
) -> None:
    async def script(teller: "Teller") -> None:
        why = StreamError(code=code, message="because", retry_after_ms=1500, limit="tokens_per_minute")
        await teller.end(status, why)

    kit.stages.script = script
    with pytest.raises(error) as raised:
        await kit.client().chat.completions.create(model="tiny", messages=HI, stream=streamed)
    assert raised.value.status_code == http
    assert raised.value.code == code
    assert raised.value.type == ERRORS[code].type
    assert raised.value.response.headers["retry-after"] == "2"
    assert raised.value.request_id == kit.stages.tellers[0].asked.request
    assert raised.value.response.headers["x-should-retry"] == str(ERRORS[code].retriable).lower()
    if http == 429:
        assert raised.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
        assert raised.value.response.headers["x-ratelimit-reset-tokens"] == "1500ms"


@pytest.mark.parametrize("wait_ms", [None, 43_200_000])
async def test_a_client_does_not_come_again_by_itself_where_there_is_no_room_for_long(
    kit: "Kit", wait_ms: int | None
) -> None:
    async def script(teller: "Teller") -> None:
        await teller.end("rejected", StreamError(code="rate_limit_exceeded", message="full", retry_after_ms=wait_ms))

    kit.stages.script = script
    with pytest.raises(openai.RateLimitError) as raised:
        await kit.client(max_retries=2).chat.completions.create(model="tiny", messages=HI)
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert len(kit.stages.tellers) == 1


async def test_a_refused_client_retries_by_itself_when_it_is_told_so(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        if len(kit.stages.tellers) == 1:
            await teller.end("rejected", StreamError(code="rate_limit_exceeded", message="slow", retry_after_ms=1))
        else:
            await teller.open()
            await teller.say("now")
            await teller.end()

    kit.stages.script = script
    reply = await kit.client(max_retries=1).chat.completions.create(model="tiny", messages=HI)
    assert reply.choices[0].message.content == "now"
    assert len(kit.stages.tellers) == 2


async def test_the_model_servers_own_error_passes_through_trap_9_34(kit: "Kit") -> None:
    theirs = {"message": "too long", "type": "invalid_request_error", "param": "messages", "code": 4711}

    async def script(teller: "Teller") -> None:
        await teller.end("failed", StreamError(code="model_error", message="the model server failed", upstream=theirs))

    kit.stages.script = script
    answer = await kit.chat()
    error = (await answer.json())["error"]
    assert answer.status == 502
    assert {name: error[name] for name in theirs} == theirs
    assert error["klatch"]["code"] == "model_error"


async def test_an_error_after_text_ends_the_stream_without_done_trap_34(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("half")
        await teller.end("failed", StreamError(code="model_error", message="it died"))

    kit.stages.script = script
    stream = await kit.client().chat.completions.create(model="tiny", messages=HI, stream=True)
    heard: list[str] = []
    with pytest.raises(openai.APIError, match="it died"):
        heard.extend([chunk.choices[0].delta.content or "" async for chunk in stream])
    events = await (await kit.chat()).events()
    assert [event.data for event in events].count("[DONE]") == 0
    assert events[-1].json["error"]["code"] == "model_error"


async def test_an_empty_reply_is_a_stream_that_is_done(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.end()

    kit.stages.script = script
    answer = await kit.chat()
    assert answer.status == 200
    assert [event.data for event in await answer.events()] == ["[DONE]"]
