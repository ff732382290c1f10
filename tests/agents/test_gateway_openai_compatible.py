"""The gateway against a real server that is told how to fail. Numbers in brackets are traps of
`STREAMING.md`.

Over 400 lines on purpose: one behaviour after the other, each a few lines, of one class.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from tests.agents.conftest import answering, text_in

from klatch_agents.gateway.errors import (
    ConnectError,
    MalformedError,
    ModelError,
    RefusedError,
    StalledError,
    StreamError,
    TruncatedError,
)
from klatch_agents.gateway.http import LONGEST_RETRY_AFTER_S, retry_after
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import Chunk, Finished, ModelCall, Timeouts
from klatch_agents.testing.upstream import Upstream
from klatch_agents.testing.upstream.http import Connection, Request

PATIENT = Timeouts(connect=60, first_token=60, idle=60)
"""Longer than any pause of a busy machine."""
KEY = "sk-secret-1234"


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(key=KEY) as server:
        yield server


@pytest.fixture
async def gateway(upstream: Upstream) -> AsyncIterator[OpenAICompatible]:
    async with OpenAICompatible(Endpoint(upstream.url, key=KEY), PATIENT) as opened:
        yield opened


Body = dict[str, object]


def call(timeouts: Timeouts = PATIENT, body: Body | None = None, /, **script: object) -> ModelCall:
    """A call whose `x-fake` member scripts the server's answer."""
    messages = [{"role": "user", "content": "hello"}]
    return ModelCall({"model": "fake", "messages": messages, "x-fake": script, **(body or {})}, timeouts=timeouts)


@dataclass
class Heard:
    """What a reader got of a reply, and how it ended."""

    chunks: list[Chunk] = field(default_factory=list[Chunk])
    finished: Finished | None = None
    error: ModelError | None = None

    def text(self, member: str = "content", index: int = 0) -> str:
        choices = [c for chunk in self.chunks for c in json.loads(chunk.raw).get("choices", [])]
        return "".join(c.get("delta", {}).get(member) or "" for c in choices if c["index"] == index)


async def hear(gateway: OpenAICompatible, call: ModelCall) -> Heard:
    heard = Heard()
    try:
        async with gateway.stream(call) as reply:
            async for batch in reply:
                assert batch, "a batch is never empty"
                heard.chunks += batch
            heard.finished = reply.finished
    except ModelError as error:
        heard.error = error
    return heard


# -- whole replies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        {},
        {"newline": "crlf"},
        {"newline": "cr"},
        {"comments": True},
        {"split": 1},
        {"split": 7, "newline": "crlf", "comments": True},
        {"azure": True},
        {"rate": 400},
    ],
)
async def test_framing_changes_nothing_of_what_is_heard(gateway: OpenAICompatible, script: dict[str, object]) -> None:
    """[1, 2, 3, 30, 31]"""
    text = "Zoë says: \U0001f600 wonderful \u2028 indeed"
    heard = await hear(gateway, call(text=text, **script))
    assert heard.text() == text
    assert heard.finished is not None
    assert heard.finished.finish_reasons == {0: "stop"}
    assert heard.finished.ending == "done"


async def test_the_bytes_of_a_chunk_are_those_of_the_server(gateway: OpenAICompatible, upstream: Upstream) -> None:
    """[12, 19]"""
    heard = await hear(gateway, call(PATIENT, {"logprobs": True}, reasoning=2))
    chunks = [json.loads(chunk.raw) for chunk in heard.chunks]
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{upstream.calls[-1].id}"}
    assert heard.text("reasoning_content") == "hm0 hm1 "
    spoken = [
        chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["delta"].get("content")
    ]
    assert all(choice["logprobs"]["content"][0]["token"] == choice["delta"]["content"] for choice in spoken)


async def test_one_event_of_300_kb_passes(gateway: OpenAICompatible) -> None:
    """[5]"""
    heard = await hear(gateway, call(big=300_000))
    assert len(heard.text()) == 300_000


