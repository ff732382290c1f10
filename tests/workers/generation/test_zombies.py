"""An owner that lost its partitions goes on writing beside its successor: readers agree, and every request ends once.

The zombie is a whole worker whose tasks live on after its group expelled it, and a hand that writes what one could
write. Attempts are bounded: nobody fights for a stream.
"""
# pyright: reportPrivateUsage=false
# The log is told late what to do before appends.

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import pytest
from pydantic import JsonValue
from tests.workers.generation.conftest import Generation
from tests.workers.generation.mortal import Life, World, in_virtual_time, memory_log
from tests.workers.generation.readings import (
    assembled,
    check_no_dead_letters,
    check_settled_once,
    every_reader_agrees,
    lineage,
    text_of,
)

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.codec import KIND
from klatch_schemas.events import ChatRequested, Event, StreamAttempt, StreamCancel, StreamDelta, StreamEnd
from klatch_schemas.ids import Writer
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_STREAM


@asynccontextmanager
async def a_world() -> AsyncGenerator[World]:
    log = memory_log()
    async with Upstream() as upstream:
        world = World(Generation(log, upstream), log, upstream)
        try:
            yield world
        finally:
            await world.end()


def check(world: World, request: ChatRequested, status: str, attempts: int) -> None:
    stream = world.stream_of(request.request)
    assembly = assembled(stream)
    assert (assembly.state.status, assembly.state.settled, assembly.gap) == (status, True, None)
    assert assembly.state.attempt <= attempts
    assert len([said for _, said in stream if isinstance(said, StreamAttempt)]) <= attempts + 1
    every_reader_agrees(stream)
    lineage(text_of(assembly.standing))
    assert check_settled_once(world, request.request).status == status
    for turns in world.turns().values():
        for turn in turns.values():
            assert turn.reply[0]["content"] == text_of(assembly.standing)
    check_no_dead_letters(world)


@pytest.mark.parametrize("speaks_for", [0, 1, 3, 7])
@pytest.mark.parametrize("successor_dies", [False, True])
def test_a_worker_that_was_expelled_while_it_speaks_changes_nothing(speaks_for: int, successor_dies: bool) -> None:
    async def story() -> None:
        async with a_world() as world:
            request = await world.generation.admit("fake?reply=unique&tokens=12&rate=100")
            zombie = world.worker(Life())
            await world.generation.assembled(request, lambda one: one.state.attempt and len(one.standing) >= speaks_for)
            # Its runner is not told: only its next commit would find out, and it is given none to make.
            world.expel(zombie)
            if successor_dies:
                successor = world.worker(Life(25))
                done = asyncio.ensure_future(world.generation.settled(request))
                await successor.died_or_done(done)
                done.cancel()
                world.expel(successor)
            await world.live_through()
            check(world, request, "completed", attempts=4)

    in_virtual_time(story())


async def _says(world: World, request: ChatRequested, *events: Event) -> None:
    for event in events:
        await world.generation.write(CHAT_STREAM, request.conversation, event)


def opening(request: ChatRequested, attempt: int, writer: str = "zombie") -> StreamAttempt:
    return StreamAttempt(
        request=request.request,
        tenant=request.tenant,
        conversation=request.conversation,
        attempt=attempt,
        writer=Writer(writer),
    )


def delta(request: ChatRequested, attempt: int, seq: int, writer: str = "zombie") -> StreamDelta:
    chunk: dict[str, JsonValue] = {"choices": [{"index": 0, "delta": {"content": f"<<{writer}:{seq}>>"}}]}
    return StreamDelta(request=request.request, attempt=attempt, writer=Writer(writer), seq=seq, chunk=chunk)


def end(request: ChatRequested, attempt: int, seq: int, writer: str = "zombie") -> StreamEnd:
    return StreamEnd(
        request=request.request,
        tenant=request.tenant,
        conversation=request.conversation,
        attempt=attempt,
        writer=Writer(writer),
        seq=seq,
        status="completed",
        finish_reason="stop",
    )


def test_an_opening_with_the_same_number_that_came_first_is_watched_until_it_ends() -> None:
    async def story() -> None:
        async with a_world() as world:
            worker = world.worker(Life())
            await worker.runner.ready.wait()
            request = world.generation.request("fake?reply=unique&tokens=9&rate=100")
            await _says(world, request, opening(request, 1), delta(request, 1, 0))
            await world.generation.write_verdict(request)
            await world.generation.write_admission(request)
            await world.generation.assembled(request, lambda one: one.state.attempt == 2 and len(one.standing) > 2)
            # It was given up when the request was taken, and now it speaks again, and ends.
            await _says(world, request, delta(request, 1, 1), end(request, 1, 2))
            await world.live_through()
            check(world, request, "completed", attempts=2)

    in_virtual_time(story())


