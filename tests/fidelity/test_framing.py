"""Server-sent events of the model server, however they are framed: [1] to [6]."""

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from tests.fidelity.conftest import deltas, finishes, is_cut, said_in, text_of
from tests.fidelity.wire import DONE, Talk, chunk, event, finish, role, whole, words

from klatch_schemas.events import UsageSettled

if TYPE_CHECKING:
    from tests.fidelity.conftest import Stack

TEXT = ["Zoë ", "says: ", "\U0001f600", "\u2028 and \u2029", " indeed"]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("field", [b"data: ", b"data:"], ids=["space", "no-space"])
async def test_lines_may_end_in_any_way_and_other_fields_may_stand_beside_data(
    stack: "Stack", newline: bytes, field: bytes
) -> None:
    """[1] The client gets lines that end in a newline, and only klatch's own ids."""
    sent = whole(*TEXT).replace(b"data: ", b"event: message\nid: 17\nretry: 1000\n" + field)
    events = await stack.stream(sent.replace(b"\n", newline))
    assert text_of(events) == "".join(TEXT)
    assert events[-1].data == "[DONE]"
    assert all(one.id is None or "-" in one.id for one in events)


async def test_several_data_lines_are_one_event(stack: "Stack") -> None:
    """[1] A pretty-printed chunk reaches the client as one event on one line."""
    said = chunk({"content": "pretty"})
    pretty = b"".join(b"data: %b\n" % line for line in json.dumps(said, indent=2).encode().split(b"\n")) + b"\n"
    events = await stack.stream(role() + pretty + finish())
    assert events[1].json == said


async def test_many_events_in_one_read_and_one_event_in_many_reads_are_the_same(stack: "Stack") -> None:
    """[1]"""
    together = await stack.stream(whole(*TEXT))

    async def dripping(talk: Talk) -> None:
        talk.begin()
        sent = whole(*TEXT)
        for at in range(0, len(sent), 37):
            talk.send(sent[at : at + 37])
            await asyncio.sleep(0)
        talk.end()

    dripped = await stack.stream(dripping)
    assert [one.data for one in dripped] == [one.data for one in together]


async def test_a_write_may_end_inside_a_character(stack: "Stack") -> None:
    """[2] Byte by byte, with raw line separators that are no line ends of an event stream."""
    raw = json.dumps(chunk({"content": "".join(TEXT)}), ensure_ascii=False).encode()

    async def byte_by_byte(talk: Talk) -> None:
        talk.begin()
        for byte in role() + b"data: %b\n\n" % raw + finish():
            talk.send(bytes([byte]))
            await asyncio.sleep(0)
        talk.end()

    answer = await stack.chat(byte_by_byte)
    body = await answer.body()
    assert raw in body, "the bytes are the model server's own"


async def test_comments_are_no_events_and_may_stand_anywhere(stack: "Stack") -> None:
    """[3]"""
    comment = b": OPENROUTER PROCESSING\n\n"
    split = b': in the middle\ndata: {"id": "x",\n: of an event\ndata: "choices": []}\n\n'
    events = await stack.stream(comment + role() + comment + words("a") + split + comment + finish())
    assert text_of(events) == "a"
    assert said_in(events)[2] == {"id": "x", "choices": []}
    assert finishes(events) == [(0, "stop")]


async def test_a_reasoning_model_that_is_silent_is_bridged_by_comments_of_our_own(stack: "Stack") -> None:
    """[3] The model server sends nothing at all for a while: proxies on the way must not cut the client off."""
    speak = asyncio.Event()

    async def silent(talk: Talk) -> None:
        talk.begin()
        await speak.wait()
        talk.send(whole("at last")).end()

    answer = await stack.chat(silent, stack.impatient)
    assert answer.status == 200
    assert [await answer.part() for _ in range(2)] == [b": keep-alive\n\n"] * 2
    speak.set()
    assert text_of(await answer.events()) == "at last"


@pytest.mark.parametrize("end", [DONE, DONE * 2, b"", b"data: [DONE]", b"data:[DONE]\r\n\r\n"])
async def test_the_marker_comes_once_and_last_however_the_model_server_ends(stack: "Stack", end: bytes) -> None:
    """[4]"""
    answer = await stack.chat(whole("all of it").removesuffix(DONE) + end)
    body = await answer.body()
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.count(b"[DONE]") == 1


async def test_the_marker_does_not_make_half_an_answer_whole(stack: "Stack") -> None:
    """[4] A marker without a finish reason is a cut, which nobody after us could tell."""
    error = is_cut(await stack.stream(role() + words("half") + DONE))
    assert error["code"] == "model_reply_truncated"


async def test_an_event_of_300_kb_passes_however_it_is_cut(stack: "Stack") -> None:
    """[5] Arguments of a tool call in one event."""
    arguments = json.dumps({"text": "x" * 300_000})
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    sent = event(chunk({"tool_calls": [call]})) + finish("tool_calls")
    events = await stack.stream(sent)
    assert deltas(events)[0]["tool_calls"][0]["function"]["arguments"] == arguments


async def test_an_event_that_the_log_cannot_hold_is_an_error_and_not_a_gap(stack: "Stack") -> None:
    """[5] A record of Kafka's holds a megabyte: what is larger is refused aloud, and what came before it stands."""
    answer = await stack.chat(role() + words("before ") + words("x" * 1_100_000) + finish())
    events = await answer.events()
    assert text_of(events) == "before "
    assert "log cannot hold" in is_cut(events)["message"]
    assert (await stack.told(answer, UsageSettled)).status == "failed"


async def test_thousands_of_events_in_one_read_take_time_in_proportion(stack: "Stack") -> None:
    """[6] `tests/agents/test_sse.py` holds the decoder to linear time; here all of them pass."""
    many = [f"<{number}>" for number in range(5_000)]
    events = await stack.stream(whole(*many))
    assert text_of(events) == "".join(many)