async def test_choices_come_interleaved_and_each_has_its_own_finish(gateway: OpenAICompatible) -> None:
    """[16, 29]"""
    heard = await hear(gateway, call(PATIENT, {"n": 2}, reply="unique", tokens=5, finish="length,stop"))
    assert heard.finished is not None
    assert heard.finished.finish_reasons == {0: "length", 1: "stop"}
    assert heard.finished.usage is not None
    assert heard.finished.usage.completion_tokens == 10
    assert heard.text(index=0) != heard.text(index=1) != ""


async def test_a_choice_that_never_finishes_is_not_hidden_by_one_that_did(gateway: OpenAICompatible) -> None:
    """[15, 16] The server finishes choice 0 only: `finish` of choice 1 is empty."""
    heard = await hear(gateway, call(PATIENT, {"n": 2}, tokens=4, finish="stop,"))
    assert isinstance(heard.error, TruncatedError)
    assert "[1]" in str(heard.error)


async def test_tool_calls_and_refusals_speak_and_finish(gateway: OpenAICompatible) -> None:
    """[17, 18, 19]"""
    tools = await hear(gateway, call(tool_calls=2))
    assert tools.finished is not None
    assert tools.finished.finish_reasons == {0: "tool_calls"}
    refusal = await hear(gateway, call(refusal=True, tokens=3))
    assert refusal.text("refusal")
    assert refusal.text() == ""
    for heard in (tools, refusal):
        assert [c.speaks for c in heard.chunks[:2]] == [False, True], "the role alone says nothing"


async def test_lone_surrogates_pass_as_they_are(gateway: OpenAICompatible) -> None:
    """[17]"""
    heard = await hear(gateway, call(tokens=1, surrogates=True))
    assert heard.text().endswith("\ud83d\ude00")
    assert heard.finished is not None


async def test_a_running_usage_is_taken_last_and_never_summed(gateway: OpenAICompatible) -> None:
    """[27]"""
    heard = await hear(gateway, call(tokens=9, running_usage=True))
    assert heard.finished is not None
    assert heard.finished.usage is not None
    assert heard.finished.usage.completion_tokens == 9
    assert [chunk.usage_only for chunk in heard.chunks].count(True) == 1
    assert heard.chunks[-1].usage_only


async def test_tokens_of_a_quick_server_come_in_batches(gateway: OpenAICompatible) -> None:
    async with gateway.stream(call(tokens=100, rate=0)) as reply:
        assert max([len(batch) async for batch in reply]) > 10


async def test_tokens_of_a_slow_server_come_one_by_one() -> None:
    """This one says the next when its reader has the last."""
    calls = list[Connection]()

    def answer(at: Connection, _: Request) -> None:
        at.begin_events({})
        calls.append(at)

    async with (
        answering(answer) as url,
        OpenAICompatible(Endpoint(url), PATIENT) as gateway,
        gateway.stream(call()) as reply,
    ):
        batches = aiter(reply)
        for number in range(5):
            calls[0].write(b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % number)
            assert [text_in([chunk]) for chunk in await anext(batches)] == [str(number)]


# -- what goes up -----------------------------------------------------------------------------------