def test_an_opening_that_comes_while_a_request_waits_its_turn_is_that_of_a_successor() -> None:
    """An owner that was expelled, and does not know, concludes what it has and comes to what its successor speaks."""

    async def story() -> None:
        async with a_world() as world:
            first = await world.generation.admit("fake?reply=unique&tokens=40&rate=10")
            worker = world.worker(Life())
            await world.generation.assembled(first, lambda one: len(one.standing) > 2)
            waiting = await world.generation.admit("fake?reply=unique&tokens=9&rate=100")
            await asyncio.sleep(1)  # it has been met; the clock is virtual
            await _says(world, waiting, opening(waiting, 1, "successor"), delta(waiting, 1, 0, "successor"))
            await world.generation.settled(first)
            await asyncio.sleep(1)  # it is its turn; the clock is virtual
            await _says(world, waiting, delta(waiting, 1, 1, "successor"), end(waiting, 1, 2, "successor"))
            await world.generation.settled(waiting)
            await worker.stop()
            stream = world.stream_of(waiting.request)
            every_reader_agrees(stream)
            assert text_of(assembled(stream).standing) == "<<successor:0>><<successor:1>>"
            assert check_settled_once(world, waiting.request).status == "completed"
            assert len(world.upstream.calls) == 1

    in_virtual_time(story())


def test_a_foreign_attempt_that_takes_over_and_finishes_is_settled_and_not_fought() -> None:
    async def story() -> None:
        async with a_world() as world:
            request = await world.generation.admit("fake?reply=unique&tokens=1000&rate=100")
            worker = world.worker(Life())
            await world.generation.assembled(request, lambda one: len(one.standing) > 2)
            await _says(world, request, opening(request, 2), delta(request, 2, 0), delta(request, 2, 1))
            for seq in (2, 3, 4):
                await asyncio.sleep(7)  # the clock is virtual: less than the patience of a watcher
                await _says(world, request, delta(request, 2, seq))
            await _says(world, request, end(request, 2, 5))
            await world.generation.settled(request)
            await worker.stop()
            check(world, request, "completed", attempts=2)
            assert text_of(assembled(world.stream_of(request.request)).standing).startswith("<<zombie:0>>")
            assert [call.outcome for call in world.upstream.calls] == ["left"]

    in_virtual_time(story())


def test_a_foreign_attempt_that_takes_over_and_dies_is_succeeded_after_a_while() -> None:
    async def story() -> None:
        async with a_world() as world:
            request = await world.generation.admit("fake?reply=unique&tokens=20&rate=100")
            worker = world.worker(Life())
            await world.generation.assembled(request, lambda one: len(one.standing) > 2)
            await _says(world, request, opening(request, 2), delta(request, 2, 0))
            ended = await world.generation.ended(request)
            assert ended.state.attempt == 3
            await _says(world, request, delta(request, 2, 1), end(request, 2, 2))
            await world.generation.settled(request)
            await worker.stop()
            check(world, request, "completed", attempts=3)

    in_virtual_time(story())


def test_an_end_or_deltas_of_an_attempt_that_is_not_in_force_are_nothing() -> None:
    async def story() -> None:
        async with a_world() as world:
            request = await world.generation.admit("fake?reply=unique&tokens=20&rate=100")
            worker = world.worker(Life())
            await world.generation.assembled(request, lambda one: len(one.standing) > 2)
            await _says(
                world, request, end(request, 1, 0), end(request, 0, 0), delta(request, 1, 3), opening(request, 1)
            )
            await world.generation.settled(request)
            await worker.stop()
            check(world, request, "completed", attempts=1)

    in_virtual_time(story())


def test_a_cancel_right_before_the_end_is_what_is_settled_however_late_the_log_is_read() -> None:
    async def story() -> None:
        async with a_world() as world:
            request = await world.generation.admit("fake?reply=unique&tokens=5")
            cancel = StreamCancel(
                request=request.request, tenant=request.tenant, conversation=request.conversation, by="test"
            )

            async def cancel_before_end(drafts: Sequence[Draft]) -> None:
                if any(dict(draft.headers).get(KIND) == StreamEnd.KIND.encode() for draft in drafts):
                    await _says(world, request, cancel)

            world.log._appending = cancel_before_end
            worker = world.worker(Life(reads_late_s=0.05))
            await world.generation.settled(request)
            await worker.stop()
            check(world, request, "cancelled", attempts=1)

    in_virtual_time(story())


def test_what_comes_for_a_concluded_request_does_not_open_it_again() -> None:
    async def story() -> None:
        async with a_world() as world:
            request = await world.generation.admit("fake?reply=unique&tokens=3")
            worker = world.worker(Life())
            await world.generation.settled(request)
            cancel = StreamCancel(
                request=request.request, tenant=request.tenant, conversation=request.conversation, by="test"
            )
            await _says(world, request, cancel, opening(request, 2), delta(request, 2, 0), end(request, 2, 1))
            await world.generation.write_verdict(request)
            after = await world.generation.admit("fake?reply=unique&tokens=3")
            await world.generation.settled(after)
            await worker.stop()
            await world.live_through()
            stream = world.stream_of(request.request)
            every_reader_agrees(stream)
            assert assembled(stream).state.status == "completed"
            check_settled_once(world, request.request)
            assert len(world.upstream.calls) == 2

    in_virtual_time(story())
