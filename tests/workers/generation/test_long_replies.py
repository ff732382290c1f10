"""A turn is made of every chunk of its reply: of a long one that takes a while, in which others go on."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
from itertools import count
from typing import Any

import msgspec
import pytest

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Standing, StreamState
from klatch_schemas.events import ChatAdmitted, ChatRequested, Reservation
from klatch_workers.generation.conclude import LONG, Asked, Timing, reply_of, turn, turn_aside

BODY = {"model": "m", "messages": [{"role": "user", "content": "go"}], "logprobs": True}
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


async def rounds_of_the_loop(assembly: Assembly) -> int:
    """How often the loop came round while the turn was made."""
    making = asyncio.ensure_future(turn_aside(ADMITTED, assembly, ASKED, AT, None))
    for rounds in count():
        if making.done():
            assert making.result() == turn(ADMITTED, assembly, ASKED, AT, None)
            return rounds
        await asyncio.sleep(0)
    raise AssertionError


@pytest.mark.parametrize(("chunks", "goes_on"), [(10, False), (4 * LONG, True)])
async def test_the_turn_of_a_long_reply_is_made_while_others_go_on(chunks: int, goes_on: bool) -> None:
    assert (await rounds_of_the_loop(ended_with(chunks)) > 2) is goes_on


async def test_a_long_reply_is_remembered_whole(generation: Any) -> None:
    async with generation.worker():
        remembered = await generation.turn(await generation.admit(f"fake?tokens={2 * LONG}"))
    assert remembered.status == "completed"
    assert len(str(remembered.reply[0]["content"]).split()) == 2 * LONG


def test_no_log_probabilities_are_put_together_for_a_turn() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "aa"}, "finish_reason": None}
    assert reply_of(ended_with(2)).completion()["choices"] == [choice]