async def test_the_body_goes_up_whole_with_what_streaming_needs_merged_in(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    """[21, 26, 45, 46]"""
    given: dict[str, object] = {
        "seed": 7,
        "max_completion_tokens": 3,
        "vendor": {"a": [1.5, None, "\ud83d"]},
        "stream_options": {"include_obfuscation": False},
        "stream": False,
    }
    asked = call(PATIENT, given)
    before = json.dumps(dict(asked.body))
    await hear(gateway, asked)
    sent = upstream.calls[-1].body
    assert sent == {
        **asked.body,
        "stream": True,
        "stream_options": {"include_obfuscation": False, "include_usage": True},
    }
    assert json.dumps(dict(asked.body)) == before, "the caller's body is the caller's"


async def test_headers_and_a_model_override_go_up(upstream: Upstream) -> None:
    endpoint = Endpoint(upstream.url, key=KEY, model="by-endpoint", headers={"x-team": "blue"})
    async with OpenAICompatible(endpoint) as gateway:
        body: dict[str, object] = {"model": "asked", "messages": []}
        async with gateway.stream(ModelCall(body, headers={"traceparent": "00-ab", "X-Request-Id": "r1"})) as reply:
            assert reply.model == "by-endpoint"
            assert reply.upstream_request_id == f"req_{upstream.calls[-1].id}"
        async with gateway.stream(ModelCall(body, model="by-call")):
            pass
    first, second = list(upstream.calls)[-2:]
    assert (first.body["model"], second.body["model"]) == ("by-endpoint", "by-call")
    assert (first.headers["traceparent"], first.headers["x-request-id"]) == ("00-ab", "r1")
    assert first.headers["x-team"] == "blue"
    assert first.headers["accept-encoding"] == "identity", "[7] compression buffers"


async def test_a_server_that_refuses_stream_options_is_asked_without_them_and_remembered(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    """[26]"""
    for _ in range(2):
        heard = await hear(gateway, call(reject_stream_options=True))
        assert heard.finished is not None
        assert heard.finished.usage is None
    assert ["stream_options" in c.body for c in upstream.calls] == [True, False, False]


async def test_a_server_that_refuses_stream_options_at_all_is_learnt_from_odd_ones_too(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    """[26] By the usage alone, which it refused as well."""
    for _ in range(2):
        asked = call(reject_stream_options=True)
        heard = await hear(gateway, replace(asked, body={**asked.body, "stream_options": {"odd": 1}}))
        assert heard.finished is not None
    sent = [c.body.get("stream_options") for c in upstream.calls]
    assert sent == [{"odd": 1, "include_usage": True}, {"include_usage": True}, None, None]


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("shape", ["json", "text"])
async def test_the_name_of_stream_options_is_found_wherever_a_refusal_says_it(status: int, shape: str) -> None:
    """[26] As FastAPI says it where models are strict, behind all that it says before."""
    wrong = [{"type": "extra_forbidden", "loc": ["body", name]} for name in ("x" * 600, "stream_options")]
    said = json.dumps({"detail": wrong}).encode()
    asked = list[bool]()

    def answer(at: Connection, request: Request) -> None:
        asked.append("stream_options" in json.loads(request.body))
        if asked[-1]:
            at.respond(status, said if shape == "json" else said[1:])
        else:
            at.begin_events({})
            at.write(b'data: {"choices":[{"delta":{"content":"yes"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
            at.end()

    async with answering(answer) as url, OpenAICompatible(Endpoint(url), PATIENT) as gateway:
        heard = [await hear(gateway, call()) for _ in range(2)]
    assert [one.finished is not None for one in heard] == [True, True]
    assert asked == [True, False, False]


@pytest.mark.parametrize("status", [401, 500])
async def test_a_refusal_of_another_kind_is_none_of_stream_options(status: int) -> None:
    said = b'{"error": {"message": "you said stream_options"}}'
    asked = list[Request]()

    def answer(at: Connection, request: Request) -> None:
        asked.append(request)
        at.respond(status, said)

    async with answering(answer) as url, OpenAICompatible(Endpoint(url), PATIENT) as gateway:
        assert isinstance((await hear(gateway, call())).error, RefusedError)
    assert len(asked) == 1


async def test_any_other_400_is_not_tried_again(gateway: OpenAICompatible, upstream: Upstream) -> None:
    """[32]"""
    heard = await hear(gateway, call(status=400))
    assert isinstance(heard.error, RefusedError)
    assert not heard.error.retriable
    assert len(upstream.calls) == 1


# -- broken replies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop", "reset", "no-finish", "done-without-finish"])
async def test_half_an_answer_is_truncated_and_never_finished(gateway: OpenAICompatible, fault: str) -> None:
    """[4, 15, 35, 36]"""
    heard = await hear(gateway, call(tokens=20, rate=400, fault=fault))
    assert isinstance(heard.error, TruncatedError)
    assert heard.finished is None
    assert heard.error.upstream_request_id is not None
    assert not any(chunk.finishes for chunk in heard.chunks)
    if fault != "reset":  # a reset may destroy what was under way
        assert heard.text() != ""
        assert heard.error.spoke
        assert not heard.error.retriable, "[38] a second try would repeat what was said"


async def test_a_cut_before_the_first_word_may_be_tried_again(gateway: OpenAICompatible) -> None:
    """[38]"""
    heard = await hear(gateway, call(fault="drop", fault_after=0))
    assert isinstance(heard.error, TruncatedError)
    assert heard.error.retriable


@pytest.mark.parametrize(
    ("fault", "ending"),
    [("no-done", "eof"), ("bare-done", "done"), ("drop-after-finish", "cut"), ("stall-after-finish", "cut")],
)
async def test_an_answer_whose_choices_have_all_finished_is_whole_whatever_the_wire_does_then(
    gateway: OpenAICompatible, fault: str, ending: str
) -> None:
    """[36]"""
    patience = replace(PATIENT, idle=0.2) if fault == "stall-after-finish" else PATIENT
    heard = await hear(gateway, call(patience, fault=fault, reply="unique", tokens=6))
    assert heard.error is None
    assert heard.finished is not None
    assert heard.finished.ending == ending
    assert heard.text().endswith(":5>>")


@pytest.mark.parametrize("fault", ["error-event", "named-error-event"])
async def test_an_error_event_ends_the_reply_with_the_servers_own_words(gateway: OpenAICompatible, fault: str) -> None:
    """[34]"""
    heard = await hear(gateway, call(tokens=10, fault=fault))
    assert isinstance(heard.error, StreamError)
    assert heard.error.body is not None
    assert (heard.error.body.message, heard.error.body.code) == ("the engine died", 500)
    assert len([c for c in heard.chunks if c.speaks]) == 5, "what came before the error was delivered"
    assert heard.error.spoke


async def test_an_event_that_is_no_json_is_malformed(gateway: OpenAICompatible) -> None:
    heard = await hear(gateway, call(fault="garbage"))
    assert isinstance(heard.error, MalformedError)


async def test_silence_in_the_middle_is_a_stall_and_the_server_is_left(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    """[37]"""
    heard = await hear(gateway, call(Timeouts(first_token=5, idle=0.2), fault="stall"))
    assert isinstance(heard.error, StalledError)
    assert heard.error.status == 504
    assert "silent for 0.2 s" in str(heard.error), "the patience for a first token is over"
    assert heard.error.spoke
    await upstream.changed(lambda: upstream.calls[-1].outcome == "left")


@pytest.mark.parametrize("where", ["header_delay", "first_delay"])
async def test_silence_before_the_first_token_is_a_stall_that_may_be_tried_again(
    gateway: OpenAICompatible, upstream: Upstream, where: str
) -> None:
    """[37, 38]"""
    heard = await hear(gateway, call(Timeouts(first_token=0.2, idle=5), **{where: 30}))
    assert isinstance(heard.error, StalledError)
    assert heard.error.retriable
    await upstream.changed(lambda: upstream.calls[-1].outcome == "left")


async def test_a_role_or_azures_first_event_does_not_end_the_wait_for_the_first_token(
    gateway: OpenAICompatible,
) -> None:
    """[30] The patience for a first token holds until something is said."""
    patient = Timeouts(first_token=0.6, idle=0.1)
    heard = await hear(gateway, call(patient, azure=True, fault="stall", fault_after=0))
    assert isinstance(heard.error, StalledError)
    assert "silent for 0.6 s" in str(heard.error)


async def test_comments_keep_a_silent_server_alive(gateway: OpenAICompatible) -> None:
    """[3]"""
    # Three seconds, since server and client are one process, which pauses as a whole.
    heard = await hear(gateway, call(replace(PATIENT, first_token=3.0), first_delay=3.5, keep_alive=0.1))
    assert heard.error is None
    assert heard.finished is not None


async def test_a_reader_that_takes_its_time_is_no_silence_of_the_server(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    async with gateway.stream(call(replace(PATIENT, idle=0.2), tokens=3, rate=100)) as reply:
        async for _ in reply:
            await upstream.changed(lambda: upstream.calls[-1].outcome == "finished")
            await asyncio.sleep(0.3)  # the slow consumer is what is tested
    assert reply.finished is not None


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "retriable"), [(429, True), (500, True), (503, True), (408, True), (400, False), (404, False)]
)
async def test_a_refusal_keeps_the_servers_status_body_and_retry_after(
    gateway: OpenAICompatible, upstream: Upstream, status: int, retriable: bool
) -> None:
    """[9, 10]"""
    heard = await hear(gateway, call(status=status, retry_after="7"))
    error = heard.error
    assert isinstance(error, RefusedError)
    assert (error.status, error.retriable, error.retry_after) == (status, retriable, 7.0)
    assert error.code == f"status_{status}"
    assert error.body is not None
    assert error.body.message == "as scripted"
    assert error.upstream_request_id == f"req_{upstream.calls[-1].id}"


async def test_a_wrong_key_is_refused_and_no_error_or_repr_shows_it(upstream: Upstream) -> None:
    wrong = "sk-wrong-98765"
    async with OpenAICompatible(Endpoint(upstream.url, key=wrong, headers={"api-key": wrong})) as gateway:
        heard = await hear(gateway, call())
        assert isinstance(heard.error, RefusedError)
        assert heard.error.status == 401
        assert not heard.error.retriable
        shown = f"{heard.error} {heard.error!r} {heard.error.body} {gateway!r}"
        assert wrong not in shown
        assert "***" in shown, "the server did quote it"


async def test_a_key_that_is_taken_again_is_refused_no_more(upstream: Upstream) -> None:
    """Who made it is told of it only as long as the server does not take it."""
    told, key = list[str](), "sk-one"

    async def key_of(refused: str = "") -> str:
        told.append(refused)
        return key

    upstream.key = "sk-another"
    async with OpenAICompatible(Endpoint(upstream.url, key_of=key_of)) as gateway:
        with pytest.raises(RefusedError):
            await gateway.models()
        upstream.key = key
        for _ in range(2):
            await gateway.models()
    assert told == ["", key, ""]


async def test_no_server_there_is_a_connect_error_that_names_the_url(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}/v1"
    async with OpenAICompatible(Endpoint(url)) as gateway:
        heard = await hear(gateway, call())
    assert isinstance(heard.error, ConnectError)
    assert heard.error.retriable
    assert url in str(heard.error)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "9" * 400}, LONGEST_RETRY_AFTER_S),
        ({"retry-after-ms": "9" * 400}, LONGEST_RETRY_AFTER_S),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, LONGEST_RETRY_AFTER_S),
        ({"retry-after": "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_every_form_that_servers_send(headers: dict[str, str], seconds: float | None) -> None:
    """[9]"""
    assert retry_after(CIMultiDictProxy(CIMultiDict(headers))) == seconds


async def test_an_error_in_the_clothes_of_a_200_is_an_error(gateway: OpenAICompatible) -> None:
    heard = await hear(gateway, call(status=200))
    assert isinstance(heard.error, StreamError)
    assert str(heard.error) == "as scripted"


@pytest.mark.parametrize(("script", "said"), [({"ignore_stream": True}, "event stream"), ({"status": 302}, "redirect")])
async def test_what_is_no_stream_is_malformed_and_says_what_to_check(
    gateway: OpenAICompatible, script: dict[str, object], said: str
) -> None:
    heard = await hear(gateway, call(**script))
    assert isinstance(heard.error, MalformedError)
    assert not heard.error.retriable
    assert said in str(heard.error)
    assert "URL" in str(heard.error)


async def test_a_wrong_path_is_refused(upstream: Upstream) -> None:
    root = upstream.url.removesuffix("/v1")
    async with OpenAICompatible(Endpoint(root, key=KEY)) as gateway:
        heard = await hear(gateway, call())
    assert isinstance(heard.error, RefusedError)
    assert heard.error.status == 404


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://a/v1", "http://user:pass@host/v1"])
def test_a_url_that_cannot_work_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="model server"):
        Endpoint(url)


# -- leaving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["header_delay", "first_delay"])
async def test_a_call_that_is_cancelled_before_its_first_token_has_hung_up(
    gateway: OpenAICompatible, upstream: Upstream, where: str
) -> None:
    """[40]"""
    patient = Timeouts(first_token=60, idle=60)
    task = asyncio.create_task(hear(gateway, call(patient, **{where: 30})))
    await upstream.changed(lambda: bool(upstream.calls))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await upstream.changed(lambda: upstream.calls[-1].outcome == "left")


async def test_a_reader_that_leaves_in_the_middle_has_hung_up_and_the_next_call_is_clean(
    gateway: OpenAICompatible, upstream: Upstream
) -> None:
    """[40, 43]"""
    for _ in range(3):
        async with gateway.stream(call(tokens=10_000, rate=200)) as reply:
            async for _batch in reply:
                break
        await upstream.changed(lambda: upstream.calls[-1].outcome == "left")
        heard = await hear(gateway, call(reply="unique", tokens=3))
        assert heard.text() == "".join(f"<<{upstream.calls[-1].id}:{i}>>" for i in range(3))


async def test_whole_replies_share_a_connection(gateway: OpenAICompatible, upstream: Upstream) -> None:
    """[43] Also when the end of the body comes after `[DONE]`, for which no reader waits."""
    for _ in range(5):
        assert (await hear(gateway, call(end_delay=0.05))).finished is not None
        await upstream.changed(lambda: upstream.calls[-1].outcome == "finished")
        await asyncio.sleep(0)  # the end of the body is one turn of the loop behind the record
        assert (await hear(gateway, call())).finished is not None
    assert upstream.open_connections == 1


async def test_many_replies_at_once_keep_their_texts_apart(gateway: OpenAICompatible) -> None:
    heard = await asyncio.gather(*(hear(gateway, call(reply="unique", tokens=20, rate=500)) for _ in range(40)))
    texts = [reply.text() for reply in heard]
    for text in texts:
        name = text[2 : text.index(":")]
        assert text == "".join(f"<<{name}:{i}>>" for i in range(20))
    assert len(set(texts)) == 40


async def test_a_closed_gateway_takes_no_call(upstream: Upstream) -> None:
    gateway = OpenAICompatible(Endpoint(upstream.url, key=KEY))
    await gateway.close()
    await gateway.close()
    assert isinstance((await hear(gateway, call())).error, ConnectError)


# -- embeddings and models --------------------------------------------------------------------------


async def test_embeddings_come_back_raw(gateway: OpenAICompatible, upstream: Upstream) -> None:
    body: dict[str, object] = {"model": "m", "input": ["a", "b"], "dimensions": 4, "user": "u"}
    raw = json.loads(await gateway.embed(body))
    assert [len(item["embedding"]) for item in raw["data"]] == [4, 4]
    assert upstream.calls[-1].body == body


async def test_embeddings_fail_by_the_same_names_as_replies(gateway: OpenAICompatible, upstream: Upstream) -> None:
    with pytest.raises(RefusedError) as refused:
        await gateway.embed({"input": "a", "x-fake": {"status": 429, "retry_after": "3"}})
    async with OpenAICompatible(Endpoint(upstream.url, key=KEY), Timeouts(first_token=0.2)) as hasty:
        with pytest.raises(StalledError):
            await hasty.embed({"input": "a", "x-fake": {"header_delay": 30}})
    assert (refused.value.status, refused.value.retry_after) == (429, 3.0)


async def test_models_are_listed(gateway: OpenAICompatible, upstream: Upstream) -> None:
    upstream.models = ["a", "b"]
    assert await gateway.models() == ["a", "b"]
