"""The scripted upstream is an OpenAI-compatible server: the stock `openai` client can tell.

What it records is what other tests trust, so the record is tested here too.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from functools import partial

import aiohttp
import pytest
from openai import APIError, APIStatusError, AsyncOpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from klatch_agents.testing.upstream import Script, Upstream
from klatch_agents.testing.upstream.answer import Answer

USER: ChatCompletionUserMessageParam = {"role": "user", "content": "Grüezi, wie goht's?"}


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(key="k") as server:
        yield server


@pytest.fixture
async def client(upstream: Upstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=upstream.url, api_key="k", max_retries=0) as opened:
        yield opened


async def test_the_openai_client_streams_from_it(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="fake?reply=echo-user&split=5&newline=crlf", messages=[USER], stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == USER["content"]


async def test_what_is_held_breaks_off_when_it_is_released_and_later_calls_of_its_user_are_not_held(
    upstream: Upstream, client: AsyncOpenAI
) -> None:
    def is_at(outcome: str) -> bool:
        return upstream.calls[-1].outcome == outcome

    for wanted in ("open", "fault"):
        stream = await client.chat.completions.create(
            model="fake?tokens=2&fault=no-finish&fault_after=2&held=1", messages=[USER], stream=True, user="ann"
        )
        chunks = [await anext(stream) for _ in range(3)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The quick "
        await upstream.changed(partial(is_at, wanted))
        upstream.release("bob")
        assert is_at(wanted)
        upstream.release("ann")
        assert [chunk async for chunk in stream] == []
        assert is_at("fault")


async def test_the_openai_client_folds_tool_calls_of_it(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="fake?tool_calls=2", messages=[USER]) as stream:
        streamed = (await stream.get_final_completion()).choices[0]
    whole = (await client.chat.completions.create(model="fake?tool_calls=2", messages=[USER])).choices[0]
    for choice in (streamed, whole):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        functions = [getattr(call, "function", None) for call in choice.message.tool_calls]
        arguments = [json.loads(function.arguments) for function in functions if function]
        assert [a["city"] for a in arguments] == ["Zürich", "Zürich"]


async def test_a_whole_answer_says_what_the_stream_says(client: AsyncOpenAI) -> None:
    for model in ("fake?tokens=7", "fake?refusal=true", "fake?reasoning=2&tokens=3"):
        whole = await client.chat.completions.create(model=model, messages=[USER], n=2)
        stream = await client.chat.completions.create(
            model=model, messages=[USER], n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert whole.usage == chunks[-1].usage
        for choice in whole.choices:
            deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert "".join(d.content or "" for d in deltas) == (choice.message.content or "")
            assert "".join(d.refusal or "" for d in deltas) == (choice.message.refusal or "")


async def test_usage_comes_only_to_those_who_ask(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="fake", messages=[USER], stream=True)
    assert [chunk.usage async for chunk in stream if chunk.usage or not chunk.choices] == []


async def test_every_call_of_the_unique_reply_says_something_else(client: AsyncOpenAI) -> None:
    texts = {
        (await client.chat.completions.create(model="fake?reply=unique&tokens=2", messages=[USER]))
        .choices[0]
        .message.content
        for _ in range(3)
    }
    assert texts == {"<<c0:0>><<c0:1>>", "<<c1:0>><<c1:1>>", "<<c2:0>><<c2:1>>"}


@pytest.mark.parametrize(
    ("reply", "said"),
    [("echo-user", "two"), ("echo-system", "be brief"), ("echo-messages", '[{"role": "system"')],
)
async def test_an_echo_shows_what_reached_the_model(client: AsyncOpenAI, reply: str, said: str) -> None:
    answer = await client.chat.completions.create(
        model=f"fake?reply={reply}",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "user", "content": "two"},
        ],
    )
    assert (answer.choices[0].message.content or "").startswith(said)


async def test_the_openai_client_sees_its_refusals_and_its_error_events(client: AsyncOpenAI) -> None:
    with pytest.raises(APIStatusError) as refused:
        await client.chat.completions.create(model="fake?status=429&retry_after=3", messages=[USER])
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (429, "3")
    stream = await client.chat.completions.create(model="fake?fault=error-event", messages=[USER], stream=True)
    with pytest.raises(APIError, match="the engine died"):
        _ = [chunk async for chunk in stream]


async def test_a_misspelt_script_is_a_400_that_names_it(client: AsyncOpenAI) -> None:
    with pytest.raises(APIStatusError, match="tokns"):
        await client.chat.completions.create(model="fake?tokns=3", messages=[USER])


async def test_embeddings_are_the_same_for_the_same_text_in_floats_and_base64(client: AsyncOpenAI) -> None:
    floats = await client.embeddings.create(model="fake", input=["a", "b", "a"], encoding_format="float")
    packed = await client.embeddings.create(model="fake", input=["a", "b", "a"])
    for answer in (floats, packed):
        a, b, again = (item.embedding for item in answer.data)
        assert a == again != b
        assert sum(x * x for x in a) == pytest.approx(1)
    assert packed.data[0].embedding == pytest.approx(floats.data[0].embedding)


async def test_a_reply_keeps_its_pace(client: AsyncOpenAI, upstream: Upstream) -> None:
    stream = await client.chat.completions.create(model="fake?tokens=11&rate=50", messages=[USER], stream=True)
    times = [time.time() async for chunk in stream if chunk.choices[0].delta.content]
    early = [number for number, at in enumerate(times) if at < upstream.calls[0].started + number / 50]
    assert (len(times), early) == (11, []), "no token comes before it is due"


def test_every_token_is_due_at_its_time() -> None:
    """So that none is late but by as much as the machine is."""
    answer = Answer("c0", "fake", {"stream": True}, Script(tokens=11, rate=50, first_delay=0.5))
    opening, *tokens, closing = [frame.due for frame in answer.frames()]
    assert tokens == [0.5 + number / 50 for number in range(11)]
    assert (opening, closing) == (0.5, tokens[-1])


async def test_the_record_tells_a_client_who_left_from_one_who_stayed(client: AsyncOpenAI, upstream: Upstream) -> None:
    await client.chat.completions.create(model="fake", messages=[USER])
    stream = await client.chat.completions.create(model="fake?tokens=1000&rate=100", messages=[USER], stream=True)
    await anext(aiter(stream))
    await stream.close()
    await upstream.changed(lambda: upstream.calls[-1].outcome != "open")
    stayed, left = upstream.calls
    assert (stayed.outcome, left.outcome) == ("finished", "left")
    assert left.ended >= left.started > 0
    assert left.frames_sent < 1000
    assert "authorization" not in left.headers


async def test_a_reader_who_does_not_read_holds_the_writer_back(upstream: Upstream) -> None:
    """[42] of `STREAMING.md`, seen from the other side."""
    async with aiohttp.ClientSession(read_bufsize=2**10, headers={"Authorization": "Bearer k"}) as session:
        body: dict[str, object] = {"model": "fake?tokens=100000&reply=unique", "messages": [], "stream": True}
        async with session.post(f"{upstream.url}/chat/completions", json=body) as response:
            await response.content.readany()
            sent = upstream.calls[-1].frames_sent
            assert 0 < sent < 100_000
            assert upstream.calls[-1].outcome == "open"


async def test_as_a_process_it_says_where_it_is_shows_its_calls_and_ends_on_sigterm() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "klatch_agents.testing.upstream", "--port", "0", "--json"),
        stdout=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    try:
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
        assert ready["event"] == "ready"
        async with AsyncOpenAI(base_url=ready["url"], api_key="any") as client, aiohttp.ClientSession() as http:
            await client.chat.completions.create(model="fake", messages=[USER], seed=7)
            root = ready["url"].removesuffix("/v1")
            async with http.get(f"{root}/calls") as answer:
                (call,) = await answer.json()
            assert (call["outcome"], call["body"]["seed"]) == ("finished", 7)
            async with http.delete(f"{root}/calls"), http.get(f"{root}/calls") as answer:
                assert await answer.json() == []
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
