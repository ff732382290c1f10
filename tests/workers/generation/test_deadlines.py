"""A deadline ends a request promptly wherever it is: in line, without a verdict, in a pause, behind a zombie."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import time

from tests.workers.generation.conftest import Generation
from tests.workers.generation.readings import text_of

from klatch_schemas.events import ChatRequested, StreamAttempt, StreamCancel, StreamDelta, StreamEnd
from klatch_schemas.topics import CHAT_STREAM, CHAT_TURNS


def soon(ms: int = 300) -> int:
    return int(time.time() * 1000) + ms


FAR_MS = 4_000
"""A deadline before which something is to have happened, on a machine that stands still for a while as well."""


async def stop(generation: Generation, request: ChatRequested) -> None:
    cancel = StreamCancel(request=request.request, tenant="acme", conversation="c1", by="test")
    await generation.write(CHAT_STREAM, "c1", cancel)


async def test_a_request_that_waits_in_line_expires_there_and_the_turns_keep_their_order(
    generation: Generation,
) -> None:
    async with generation.worker():
        long = await generation.admit("fake?reply=unique&tokens=1000&rate=10")
        late = await generation.admit("fake?text=never", deadline_ms=soon())
        after = await generation.admit("fake?text=after")
        settled = await generation.settled(late)
        assert (settled.status, settled.usage.total_tokens) == ("expired", 0)
        ends = [said for said in await generation.held(CHAT_STREAM) if isinstance(said, StreamEnd)]
        assert [end.request for end in ends] == [late.request], "it did not wait for its turn"
        await stop(generation, long)
        await generation.turn(after)
    assert [turn.request for turn in await generation.held(CHAT_TURNS)] == [long.request, after.request]
    assert "fake?text=never" not in [call.body["model"] for call in generation.upstream.calls]


async def test_a_request_without_a_verdict_expires(generation: Generation) -> None:
    async with generation.worker(), asyncio.timeout(30):
        request = generation.request("fake", deadline_ms=soon())
        await generation.write_admission(request)
        assert (await generation.settled(request)).status == "expired"
    assert not generation.upstream.calls


async def test_a_request_whose_deadline_has_passed_reaches_no_model(generation: Generation) -> None:
    async with generation.worker(), asyncio.timeout(30):
        request = await generation.admit("fake", deadline_ms=soon(-1))
        assert (await generation.settled(request)).status == "expired"
    assert not generation.upstream.calls


async def test_a_deadline_ends_a_pause(generation: Generation) -> None:
    async with generation.worker(), asyncio.timeout(8):
        request = await generation.admit("fake?status=503&retry_after=9", deadline_ms=soon(FAR_MS))
        assert (await generation.settled(request)).status == "expired"
    assert len(generation.upstream.calls) == 1


async def test_a_deadline_ends_what_somebody_else_speaks_and_its_text_stands(generation: Generation) -> None:
    """If it was superseded itself it lets its successor end it: two that both hurry would take over from each other."""
    # Without a deadline a silence of ten seconds is waited for.
    async with generation.worker(), asyncio.timeout(9):
        request = generation.request("fake", deadline_ms=soon(FAR_MS))
        await generation.write_admission(request)
        before = await generation.admit("fake?text=met", conversation="c2")
        await generation.ended(before)
        zombie = StreamAttempt(request=request.request, tenant="acme", conversation="c1", attempt=1, writer="zombie")
        chunk = {"choices": [{"index": 0, "delta": {"content": "half"}}]}
        delta = StreamDelta(request=request.request, attempt=1, writer="zombie", seq=0, chunk=chunk)
        await generation.write(CHAT_STREAM, "c1", zombie)
        await generation.write(CHAT_STREAM, "c1", delta)
        ended = await generation.ended(request)
    assert (ended.state.status, ended.state.attempt) == ("expired", 2)
    assert text_of(ended.standing) == "half"


async def test_a_request_that_nobody_judges_fails_after_a_while_and_may_be_sent_again(generation: Generation) -> None:
    generation.verdict_patience_s = 0.3
    async with generation.worker(), asyncio.timeout(30):
        request = generation.request("fake")
        await generation.write_admission(request)
        behind = await generation.admit("fake?text=behind")
        ended = await generation.ended(request)
        assert (await generation.ended(behind)).state.status == "completed"
    assert ended.end is not None
    assert ended.end.error is not None
    assert (ended.state.status, ended.end.error.code) == ("failed", "unavailable")
    assert len(generation.upstream.calls) == 1
