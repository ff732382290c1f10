"""What is made of every chunk of a reply takes a while for a long one, in which others go on."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
from collections.abc import Coroutine
from itertools import count
from typing import Any

import msgspec
import pytest

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Standing, StreamState
from klatch_schemas.events import ChatAdmitted, ChatRequested, Reservation
from klatch_streams.continuing import begun
from klatch_workers.generation.aside import LONG
from klatch_workers.generation.conclude import Asked, Timing, reply_of, turn, turn_aside
from klatch_workers.generation.continuation import begun_aside

BODY = {"model": "m", "messages": [{"role": "user", "content": "go"}], "logprobs": True}
PLAIN = {**BODY, "logprobs": False}
REQUEST = ChatRequested(request="r1", tenant="acme", conversation="c1", body=BODY)
ADMITTED = ChatAdmitted(request=REQUEST, requested_ms=0, reservation=Reservation(tokens=1, expires_ms=0))
ASKED, AT = Asked(spoke=True), Timing(1)


def standing(seq: int) -> Standing:
    said = {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [said]}, "finish_reason": None}
    return Standing(seq, 1, seq, msgspec.Raw(codec.dumps({"choices": [choice]})))


def ended_with(chunks: int) -> Assembly:
    state = StreamState(1, "w", chunks, "completed", settled=True)
    return Assembly(state, [standing(seq) for seq in range(chunks)])


async def rounds_of_the_loop(work: Coroutine[Any, Any, Any], makes: object) -> int:
    """How often the loop came round while the work was done."""
    making = asyncio.ensure_future(work)
    for rounds in count():
        if making.done():
            assert making.result() == makes
            return rounds
        await asyncio.sleep(0)
    raise AssertionError


SHORT_OR_LONG = pytest.mark.parametrize(("chunks", "goes_on"), [(10, False), (4 * LONG, True)])


@SHORT_OR_LONG
async def test_the_turn_of_a_long_reply_is_made_while_others_go_on(chunks: int, goes_on: bool) -> None:
    reply = ended_with(chunks)
    made = turn(ADMITTED, reply, ASKED, AT, None)
    assert (await rounds_of_the_loop(turn_aside(ADMITTED, reply, ASKED, AT, None), made) > 2) is goes_on


@SHORT_OR_LONG
async def test_a_long_reply_is_looked_at_for_being_continued_while_others_go_on(chunks: int, goes_on: bool) -> None:
    reply = ended_with(chunks)
    looked = begun(PLAIN, "continue", reply)
    assert looked
    assert looked.deltas == chunks
    assert (await rounds_of_the_loop(begun_aside(PLAIN, "continue", reply), looked) > 2) is goes_on


async def test_a_long_reply_is_remembered_whole(generation: Any) -> None:
    async with generation.worker():
        remembered = await generation.turn(await generation.admit(f"fake?tokens={2 * LONG}"))
    assert remembered.status == "completed"
    assert len(str(remembered.reply[0]["content"]).split()) == 2 * LONG


def test_no_log_probabilities_are_put_together_for_a_turn() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "aa"}, "finish_reason": None}
    assert reply_of(ended_with(2)).completion()["choices"] == [choice]
