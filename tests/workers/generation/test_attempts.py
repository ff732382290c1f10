"""An answer that breaks off is begun anew or continued by the next attempt, whoever failed: the model or the owner."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.workers.generation.conftest import Generation
from tests.workers.generation.readings import text_of

from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import ChatRequested, StreamAttempt, StreamCancel
from klatch_schemas.topics import CHAT_STREAM
from klatch_workers.generation.request import FIRST_PAUSE_S
from klatch_workers.torture.evidence import Stall
from klatch_workers.torture.stalls import stalled_ms, watch

TOKENS = re.compile(r"<<c(\d+):(\d+)>>")
BREAKS = "fake?reply=unique&tokens=8&fault={}&fault_after=4"


def numbers_of(text: str) -> list[tuple[int, int]]:
    """Call and number of every unique token."""
    return [(int(call), int(number)) for call, number in TOKENS.findall(text)]


async def modes(generation: Generation, request: ChatRequested) -> list[str]:
    said = [one for one in await generation.held(CHAT_STREAM) if isinstance(one, StreamAttempt)]
    return [one.mode for one in said if one.request == request.request]


async def heal(upstream: Upstream, after: int, model: str = "fake?reply=unique&tokens=8") -> None:
    """From call number `after` on, the server answers as `model` says and no longer as it was asked to."""
    upstream.instead = lambda number: model if number >= after else None


# --- the model fails


@pytest.mark.parametrize("fault", ["drop", "reset", "no-finish", "error-event", "done-without-finish"])
async def test_an_answer_that_broke_off_is_begun_anew_and_its_beginning_is_void(
    generation: Generation, fault: str
) -> None:
    await heal(generation.upstream, after=1)
    async with generation.worker():
        request = await generation.admit(BREAKS.format(fault))
        ended = await generation.ended(request)
        settled = await generation.settled(request)
    assert (ended.state.status, ended.state.attempt) == ("completed", 2)
    assert numbers_of(text_of(ended.standing)) == [(1, number) for number in range(8)]
    assert await modes(generation, request) == ["restart", "restart"]
    assert (settled.usage.completion_tokens, settled.usage.estimated) == (8, False)


async def test_a_model_that_breaks_off_every_time_is_asked_three_times(generation: Generation) -> None:
    async with generation.worker():
        request = await generation.admit(BREAKS.format("drop"))
        ended = await generation.ended(request)
    assert (ended.state.status, ended.state.attempt) == ("failed", 3)
    assert len(generation.upstream.calls) == 3
    assert ended.end is not None
    assert ended.end.error is not None
    assert ended.end.error.code == "model_error"


async def test_what_failed_before_its_first_chunk_is_tried_again_in_the_same_attempt(generation: Generation) -> None:
    await heal(generation.upstream, after=2)
    async with generation.worker():
        request = await generation.admit("fake?status=503")
        ended = await generation.ended(request)
    assert (ended.state.status, ended.state.attempt, len(generation.upstream.calls)) == ("completed", 1, 3)


@pytest.mark.parametrize("script", ["status=400", "fault=garbage&fault_after=4&reply=unique&tokens=8"])
async def test_what_another_try_does_not_mend_is_not_tried_again(generation: Generation, script: str) -> None:
    async with generation.worker():
        request = await generation.admit(f"fake?{script}")
        assert (await generation.ended(request)).state.status == "failed"
    assert len(generation.upstream.calls) == 1


async def test_a_server_is_left_alone_as_long_as_it_asks(generation: Generation) -> None:
    await heal(generation.upstream, after=1)
    async with generation.worker():
        request = await generation.admit("fake?status=429&retry_after=1")
        assert (await generation.ended(request)).state.status == "completed"
    first, second = generation.upstream.calls
    assert second.started - first.started >= 1.0


async def test_answers_that_broke_off_together_are_not_asked_for_again_together(generation: Generation) -> None:
    random.seed(7)
    await heal(generation.upstream, after=4)
    with capture_logs() as logged:
        async with generation.worker():
            asked = [await generation.admit(BREAKS.format("drop"), conversation=f"c{number}") for number in range(4)]
            ended = [await generation.ended(request) for request in asked]
    assert {one.state.status for one in ended} == {"completed"}
    pauses = [said["wait_s"] for said in logged if said["event"] == "model.retried"]
    assert len(set(pauses)) == 4
    assert all(FIRST_PAUSE_S <= pause <= 2 * FIRST_PAUSE_S for pause in pauses)


async def test_a_server_that_asks_for_more_patience_than_there_is_has_refused(generation: Generation) -> None:
    async with generation.worker():
        request = await generation.admit("fake?status=429&retry_after=3600")
        ended = await generation.ended(request)
    assert ended.end is not None
    assert ended.end.error is not None
    assert ended.end.error.retry_after_ms == 3_600_000
    assert len(generation.upstream.calls) == 1


async def test_a_conversation_that_waits_for_its_model_holds_up_no_other(generation: Generation) -> None:
    async with generation.worker():
        waiting = await generation.admit("fake?status=503&retry_after=5")
        behind = await generation.admit("fake?text=later")
        await generation.upstream.changed(lambda: len(generation.upstream.calls) == 1)
        # c2 is in the same partition.
        other = await generation.admit("fake?text=now", conversation="c2")
        assert (await generation.ended(other)).state.status == "completed"
        assert [call.body["model"] for call in generation.upstream.calls][1:] == ["fake?text=now"]
        await cancel(generation, waiting)
        assert (await generation.ended(behind)).state.status == "completed"


# --- and the answer is continued


@pytest.fixture(params=["vllm", "prefill"])
def continuing(request: pytest.FixtureRequest, generation: Generation) -> Generation:
    generation.continues = request.param
    return generation


def check_continued(ended: Assembly, calls: list[int]) -> None:
    """One text of several calls, in one reply."""
    assert ended.state.status == "completed"
    said = numbers_of(text_of(ended.standing))
    assert [number for _, number in said] == list(range(8)), "no token is missing or doubled"
    assert sorted({call for call, _ in said}) == calls
    assert [call for call, _ in said] == sorted(call for call, _ in said)
    chunks: list[dict[str, Any]] = [codec.loads(bytes(one.chunk)) for one in ended.standing]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1, "[12]"
    assert ["role" in choice["delta"] for chunk in chunks for choice in chunk["choices"]].count(True) == 1, "[13]"


@pytest.mark.parametrize("fault", ["drop", "error-event"])
async def test_an_answer_that_broke_off_is_continued_from_what_stands(continuing: Generation, fault: str) -> None:
    await heal(continuing.upstream, after=1)
    async with continuing.worker():
        request = await continuing.admit(BREAKS.format(fault), on_crash="continue")
        ended = await continuing.ended(request)
        settled = await continuing.settled(request)
        turn = await continuing.turn(request)
    check_continued(ended, [0, 1])
    assert await modes(continuing, request) == ["restart", "continue"]
    assert turn.reply[0]["content"] == text_of(ended.standing)
    # By klatch's own count of what stood: the role's chunk is none.
    assert (settled.usage.completion_tokens, settled.usage.estimated) == (8, True)


async def test_an_answer_that_breaks_off_twice_is_continued_twice(continuing: Generation) -> None:
    continuing.upstream.instead = lambda number: (
        "fake?reply=unique&tokens=8&fault=drop&fault_after=2" if number == 1 else None if number == 0 else FINE
    )
    async with continuing.worker():
        request = await continuing.admit(BREAKS.format("drop"), on_crash="continue")
        check_continued(await continuing.ended(request), [0, 1, 2])


FINE = "fake?reply=unique&tokens=8"


async def test_a_limit_on_tokens_holds_for_the_whole_answer(continuing: Generation) -> None:
    await heal(continuing.upstream, after=1)
    body = {"model": BREAKS.format("drop"), "max_tokens": 100, "messages": [{"role": "user", "content": "go"}]}
    async with continuing.worker():
        request = await continuing.admit("", body=body, on_crash="continue")
        await continuing.ended(request)
    assert [call.body["max_tokens"] for call in continuing.upstream.calls] == [100, 96]


async def test_a_count_that_the_client_is_shown_is_the_whole_answers(continuing: Generation) -> None:
    await heal(continuing.upstream, after=1)
    async with continuing.worker():
        request = await continuing.admit(BREAKS.format("drop"), on_crash="continue")
        ended = await continuing.ended(request)
    assert ended.end is not None
    assert ended.end.usage is not None
    [trailer] = ended.end.trailer
    assert json.loads(json.dumps(trailer["usage"]))["completion_tokens"] == ended.end.usage.completion_tokens == 8
    assert trailer["id"] == codec.loads(bytes(ended.standing[0].chunk))["id"]


async def test_a_successor_continues_what_a_dead_owner_left(continuing: Generation) -> None:
    await heal(continuing.upstream, after=1)
    request = await continuing.admit(BREAKS.format("stall"), on_crash="continue")
    async with continuing.worker(drain_s=0.0):
        await continuing.assembled(request, lambda one: len(one.standing) > 3)
    async with continuing.worker():
        ended = await continuing.ended(request)
    check_continued(ended, [0, 1])
    assert await modes(continuing, request) == ["restart", "continue"]


async def test_an_answer_that_stands_whole_is_ended_and_not_asked_for_again(generation: Generation) -> None:
    generation.continues = "vllm"
    request = await generation.admit("fake?reply=unique&tokens=3&end_delay=60", on_crash="continue")
    async with generation.worker(drain_s=0.0):
        await generation.assembled(request, lambda one: len(one.standing) == 5)  # role, three tokens, finish
    async with generation.worker():
        ended = await generation.ended(request)
    assert ended.end is not None
    assert (ended.state.status, ended.end.finish_reason) == ("completed", "stop")
    assert len(generation.upstream.calls) == 1


NOT_TEXT: list[tuple[str, dict[str, object]]] = [
    ("tool_calls=2", {}),
    ("reasoning=8", {}),
    ("refusal=true", {}),
    ("reply=unique", {"n": 2}),
    ("reply=unique", {"logprobs": True}),
    ("reply=unique", {"response_format": {"type": "json_object"}}),
]


@pytest.mark.parametrize(("script", "asked"), NOT_TEXT)
async def test_an_answer_that_is_more_than_one_plain_text_is_begun_anew(
    generation: Generation, script: str, asked: dict[str, object]
) -> None:
    """[38]"""
    generation.continues = "vllm"
    body = {"model": f"fake?tokens=8&{script}&fault=drop&fault_after=4", **asked}
    await heal(generation.upstream, 1, f"fake?tokens=8&{script}")
    async with generation.worker():
        request = await generation.admit(
            "", body={**body, "messages": [{"role": "user", "content": "go"}]}, on_crash="continue"
        )
        ended = await generation.ended(request)
    assert ended.state.status == "completed"
    assert await modes(generation, request) == ["restart", "restart"]


async def test_a_server_that_cannot_continue_begins_anew(generation: Generation) -> None:
    await heal(generation.upstream, after=1)
    async with generation.worker():
        request = await generation.admit(BREAKS.format("drop"), on_crash="continue")
        ended = await generation.ended(request)
    assert {call for call, _ in numbers_of(text_of(ended.standing))} == {1}
    assert await modes(generation, request) == ["restart", "restart"]


# --- a cancel or a deadline closes the connection, wherever it comes


async def cancel(generation: Generation, request: ChatRequested) -> None:
    said = StreamCancel(request=request.request, tenant="acme", conversation=request.conversation, by="test")
    await generation.write(CHAT_STREAM, request.conversation, said)


async def run_for(awaited: Coroutine[Any, Any, object]) -> float:
    """How long it took, in milliseconds, but for what the machine ran others instead of this process."""
    stalls, began_ms = list[Stall](), time.time() * 1000
    watching = asyncio.create_task(watch(stalls))
    await awaited
    over_ms = time.time() * 1000
    await asyncio.sleep(0)  # a stall that has just ended is noted
    watching.cancel()
    return over_ms - began_ms - stalled_ms(stalls, began_ms, over_ms)


Until = Callable[[Assembly], object]


@pytest.mark.parametrize(
    ("model", "until"),
    [
        ("fake?header_delay=60", lambda one: one.state.attempt),
        ("fake?first_delay=60", lambda one: one.state.attempt),
        ("fake?reply=unique&tokens=1000&rate=100", lambda one: len(one.standing) > 3),
        ("fake?reply=unique&tokens=8&fault=stall&fault_after=4", lambda one: len(one.standing) > 3),
    ],
    ids=["before the status line", "before the first token", "in the middle", "in a silence"],
)
async def test_a_cancel_closes_the_models_connection_within_a_tenth_of_a_second(
    generation: Generation, model: str, until: Until
) -> None:
    async with generation.worker():
        request = await generation.admit(model)
        await generation.assembled(request, until)
        await generation.upstream.changed(lambda: len(generation.upstream.calls) == 1)
        await cancel(generation, request)
        took_ms = await run_for(generation.upstream.changed(lambda: generation.upstream.calls[0].outcome == "left"))
        assert took_ms < 100
        settled = await generation.settled(request)
    assert settled.status == "cancelled"
    assert settled.usage.estimated


async def test_a_cancel_ends_a_pause_and_the_model_is_not_asked_again(generation: Generation) -> None:
    async with generation.worker():
        request = await generation.admit("fake?status=503&retry_after=5")
        await generation.upstream.changed(lambda: len(generation.upstream.calls) == 1)
        await cancel(generation, request)
        async with asyncio.timeout(2):
            assert (await generation.settled(request)).status == "cancelled"
    assert len(generation.upstream.calls) == 1


async def test_a_cancel_between_two_attempts_lets_the_second_not_begin(generation: Generation) -> None:
    async with generation.worker():
        request = await generation.admit(BREAKS.format("drop"))
        await generation.upstream.changed(lambda: any(call.outcome == "fault" for call in generation.upstream.calls))
        await cancel(generation, request)
        settled = await generation.settled(request)
    assert (settled.status, settled.usage.estimated) == ("cancelled", True)
    assert settled.usage.completion_tokens >= 4, "what was said before is paid for"
    assert len(generation.upstream.calls) == 1


async def test_a_cancel_while_the_verdict_is_awaited_ends_the_request_without_a_model(generation: Generation) -> None:
    async with generation.worker():
        request = generation.request("fake")
        await generation.write_admission(request)
        after = await generation.admit("fake?text=next", conversation="c2")
        await generation.ended(after)
        await cancel(generation, request)
        assert (await generation.settled(request)).usage.total_tokens == 0
        await generation.write_verdict(request)
        last = await generation.admit("fake?text=last")
        await generation.ended(last)
    assert [call.body["model"] for call in generation.upstream.calls] == ["fake?text=next", "fake?text=last"]
