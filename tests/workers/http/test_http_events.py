"""Server-sent events on the wire: bytes, headers, keep-alives, restarts, and clients that go away or stand still."""

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.workers.http.conftest import Sse, sse

from klatch_schemas.events import ChatRequested, StreamCancel
from klatch_workers.http.door import Terms

if TYPE_CHECKING:
    from tests.workers.http.conftest import Answer, Kit, Kits, Script, Teller

FAST = Terms(hold_s=0.5, keepalive_s=0.5)


async def test_headers_let_every_proxy_pass_tokens_on_at_once_trap_7(kit: "Kit") -> None:
    answer = await kit.chat(klatch={"conversation": "Grüße 100%"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    assert "content-encoding" not in answer.headers
    assert answer.headers["x-request-id"] == kit.stages.tellers[0].asked.request
    assert answer.headers["x-klatch-conversation"] == "Gr%C3%BC%C3%9Fe%20100%25"


async def test_chunks_are_relayed_byte_by_byte_with_the_place_of_their_record(kit: "Kit") -> None:
    delta = b'{"content":"\xe2\x80\xa8 \\ud83d\\ude00"}'
    odd = b'{"id": "x",  "choices":[{"index":0,"delta":%b,"finish_reason":null}],"z":1e2}' % delta

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.raw(odd)
        await teller.end()

    kit.stages.script = script
    body = await (await kit.chat()).body()
    teller = kit.stages.tellers[0]
    assert body == b"id: %d-1\ndata: %b\n\ndata: [DONE]\n\n" % (teller.partition, odd)


async def test_a_chunk_with_line_ends_stays_one_event_trap_1(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.raw(b'{"id": "x",\r\n\n"choices": []}')
        await teller.end()

    kit.stages.script = script
    events = await (await kit.chat()).events()
    assert events[0].json == {"id": "x", "choices": []}


async def test_an_event_of_300_kb_passes_trap_5(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("x" * 300_000)
        await teller.end()

    kit.stages.script = script
    stream = await kit.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert [len(chunk.choices[0].delta.content or "") async for chunk in stream] == [300_000]


async def test_chunks_that_arrive_together_leave_in_one_write(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.raw(*(teller.chunk(content=str(n)) for n in range(50)))
        await teller.end()

    kit.stages.script = script
    parts = [part async for part in (await kit.chat()).parts()]
    assert max(part.count(b"data: ") for part in parts) >= 50


async def test_a_silent_model_is_bridged_by_comments_trap_3_9(kits: "Kits") -> None:
    async with kits.serving(FAST) as kit:
        go = asyncio.Event()

        async def script(teller: "Teller") -> None:
            await go.wait()
            await teller.open()
            await teller.say("late")
            await teller.end()

        kit.stages.script = script
        answer = await kit.chat()
        assert answer.status == 200
        assert await answer.part() == b": keep-alive\n\n"
        assert await answer.part() == b": keep-alive\n\n"
        go.set()
        assert [event.data for event in await answer.events()][-1] == "[DONE]"


async def test_a_refusal_after_the_silence_is_an_error_event_trap_9(kits: "Kits") -> None:
    async with kits.serving(FAST) as kit:
        go = asyncio.Event()

        async def script(teller: "Teller") -> None:
            await go.wait()
            await teller.end("rejected")

        kit.stages.script = script
        answer = await kit.chat()
        assert answer.status == 200
        go.set()
        (event,) = await answer.events()
        assert event.json["error"]["code"] == "rate_limit_exceeded"


async def test_a_stream_that_stays_silent_is_given_up_with_an_error_trap_37(kits: "Kits") -> None:
    async with kits.serving(Terms(silence_s=0.5)) as kit:

        async def script(_: "Teller") -> None:
            return

        kit.stages.script = script
        answer = await kit.chat()
        assert answer.status == 503, "a silence is not the deadline of a request, which ends it"
        error = (await answer.json())["error"]
        assert error["code"] == "unavailable"
        assert error["klatch"]["resume"].startswith(f"/v1/streams/{answer.headers['x-request-id']}")
        assert kit.said(StreamCancel) == []


async def test_a_restart_before_any_text_is_silent(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open(1)
        await teller.open(2)
        await teller.say("whole")
        await teller.end()

    kit.stages.script = script
    events = await (await kit.chat()).events()
    assert [event.json["choices"][0]["delta"] for event in events[:-1]] == [{"content": "whole"}]


def _restarted(shown: asyncio.Event) -> "Script":
    """A script that begins again once its first text was shown."""

    async def script(teller: "Teller") -> None:
        await teller.open(1)
        await teller.say("half")
        await shown.wait()
        await teller.open(2)
        await teller.say("whole")
        await teller.end()

    return script


async def _after_the_first(answer: "Answer", shown: asyncio.Event) -> list[Sse]:
    """The events of a stream that says more once its first text is `shown`."""
    first = sse(await answer.part())
    shown.set()
    return first + await answer.events()


async def test_a_restart_after_text_is_an_error_with_a_link_that_reads_the_new_text_trap_38(kit: "Kit") -> None:
    kit.stages.script = _restarted(shown := asyncio.Event())
    *heard, last = await _after_the_first(await kit.chat(), shown)
    assert [event.json["choices"][0]["delta"]["content"] for event in heard] == ["half"]
    error = last.json["error"]
    assert (error["code"], error["type"]) == ("superseded", "server_error")
    again = await (await kit.call("GET", error["klatch"]["resume"])).events()
    assert [event.json["choices"][0]["delta"]["content"] for event in again[:-1]] == ["whole"]
    assert again[-1].data == "[DONE]"


async def test_a_restart_does_not_trouble_a_reply_in_one_piece(kit: "Kit") -> None:
    kit.stages.script = _restarted(shown := asyncio.Event())
    shown.set()
    answer = await kit.chat(stream=False)
    assert (await answer.json())["choices"][0]["message"]["content"] == "whole"


async def test_lost_deltas_are_an_error_and_never_spliced_text(kit: "Kit") -> None:
    shown = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("a")
        await shown.wait()
        teller.seq += 1
        await teller.say("c")
        await teller.end()

    kit.stages.script = script
    *heard, last = await _after_the_first(await kit.chat(), shown)
    assert [event.json["choices"][0]["delta"]["content"] for event in heard] == ["a"]
    assert last.json["error"]["code"] == "stream_broken"
    assert (await kit.chat(stream=False)).status == 502


async def _waits(teller: "Teller") -> None:
    await teller.open()
    await teller.cancelled.wait()


async def _speaks_and_waits(teller: "Teller") -> None:
    await teller.open()
    await teller.say("a")
    await teller.cancelled.wait()


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_before_the_first_token_cancels_trap_40(kit: "Kit", streamed: bool) -> None:
    kit.stages.script = _waits
    calling = asyncio.create_task(kit.chat(stream=streamed))
    await kit.stages.first()
    await kit.calls[0].close()
    said: StreamCancel = await kit.until_said(StreamCancel)
    assert (said.request, said.tenant) == (kit.stages.tellers[0].asked.request, "acme")
    with pytest.raises((IndexError, ConnectionError)):
        await calling


async def test_a_client_that_leaves_in_mid_stream_cancels_trap_40(kit: "Kit") -> None:
    kit.stages.script = _speaks_and_waits
    answer = await kit.chat()
    assert b"data:" in await answer.part()
    await answer.close()
    said: StreamCancel = await kit.until_said(StreamCancel)
    assert said.request == answer.headers["x-request-id"]
    assert kit.said(ChatRequested, "chat.requests")[0].conversation == said.conversation


async def test_a_client_that_asked_to_go_on_leaves_without_cancelling_and_comes_back(kit: "Kit") -> None:
    go = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("a")
        await go.wait()
        await teller.say("b")
        await teller.end()

    kit.stages.script = script
    answer = await kit.chat(klatch={"on_disconnect": "continue"})
    await answer.part()
    await answer.close()
    resumed = await kit.call("GET", f"/v1/streams/{answer.headers['x-request-id']}")
    assert b'"a"' in await resumed.part()
    go.set()
    assert [event.data for event in await resumed.events()][-1] == "[DONE]"
    assert kit.said(StreamCancel) == []


async def test_a_cancelled_stream_tells_its_other_readers(kit: "Kit") -> None:
    kit.stages.script = _speaks_and_waits
    answer = await kit.chat()
    cancelled = await kit.call("DELETE", f"/v1/streams/{answer.headers['x-request-id']}")
    assert cancelled.status == 202
    *_, last = await answer.events()
    assert last.json["error"]["code"] == "cancelled"


BLOCK = "x" * 50_000


async def test_a_client_that_reads_slowly_gets_every_token_from_a_small_buffer_trap_42(kits: "Kits") -> None:
    async with kits.serving(Terms(buffer_bytes=200_000)) as kit:
        told = asyncio.Event()

        async def script(teller: "Teller") -> None:
            await teller.open()
            for number in range(400):
                await teller.delta(content=BLOCK, number=number)
            await teller.end()
            told.set()

        kit.stages.script = script
        answer = await kit.chat()
        # 20 MB are said before this client takes its first byte: more than sockets and the door may hold.
        await told.wait()
        events = await answer.events()
        numbers = [event.json["choices"][0]["delta"]["number"] for event in events[:-1]]
        assert numbers == list(range(400))
        assert events[-1].data == "[DONE]"


async def test_a_slow_client_that_the_log_has_left_behind_is_told_so(kits: "Kits") -> None:
    async with kits.serving(Terms(buffer_bytes=200_000)) as kit:
        told = asyncio.Event()

        async def script(teller: "Teller") -> None:
            await teller.open()
            for number in range(400):
                await teller.delta(content=BLOCK, number=number)
            told.set()

        kit.stages.script = script
        answer = await kit.chat()
        await told.wait()
        teller = kit.stages.tellers[0]
        end = len(kit.log.records("chat.stream"))
        kit.log.truncate_before(kit.log.records_of("chat.stream")[teller.partition], end)
        *heard, last = await answer.events()
        numbers = [event.json["choices"][0]["delta"]["number"] for event in heard]
        assert numbers == list(range(len(numbers)))
        assert last.json["error"]["code"] == "log_moved"


async def test_a_client_that_takes_nothing_for_too_long_is_given_up_and_cancels_trap_42(kits: "Kits") -> None:
    async with kits.serving(Terms(write_timeout_s=1.0, buffer_bytes=200_000)) as kit:

        async def script(teller: "Teller") -> None:
            await teller.open()
            while not teller.cancelled.is_set():
                await teller.delta(content=BLOCK)
                # The writer's own pace: the reader is the slow one.
                await asyncio.sleep(0.001)

        kit.stages.script = script
        answer = await kit.chat()
        said: StreamCancel = await kit.until_said(StreamCancel)
        assert said.request == answer.headers["x-request-id"]


async def test_a_door_that_closes_lets_a_stream_finish_trap_44(kits: "Kits") -> None:
    async with kits.serving(drain_s=20) as kit:
        go = asyncio.Event()

        async def script(teller: "Teller") -> None:
            await teller.open()
            await teller.say("a")
            await go.wait()
            await teller.say("b")
            await teller.end()

        kit.stages.script = script
        answer = await kit.chat()
        await answer.part()
        kit.stop.set()
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", kit.port)
            except ConnectionError:
                break
            writer.close()
            await writer.wait_closed()
        go.set()
        assert [event.data for event in await answer.events()][-1] == "[DONE]"


async def test_a_door_that_cannot_wait_longer_says_where_to_read_on_trap_44(kits: "Kits") -> None:
    async with kits.serving(drain_s=0.3) as kit:
        kit.stages.script = _speaks_and_waits
        answer = await kit.chat(klatch={"conversation": "c 1"})
        await answer.part()
        waiting = asyncio.create_task(kit.chat(stream=False))
        await kit.until_said(ChatRequested, "chat.requests", times=2)
        kit.stop.set()
        (last,) = await answer.events()
        error = last.json["error"]
        assert error["code"] == "unavailable"
        assert error["klatch"]["resume"] == f"/v1/streams/{answer.headers['x-request-id']}?conversation=c%201"
        assert (await waiting).status == 503
        assert kit.said(StreamCancel) == []


async def test_a_door_that_closes_before_an_accepted_reply_is_whole_says_where_to_read_on(kits: "Kits") -> None:
    async with kits.serving(drain_s=0.3) as kit:
        kit.stages.script = lambda teller: teller.open()
        asking = asyncio.create_task(kit.chat(stream=False, klatch={"conversation": "c"}))
        await kit.stages.first()
        kit.stop.set()
        answer = await asking
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (503, "unavailable")
        assert "read on at /v1/streams/" in error["message"]
        assert error["klatch"]["resume"] == f"/v1/streams/{answer.headers['x-request-id']}?conversation=c"
