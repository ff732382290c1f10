"""A request that comes while its conversation is busy waits, is rejected, or takes the place of those before it."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
from typing import Any

import pytest
from tests.workers.generation.conftest import Generation
from tests.workers.generation.mortal import Life, World, in_virtual_time, memory_log
from tests.workers.generation.readings import (
    assembled,
    check_no_dead_letters,
    check_settled_once,
    check_turns,
    every_reader_agrees,
    lineage,
    text_of,
)

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import ChatRequested, StreamCancel, TurnFinished
from klatch_schemas.topics import CHAT_STREAM, CHAT_TURNS

SLOW = "fake?reply=unique&tokens=1000&rate=100"
SHORT = "fake?reply=unique&tokens=3"
MEMORY = {"recent": 5}


async def speaking(generation: Generation, **envelope: Any) -> ChatRequested:
    request = await generation.admit(SLOW, **envelope)
    await generation.assembled(request, lambda assembly: len(assembly.standing) > 3)
    return request


def said_no(ended: Assembly) -> tuple[str | None, str | None]:
    assert ended.end is not None
    return ended.state.status, ended.end.error.code if ended.end.error else None


async def test_a_request_that_is_not_to_wait_is_rejected_while_the_earlier_one_goes_on(generation: Generation) -> None:
    async with generation.worker(drain_s=0.1):
        busy = await speaking(generation)
        request = await generation.admit(SHORT, if_busy="reject")
        assert said_no(await generation.ended(request)) == ("rejected", "conversation_busy")
        settled = await generation.settled(request)
        assert (settled.status, settled.usage.total_tokens) == ("rejected", 0)
        assert (await generation.assembled(busy, lambda one: len(one.standing) > 30)).state.status is None
        assert len(generation.upstream.calls) == 1


@pytest.mark.parametrize("if_busy", ["reject", "interrupt", "rollback"])
async def test_a_conversation_that_is_not_busy_takes_the_request_as_any_other(
    generation: Generation, if_busy: str
) -> None:
    async with generation.worker():
        before = await generation.admit(SHORT, memory=MEMORY)
        await generation.settled(before)
        elsewhere = await speaking(generation, conversation="c2")
        namesake = await speaking(generation, tenant="initech")
        request = await generation.admit(SHORT, if_busy=if_busy, memory=MEMORY)
        assert (await generation.ended(request)).state.status == "completed"
        assert (await generation.turn(request)).previous == 0
        for other in (elsewhere, namesake):
            state = (await generation.assembled(other, lambda one: len(one.standing) > 3)).state
            assert state.status is None
            cancel = StreamCancel(
                request=other.request, tenant=other.tenant, conversation=other.conversation, by="test"
            )
            await generation.write(CHAT_STREAM, other.conversation, cancel)


async def test_an_interruption_cancels_all_earlier_requests_and_what_they_said_is_remembered(
    generation: Generation,
) -> None:
    async with generation.worker():
        running = await speaking(generation, memory=MEMORY)
        waiting = await generation.admit(SHORT)
        request = await generation.admit("fake?reply=echo-messages", if_busy="interrupt", memory=MEMORY)
        ended = await generation.ended(request)
        cut = await generation.ended(running)
        turn = await generation.turn(running)
        nothing = await generation.ended(waiting)
    assert [one.state.status for one in (cut, nothing, ended)] == ["cancelled", "cancelled", "completed"]
    assert turn.status == "cancelled"
    assert "<<c0:0>>" in str(turn.reply[0]["content"])
    assert "<<c0:0>>" in text_of(ended.standing), "the new turn sees what the interrupted one said"
    assert [call.outcome for call in generation.upstream.calls] == ["left", "finished"]
    cancels = [said for said in await generation.held(CHAT_STREAM) if isinstance(said, StreamCancel)]
    assert [(cancel.request, cancel.by) for cancel in cancels] == [
        (running.request, "if_busy"),
        (waiting.request, "if_busy"),
    ]
    assert all(request.request in cancel.reason and not cancel.undo for cancel in cancels)


async def test_a_rolled_back_turn_is_cancelled_for_its_readers_and_remembered_by_nobody(generation: Generation) -> None:
    async with generation.worker():
        first = await generation.admit("fake?text=the heron", memory=MEMORY)
        await generation.settled(first)
        running = await speaking(generation, memory=MEMORY)
        request = await generation.admit("fake?reply=echo-messages", if_busy="rollback", memory=MEMORY)
        heard = text_of((await generation.ended(request)).standing)
        cut = await generation.ended(running)
        settled = await generation.settled(running)
        turn = await generation.turn(request)
    assert (cut.state.status, cut.state.undone) == ("cancelled", True)
    assert cut.standing, "its readers keep what they read"
    assert settled.usage.completion_tokens >= 3, "what was said is paid for"
    assert "the heron" in heard
    assert "<<" not in heard
    assert turn.previous == 0
    turns = [turn.request for turn in await generation.held(CHAT_TURNS)]
    assert turns == [first.request, request.request]


async def test_what_ended_before_the_cancel_is_not_undone(generation: Generation) -> None:
    async with generation.worker():
        done = await generation.admit(SHORT)
        await generation.settled(done)
        late = StreamCancel(
            request=done.request, tenant="acme", conversation="c1", by="if_busy", reason="late", undo=True
        )
        await generation.write(CHAT_STREAM, "c1", late)
        request = await generation.admit(SHORT)
        await generation.settled(request)
    turns = [turn.request for turn in await generation.held(CHAT_TURNS) if isinstance(turn, TurnFinished)]
    assert turns == [done.request, request.request]


async def test_a_successor_forgets_the_turn_that_was_taken_back_too(generation: Generation) -> None:
    request = await generation.admit(SLOW)
    async with generation.worker(drain_s=0.0):
        await generation.assembled(request, lambda assembly: len(assembly.standing) > 3)
    undo = StreamCancel(request=request.request, tenant="acme", conversation="c1", by="if_busy", undo=True)
    await generation.write(CHAT_STREAM, "c1", undo)
    async with generation.worker():
        assert (await generation.settled(request)).status == "cancelled"
    assert not await generation.held(CHAT_TURNS)


async def test_a_waiting_request_that_is_cancelled_is_settled_before_its_turn(generation: Generation) -> None:
    async with generation.worker(drain_s=0.1):
        await speaking(generation)
        waiting = await generation.admit(SHORT)
        cancel = StreamCancel(request=waiting.request, tenant="acme", conversation="c1", by="test")
        await generation.write(CHAT_STREAM, "c1", cancel)
        assert (await generation.settled(waiting)).status == "cancelled"
        assert len(generation.upstream.calls) == 1


# --- killed at every step

WANTED = {
    "reject": ({"r1": {"completed"}, "r2": {"rejected", "completed"}, "r3": {"completed"}}, {"c1"}),
    "interrupt": ({"r1": {"cancelled", "completed"}, "r2": {"cancelled"}, "r3": {"completed"}}, {"c1"}),
    "rollback": ({"r1": {"cancelled", "completed"}, "r2": {"cancelled"}, "r3": {"completed"}}, {"c1"}),
}


async def _script(generation: Generation, if_busy: str) -> None:
    """One that speaks, one that waits or is rejected, one that comes while the first speaks."""
    await generation.admit("fake?reply=unique&tokens=12&rate=100", memory=MEMORY)
    second = "reject" if if_busy == "reject" else "enqueue"
    await generation.admit(SHORT, if_busy=second, memory=MEMORY)
    third = "enqueue" if if_busy == "reject" else if_busy
    await generation.admit(SHORT, if_busy=third, memory=MEMORY)


def _check(world: World, if_busy: str, heads: Any) -> None:
    statuses, _ = WANTED[if_busy]
    kept = list[str]()
    for request, fair in statuses.items():
        stream = world.stream_of(request)
        assembly = assembled(stream)
        assert assembly.state.settled
        assert assembly.state.status in fair, (request, assembly.state.status)
        every_reader_agrees(stream)
        lineage(text_of(assembly.standing))
        assert check_settled_once(world, request).status == assembly.state.status
        if assembly.standing and not assembly.state.undone:
            kept.append(request)
    check_turns(world, heads, {"c1": kept})
    if if_busy == "rollback":
        turns = [turn.request for turns in world.turns().values() for turn in turns.values()]
        undone = {request for request in statuses if assembled(world.stream_of(request)).state.undone}
        assert undone.isdisjoint(turns)
    check_no_dead_letters(world)


@pytest.mark.parametrize("if_busy", ["reject", "interrupt", "rollback"])
def test_an_owner_killed_at_any_step_of_the_decision_and_its_successor_come_to_one_end(if_busy: str) -> None:
    async def all_of_them() -> None:
        async with Upstream() as upstream:
            steps, at = 1, 0
            while at < steps:
                log = memory_log()
                generation = Generation(log, upstream)
                await _script(generation, if_busy)
                world = World(generation, log, upstream)
                try:
                    lived = await world.live_through(at)
                    steps = max(steps, at + 2 if lived[0].died.is_set() else 0)
                    _check(world, if_busy, await world.heads())
                except BaseException as error:
                    error.add_note(f"killed at step {at}")
                    raise
                finally:
                    await world.end()
                at += 1
        assert at > 30

    in_virtual_time(all_of_them())


def test_two_owners_at_once_decide_alike() -> None:
    async def story() -> None:
        async with Upstream() as upstream:
            log = memory_log()
            generation = Generation(log, upstream)
            world = World(generation, log, upstream)
            try:
                running = await generation.admit(SLOW, memory=MEMORY)
                zombie = world.worker(Life())
                await generation.assembled(running, lambda one: len(one.standing) > 3)
                request = await generation.admit(SHORT, if_busy="rollback", memory=MEMORY)
                world.expel(zombie)
                world.worker(Life())
                await generation.settled(request)
                await asyncio.sleep(1)  # whatever the zombie still writes; the clock is virtual
                for one, status in ((running, "cancelled"), (request, "completed")):
                    stream = world.stream_of(one.request)
                    every_reader_agrees(stream)
                    assert assembled(stream).state.status == status
                    assert check_settled_once(world, one.request).status == status
                turns = {turn.request for turns in world.turns().values() for turn in turns.values()}
                assert turns == {request.request}
            finally:
                await world.end()

    in_virtual_time(story())
