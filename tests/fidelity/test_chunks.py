"""What stands in chunks: [12] to [23]. Streamed, they pass as they came; asked for whole, they are put together."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.fidelity.conftest import deltas, finishes, said_in, text_of
from tests.fidelity.wire import Talk, chunk, event, finish, role, sends, usage_chunk, whole, words

from klatch_schemas.events import StreamEnd

if TYPE_CHECKING:
    from tests.fidelity.conftest import Stack

CONSTANT = ("id", "created", "model", "system_fingerprint")


async def test_a_reply_has_one_name_one_time_and_one_model(stack: "Stack") -> None:
    """[12] Also on the usage chunk, whether it is the model server's or klatch's."""
    for sent in (whole("a", "b"), role() + words("a") + event(chunk({}, "stop"))):
        said = said_in(await stack.stream(sent, stream_options={"include_usage": True}))
        assert said[-1]["choices"] == []
        assert {tuple(one[name] for name in CONSTANT) for one in said} == {
            ("chatcmpl-7", 1_790_000_000, "tiny-2026-11-01", "fp_44709d6fcb")
        }


async def test_the_role_comes_once_and_empty_deltas_are_legal(stack: "Stack") -> None:
    """[13]"""
    sent = role() + event(chunk({})) + words("a") + event(chunk({})) + finish()
    said = deltas(await stack.stream(sent))
    assert said == [{"role": "assistant", "content": ""}, {}, {"content": "a"}, {}, {}]
    assert (await stack.whole(sent))["choices"][0]["message"] == {"role": "assistant", "content": "a"}


async def test_a_finish_reason_is_null_until_the_end_and_may_come_with_content(stack: "Stack") -> None:
    """[14] And a usage chunk may follow it."""
    sent = role() + words("a") + event(chunk({"content": "b"}, "length")) + event(usage_chunk()) + b"data: [DONE]\n\n"
    events = await stack.stream(sent, stream_options={"include_usage": True})
    assert [c["choices"][0]["finish_reason"] for c in said_in(events) if c["choices"]] == [None, None, "length"]
    assert text_of(events) == "ab"
    reply = await stack.whole(sent)
    assert (reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]) == ("ab", "length")


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
async def test_no_finish_reason_is_invented(stack: "Stack", end: bytes) -> None:
    """[15] Neither in the stream, nor in a whole reply, nor in what the log keeps."""
    sent = role() + words("half an ans") + end
    answer = await stack.chat(sent)
    assert finishes(await answer.events()) == []
    ended = await stack.told(answer, StreamEnd)
    assert (ended.status, ended.finish_reason) == ("failed", None)
    asked_whole = await stack.chat(sent, stream=False)
    assert asked_whole.status == 502
    assert (await asked_whole.json())["error"]["code"] == "model_reply_truncated"


async def test_choices_are_kept_apart_by_index_in_whatever_order_they_come(stack: "Stack") -> None:
    """[16] Choice 1 speaks first and finishes first, and choice 0 goes on."""
    said = [(1, "b0"), (0, "a0"), (1, "b1")]
    sent = b"".join(event(chunk({"role": "assistant", "content": ""}, index=index)) for index in (1, 0))
    sent += b"".join(event(chunk({"content": text}, index=index)) for index, text in said)
    sent += event(chunk({}, "stop", index=1)) + event(chunk({"content": "a1"})) + finish("length", usage_chunk())
    events = await stack.stream(sent, n=2)
    assert (text_of(events), text_of(events, index=1)) == ("a0a1", "b0b1")
    assert finishes(events) == [(1, "stop"), (0, "length")]
    reply = await stack.whole(sent, n=2)
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in reply["choices"]] == [
        (0, "a0a1", "length"),
        (1, "b0b1", "stop"),
    ]


async def test_two_choices_in_one_event_are_two_choices(stack: "Stack") -> None:
    """[16]"""
    both = chunk({"content": "a"})
    both["choices"] = [*both["choices"], chunk({"content": "b"}, index=1)["choices"][0]]
    ends = event(chunk({}, "stop", index=1)) + finish()
    reply = await stack.whole(event(both) + ends, n=2)
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["a", "b"]


def call(arguments: str | None = None, index: int | None = None, name: str = "", id: str = "") -> bytes:  # noqa: A002
    """A fragment of a tool call."""
    function = {"name": name, "arguments": arguments or ""} if name else {"arguments": arguments}
    said: dict[str, Any] = {"function": function}
    if index is not None:
        said["index"] = index
    if id:
        said |= {"id": id, "type": "function"}
    return event(chunk({"tool_calls": [said]}))


ARGUMENTS = ['{"city": "Z\\u00fcrich \\', "ud83d", '\\ude00"}']


async def test_fragments_of_tool_calls_belong_together_by_index(stack: "Stack") -> None:
    """[17] Interleaved, cut inside an escape, and never parsed on the way."""
    opened = call(index=1, name="g", id="c1") + call(index=0, name="f", id="c0")
    fragments = b"".join(call(part, index=0) + call(part.upper(), index=1) for part in ARGUMENTS)
    sent = role(content=None) + opened + fragments + finish("tool_calls")
    streamed = [one["tool_calls"][0] for one in deltas(await stack.stream(sent)) if "tool_calls" in one]
    assert "".join(one["function"]["arguments"] for one in streamed if one["index"] == 0) == "".join(ARGUMENTS)
    message = (await stack.whole(sent))["choices"][0]["message"]
    assert message["content"] is None
    by_id = {one["id"]: one["function"] for one in message["tool_calls"]}
    assert by_id["c0"] == {"name": "f", "arguments": "".join(ARGUMENTS)}
    assert json.loads(by_id["c0"]["arguments"]) == {"city": "Zürich \U0001f600"}
    assert by_id["c1"] == {"name": "g", "arguments": "".join(ARGUMENTS).upper()}


async def test_a_surrogate_pair_may_be_cut_in_two(stack: "Stack") -> None:
    """[17] Half a character is no text in Python, and legal in JSON."""
    sent = role() + b"".join(event(chunk({"content": half})) for half in ("\ud83d", "\ude00")) + finish()
    assert text_of(await stack.stream(sent)) == "\ud83d\ude00"
    said = (await stack.whole(sent))["choices"][0]["message"]["content"]
    assert said.encode("utf-16", "surrogatepass").decode("utf-16") == "\U0001f600"


@pytest.mark.parametrize("index", [0, None], ids=["all-zero", "left-out"])
async def test_whole_calls_that_are_all_number_0_are_told_apart_by_id(stack: "Stack", index: int | None) -> None:
    """[17] As Ollama and Gemini send them; also if fragments of each follow."""
    sent = b"".join(call('{"n":', index, "f", f"c{n}") + call(f"{n}}}", index) for n in range(3))
    reply = await stack.whole(role() + sent + finish("tool_calls"))
    calls = reply["choices"][0]["message"]["tool_calls"]
    assert [(one["id"], one["function"]["arguments"]) for one in calls] == [(f"c{n}", f'{{"n":{n}}}') for n in range(3)]


async def test_servers_that_write_out_what_they_do_not_say_lose_no_call(stack: "Stack") -> None:
    """[17] SGLang says `tool_calls: null` on every chunk, Qwen `id: ""` on every fragment after the first."""
    sent = event(chunk({"role": "assistant", "content": "", "tool_calls": None})) + call("", 0, "f", "c0")
    for part in ARGUMENTS:
        fragment = {"index": 0, "id": "", "type": "function", "function": {"arguments": part}}
        sent += event(chunk({"role": "", "content": None, "tool_calls": [fragment]}))
    sent += event(chunk({"content": None, "tool_calls": None}, "tool_calls")) + b"data: [DONE]\n\n"
    function = {"name": "f", "arguments": "".join(ARGUMENTS)}
    called = [{"id": "c0", "type": "function", "function": function}]
    assert (await stack.whole(sent))["choices"][0]["message"] == {
        "role": "assistant",
        "content": "",
        "tool_calls": called,
    }


@pytest.mark.parametrize("said", ["stop", "STOP", "end_turn"])
async def test_a_reply_that_calls_tools_finishes_with_tool_calls_whatever_the_vendor_says(
    stack: "Stack", said: str
) -> None:
    """[18] Choice by choice, and everything else of the event stays."""
    sent = role() + call("{}", 0, "f", "c0") + event(chunk({"content": "b"}, index=1)) + event(chunk({}, said, index=1))
    sent += event(chunk({}, said, vendor={"took": 1.5})) + event(usage_chunk()) + b"data: [DONE]\n\n"
    answer = await stack.chat(sent, n=2)
    events = await answer.events()
    assert finishes(events) == [(1, said), (0, "tool_calls")]
    assert said_in(events)[-1]["vendor"] == {"took": 1.5}
    assert (await stack.told(answer, StreamEnd)).finish_reason == "tool_calls"
    assert (await stack.whole(sent, n=2))["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("said", ["length", "content_filter"])
async def test_a_call_that_was_cut_off_is_not_made_whole(stack: "Stack", said: str) -> None:
    """[18]"""
    assert finishes(await stack.stream(role() + call('{"a', 0, "f", "c0") + finish(said))) == [(0, said)]


ODD: list[dict[str, Any]] = [
    {"function_call": {"name": "f", "arguments": '{"a": 1}'}},
    {"refusal": "I cannot ", "content": None},
    {"refusal": "do that", "content": None},
    {"reasoning_content": "hm "},
    {"reasoning": "let me see"},
    {"audio": {"id": "a1", "data": "AAAA", "transcript": "oh"}},
    {"annotations": [{"type": "url_citation", "url_citation": {"url": "https://example.org"}}]},
    {"nobody_knows": {"deep": [1, None, {"x": "y"}]}},
]


async def test_deltas_that_nobody_foresaw_survive(stack: "Stack") -> None:
    """[19] Legacy calls, refusals, reasoning in both spellings, audio, annotations, and what vendors will think of."""
    sent = role(content=None) + b"".join(event(chunk(delta)) for delta in ODD) + finish()
    assert deltas(await stack.stream(sent))[1:-1] == ODD
    message = (await stack.whole(sent))["choices"][0]["message"]
    assert message["refusal"] == "I cannot do that"
    assert message["content"] is None
    assert (message["reasoning_content"], message["reasoning"]) == ("hm ", "let me see")
    for delta in (ODD[0], *ODD[5:]):
        assert delta.items() <= message.items()


@pytest.mark.parametrize(
    "delta", [{"thinking": "hm"}, {"annotations": [{"type": "url_citation"}]}, {"vendor": {"a": 1}}]
)
async def test_a_delta_that_nobody_foresaw_is_a_word(stack: "Stack", delta: dict[str, Any]) -> None:
    """[19, 38] The client gets it at once, and after it nothing is tried again."""
    seen = asyncio.Event()

    async def script(talk: Talk) -> None:
        talk.begin().send(role(), event(chunk(delta)))
        await seen.wait()
        talk.drop()

    model = stack.model(script)
    spare = stack.spare(model, whole("from the spare"))
    try:
        async with asyncio.timeout(5):
            answer = await stack.door.chat(model=model)
            parts = answer.parts()
            while json.dumps(delta).encode() not in await anext(parts):
                pass
    finally:
        seen.set()
    last = b"".join([part async for part in parts])
    assert b"model_reply_truncated" in last
    assert (len(stack.wire.talks[model]), len(stack.wire.talks[spare])) == (1, 0)


async def test_logprobs_pass_and_add_up(stack: "Stack") -> None:
    """[20] Several entries an event, bytes that are half a character."""

    def entry(token: str, raw: list[int]) -> dict[str, Any]:
        return {"token": token, "logprob": -0.25, "bytes": raw, "top_logprobs": []}

    entries = [[entry("a", [97]), entry("\\xf0", [240, 159])], [entry("\\x98", [152, 128])]]
    sent = role()
    for each in entries:
        said = chunk({"content": "x"})
        said["choices"][0]["logprobs"] = {"content": each, "refusal": None}
        sent += event(said)
    events = await stack.stream(sent + finish(), logprobs=True)
    assert [c["choices"][0]["logprobs"]["content"] for c in said_in(events)[1:3]] == entries
    reply = await stack.whole(sent + finish(), logprobs=True)
    assert reply["choices"][0]["logprobs"]["content"] == [*entries[0], *entries[1]]


LOGPROB = b'"logprobs": {"content": [{"token": "x", "logprob": %b, "bytes": [120], "top_logprobs": []}]}'


@pytest.mark.parametrize("number", [b"-Infinity", b"NaN", b"1e999"])
async def test_a_number_that_is_none_costs_no_word(stack: "Stack", number: bytes) -> None:
    """[20] It is null: no reader of the log could read it. What is remembered is the whole reply."""
    odd = words(" NOT").replace(b'"logprobs": null', LOGPROB % number)
    assert number in odd
    sent = role() + words("do") + odd + words(" delete it")
    sent += finish("stop", usage_chunk()).replace(b'"choices": []', b'"choices": [], "took": ' + number)
    events = await stack.stream(sent, stream_options={"include_usage": True})
    assert (text_of(events), finishes(events)) == ("do NOT delete it", [(0, "stop")])
    assert said_in(events)[2]["choices"][0]["logprobs"]["content"][0]["logprob"] is None
    assert (said_in(events)[-1]["took"], said_in(events)[-1]["usage"]["completion_tokens"]) == (None, 3)
    assert (await stack.whole(sent))["choices"][0]["message"]["content"] == "do NOT delete it"
    remembered = {"conversation": f"of a {number.decode()}"}
    await stack.whole(sent, klatch=remembered)
    model = stack.model(sends(whole("ok")))
    await (await stack.door.chat(model=model, klatch=remembered)).events()
    assert (await stack.wire.talk(model)).body["messages"][1]["content"] == "do NOT delete it"


async def test_what_is_no_utf_8_is_replaced_and_everything_else_stands(stack: "Stack") -> None:
    """[2, 17, 20] In the text, in the arguments of a tool call, and in a token of log probabilities."""
    odd = words("<odd>").replace(b'"logprobs": null', LOGPROB.replace(b'"x"', b'"<odd>"') % b"-1.5")
    sent = role() + words("a") + odd + call('{"q": "<odd>"}', 0, "f", "c0") + finish("tool_calls")
    sent = sent.replace(b"<odd>", b"\xf0\x9f")
    events = await stack.stream(sent)
    assert (text_of(events), finishes(events)) == ("a\ufffd", [(0, "tool_calls")])
    assert [entry["token"] for entry in said_in(events)[2]["choices"][0]["logprobs"]["content"]] == ["\ufffd"]
    choice = (await stack.whole(sent))["choices"][0]
    assert choice["message"]["content"] == "a\ufffd"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"q": "\ufffd"}'


async def test_padding_against_eavesdroppers_goes_through(stack: "Stack") -> None:
    """[21] To the client, who is the one it protects; it is no part of a whole reply; and it can be turned off."""
    sent = role() + event(chunk({"content": "a"}, obfuscation="kR3f9")) + finish()
    model = stack.model(sends(sent))
    answer = await stack.door.chat(model=model, stream_options={"include_obfuscation": False})
    assert said_in(await answer.events())[1]["obfuscation"] == "kR3f9"
    assert (await stack.wire.talk(model)).body["stream_options"] == {
        "include_obfuscation": False,
        "include_usage": True,
    }
    assert "obfuscation" not in await stack.whole(sent)


async def test_fields_beside_the_choices_survive(stack: "Stack") -> None:
    """[22] Known ones and a vendor's own, streamed and whole."""
    beside: dict[str, Any] = {"service_tier": "flex", "moderation": {"flagged": False}, "x_groq": {"id": "g1"}}
    sent = role() + event(chunk({"content": "a"}, **beside)) + finish()
    assert beside.items() <= said_in(await stack.stream(sent))[1].items()
    assert beside.items() <= (await stack.whole(sent)).items()


async def test_a_token_may_repeat_itself(stack: "Stack") -> None:
    """[23] A rule of a table, base64, laughter."""
    assert text_of(await stack.stream(whole(*["ha"] * 500))) == "ha" * 500
