"""An admission that was redriven: answered if nobody has, and never twice, whenever and however often it comes."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import time
from typing import Any

import pytest
from tests.workers.generation.test_generation import text_of

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.codec import EVENT_ID
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRequested,
    Reservation,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
    Usage,
    UsageSettled,
)
from klatch_schemas.records import Cause, Partition, Record, partition_of
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS, DEAD_LETTERS, Namespace
from klatch_streams.dead_letters import DeadLetter, dead_letter
from klatch_streams.redriving import redriven

PLACE = partition_of(b"c1", 2)
CALLED = "fake?reply=unique&tokens=3"


def died(request: ChatRequested, offset: int = 900, age_ms: int = 0) -> Record:
    """The letter of an admission that stood at `offset`, and could not be brought to its end."""
    now_ms = int(time.time() * 1000) - age_ms
    admitted = ChatAdmitted(
        request=request, requested_ms=now_ms, reservation=Reservation(tokens=100, expires_ms=now_ms)
    )
    cause = Cause(Partition(CHAT_REQUESTS.name, 0), int(request.request.removeprefix("r")), 0)
    draft = codec.draft(CHAT_ADMITTED.name, request.conversation, admitted, cause=cause)
    place = Partition(CHAT_ADMITTED.name, PLACE)
    record = Record(place, offset, now_ms, draft.key, draft.value, tuple(draft.headers))
    letter = dead_letter(record, Namespace(), "generation", DeadLetter("failed"))
    return Record(Partition(DEAD_LETTERS.name, 0), 0, now_ms, letter.key, letter.value, tuple(letter.headers))


async def redrive(generation: Any, letter: Record) -> None:
    await generation.log.append([redriven(letter, letter.value)])


async def answered(generation: Any, request: ChatRequested) -> tuple[int, int, int]:
    """How many ends, settlements and turns of the request stand in the log."""
    ends, settled, turns = [
        sum(said.request == request.request for said in await generation.held(topic) if isinstance(said, kind))
        for topic, kind in ((CHAT_STREAM, StreamEnd), (CHAT_REQUESTS, UsageSettled))
    ] + [sum(said.request == request.request for said in await generation.held(CHAT_TURNS))]
    return ends, settled, turns


async def after_another(generation: Any) -> None:
    """All that was redriven before is done: the conversation has gone on."""
    await generation.turn(await generation.admit(CALLED))


async def test_a_redriven_admission_is_answered_once_however_often_it_is_redriven(generation: Any) -> None:
    request = generation.request(CALLED)
    await generation.write_verdict(request)
    async with generation.worker():
        for _ in range(3):
            await redrive(generation, died(request))
        assert (await generation.ended(request)).state.status == "completed"
        await after_another(generation)
    assert await answered(generation, request) == (1, 1, 1)
    assert len(generation.upstream.calls) == 2


async def test_what_was_answered_and_forgotten_long_ago_is_not_answered_again(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit(CALLED)
        await generation.turn(request)
    # It restores past all that.
    async with generation.worker():
        await redrive(generation, died(request))
        await after_another(generation)
    assert await answered(generation, request) == (1, 1, 1)


async def test_a_verdict_that_nobody_remembers_is_found(generation: Any) -> None:
    request = generation.request(CALLED)
    async with generation.worker():
        await generation.write_verdict(request)
        await after_another(generation)
    async with generation.worker():
        await redrive(generation, died(request))
        assert (await generation.ended(request)).state.status == "completed"


async def test_a_stream_that_ended_before_a_crash_is_concluded_under_the_first_admissions_ids(generation: Any) -> None:
    request = generation.request(CALLED)
    named = {"request": request.request, "tenant": "acme", "conversation": "c1", "attempt": 1, "writer": "w"}
    delta = codec.encode_delta(
        codec.delta_prefix(request.request, 1, "w"), 0, b'{"choices":[{"index":0,"delta":{"content":"so far"}}]}'
    )
    await generation.write(CHAT_STREAM, "c1", StreamAttempt(**named))
    await generation.log.append([codec.delta_draft(CHAT_STREAM.name, b"c1", None, delta)])
    await generation.write(CHAT_STREAM, "c1", StreamEnd(**named, seq=1, status="completed", usage=Usage()))
    async with generation.worker():
        await after_another(generation)
    async with generation.worker():
        for _ in range(2):
            await redrive(generation, died(request, offset=77))
        turn = await generation.turn(request)
        await after_another(generation)
    assert turn.reply[0]["content"] == "so far"
    assert await answered(generation, request) == (1, 1, 1)
    assert len(generation.upstream.calls) == 2
    [settled] = [one for one in generation.log.records(CHAT_REQUESTS.name) if request.request.encode() in one.value]
    said = codec.decode_as(UsageSettled, settled.value)
    first = codec.draft("t", "k", said, cause=Cause(Partition(CHAT_ADMITTED.name, PLACE), 77, 0))
    assert settled.header(EVENT_ID) == dict(first.headers)[EVENT_ID]


async def test_a_stream_that_retention_has_taken_is_known_by_its_turn(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit(CALLED)
        await generation.turn(request)
    place = Partition(CHAT_STREAM.name, PLACE)
    generation.log.truncate_before(place, (await generation.log.bounds(place))[1])
    async with generation.worker():
        await redrive(generation, died(request))
        await after_another(generation)
    assert (await answered(generation, request))[1:] == (1, 1)
    assert len(generation.upstream.calls) == 2


async def test_an_attempt_that_was_left_open_is_superseded(generation: Any) -> None:
    request = generation.request(CALLED)
    await generation.write_verdict(request)
    opening = StreamAttempt(request=request.request, tenant="acme", conversation="c1", attempt=4, writer="dead")
    await generation.write(CHAT_STREAM, "c1", opening)
    async with generation.worker():
        await after_another(generation)
        await redrive(generation, died(request))
        ended = await generation.ended(request)
    assert (ended.state.attempt, ended.state.status) == (5, "completed")


async def test_another_tenants_request_of_the_same_id_is_another_request(generation: Any) -> None:
    async with generation.worker():
        other = await generation.admit(CALLED, tenant="rival", conversation="c1")
        await generation.turn(other)
        mine = generation.request(CALLED, request=other.request)
        await generation.write_verdict(mine)
        await redrive(generation, died(mine))
        assembly = Assembly()
        async for offset, said in generation.follow(CHAT_STREAM):
            if getattr(said, "tenant", "acme") == "acme":
                assembly.hear(offset, said)
            if assembly.state.settled:
                break
    assert assembly.state.status == "completed"


async def test_the_turn_of_a_redriven_request_follows_those_that_were_answered_meanwhile(generation: Any) -> None:
    request = generation.request(CALLED)
    await generation.write_verdict(request)
    async with generation.worker():
        await after_another(generation)
        await after_another(generation)
        await redrive(generation, died(request, offset=0))
        turn = await generation.turn(request)
        echoed = await generation.admit("fake?reply=echo-messages", memory={"recent": 10})
        said = text_of(await generation.ended(echoed))
    assert turn.previous == 1
    assert said.count("<<") == 3 * 3


@pytest.mark.parametrize("redrive_again", [False, True])
async def test_a_cancel_that_stood_before_the_redrive_wins(generation: Any, redrive_again: bool) -> None:
    request = generation.request(CALLED)
    await generation.write_verdict(request)
    named = {"request": request.request, "tenant": "acme", "conversation": "c1"}
    await generation.write(CHAT_STREAM, "c1", StreamCancel(**named, by="somebody"))
    async with generation.worker():
        await after_another(generation)
        for _ in range(1 + redrive_again):
            await redrive(generation, died(request))
        await generation.settled(request)
        await after_another(generation)
    assert await answered(generation, request) == (1, 1, 0)
    assert len(generation.upstream.calls) == 2
