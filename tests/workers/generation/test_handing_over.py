"""Owners come and go: what they finished is not redone, what they began goes on, what they drain is let end."""
# pyright: basic, reportArgumentType=false, reportPrivateUsage=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import random
import re
from collections.abc import Sequence

import pytest
from tests.workers.generation.conftest import Generation
from tests.workers.generation.mortal import Life, World, in_virtual_time, memory_log
from tests.workers.generation.readings import (
    assembled,
    check_no_dead_letters,
    check_settled_once,
    check_turns,
    text_of,
)

from klatch_agents.gateway.continuing import Continues
from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.assembly import ReplyReader, Standing
from klatch_schemas.codec import KIND
from klatch_schemas.errors import Superseded
from klatch_schemas.events import ChatRequested, StreamAttempt, StreamDelta
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_STREAM

MEMORY = {"recent": 5}
TOKEN = re.compile(r"<<c(\d+):(\d+)>>")


async def _check_continued(world: World) -> int:
    """One text without hole or repetition, of one call after another, for every reader; how many calls wrote it."""
    most = 0
    for request in ("r1", "r2"):
        stream = world.stream_of(request)
        assembly = assembled(stream)
        assert (assembly.state.status, assembly.state.settled, assembly.gap) == ("completed", True, None)
        text = text_of(assembly.standing)
        said = [(int(call), int(number)) for call, number in TOKEN.findall(text)]
        assert TOKEN.sub("", text) == ""
        assert [number for _, number in said] == list(range(8)), text
        calls = [call for call, _ in said]
        assert calls == sorted(calls), "who was succeeded says nothing more"
        most = max(most, len(set(calls)))
        chunks = [codec.loads(bytes(one.chunk)) for one in assembly.standing]
        assert len({(chunk["id"], chunk["model"]) for chunk in chunks}) == 1
        _check_readers(stream, text)
        settled = check_settled_once(world, request)
        assert settled.usage.completion_tokens >= 8
    check_turns(world, await world.heads(), {"c1": ["r1", "r2"]})
    check_no_dead_letters(world)
    return most


def _check_readers(stream: object, text: str) -> None:
    """Live from anywhere: the whole text, or told that some of it was taken back."""
    records = list(stream)  # type: ignore[call-overload]
    for live_at in range(len(records)):
        reader, shown = ReplyReader(), list[Standing]()
        try:
            for index, (offset, said) in enumerate(records):
                if index == live_at:
                    shown += [one for one in reader.go_live() if isinstance(one, Standing)]
                if isinstance(one := reader.hear(offset, said), Standing):
                    shown.append(one)
        except Superseded:
            assert text_of(shown) == "".join(f"<<c{c}:{n}>>" for c, n in TOKEN.findall(text_of(shown)))
            continue
        assert text_of(shown) == text


def test_owners_killed_at_any_step_continue_one_text_which_shows_no_seam() -> None:
    async def all_of_them() -> None:
        dice, seams = random.Random(5), 0  # noqa: S311 - no secret
        async with Upstream() as upstream:
            steps, at = 1, 0
            while at < steps:
                log = memory_log()
                generation = Generation(log, upstream, continues="vllm")
                model = "fake?reply=unique&tokens=8&rate=100"
                for _ in range(2):
                    await generation.admit(model, memory=MEMORY, on_crash="continue")
                world = World(generation, log, upstream)
                # Most lives are followed by a short one: a continuation is continued.
                lives = (at, dice.randrange(10, 60)) if at % 3 else (at,)
                try:
                    lived = await world.live_through(*lives)
                    steps = max(steps, at + 2 if lived[0].died.is_set() else 0)
                    seams += await _check_continued(world) - 1
                except BaseException as error:
                    error.add_note(f"lives: {lives}")
                    raise
                finally:
                    await world.end()
                at += 1
        assert at > 40
        assert seams > 5, "hardly anything was continued"

    in_virtual_time(all_of_them())


async def test_a_rolling_restart_hands_over_without_redoing_what_is_finished(generation: Generation) -> None:
    finished = [await generation.admit("fake?reply=unique&tokens=3", conversation=f"c{n}") for n in range(4)]
    first = generation.worker(drain_s=5.0)
    async with first:
        for request in finished:
            await generation.settled(request)
        running = await generation.admit("fake?reply=unique&tokens=30&rate=60", conversation="c1")
        await generation.assembled(running, lambda one: len(one.standing) > 3)
        waiting = await generation.admit("fake?reply=unique&tokens=3", conversation="c1")
        async with generation.worker(drain_s=5.0):
            await generation.settled(running)
    async with generation.worker():
        await generation.settled(waiting)
    for request in (*finished, running, waiting):
        assert (await generation.ended(request)).state.status == "completed"
    opened = [said.request for said in await generation.held(CHAT_STREAM) if isinstance(said, StreamAttempt)]
    assert sorted(opened) == sorted({*opened}), "every request had one attempt"
    assert len(generation.upstream.calls) == 6


async def test_a_shutdown_lets_what_began_end_and_begins_nothing_more(generation: Generation) -> None:
    async with generation.worker(drain_s=20.0):
        running = await generation.admit("fake?reply=unique&tokens=40&rate=100")
        waiting = await generation.admit("fake?reply=unique&tokens=3")
        await generation.assembled(running, lambda one: len(one.standing) > 3)
    ended = await generation.ended(running)
    assert (ended.state.status, ended.state.attempt) == ("completed", 1)
    assert len(generation.upstream.calls) == 1, "the next in line is left to the next owner"
    async with generation.worker():
        assert (await generation.ended(waiting)).state.attempt == 1


@pytest.mark.parametrize("continues", ["none", "vllm"])
async def test_what_a_shutdown_cannot_wait_for_is_superseded_by_the_next_owner(
    generation: Generation, continues: Continues
) -> None:
    generation.continues = continues
    generation.upstream.instead = lambda number: "fake?reply=unique&tokens=60" if number else None
    async with generation.worker(drain_s=0.2):
        model = "fake?reply=unique&tokens=60&fault=stall&fault_after=4"
        running = await generation.admit(model, on_crash="continue")
        await generation.assembled(running, lambda one: len(one.standing) > 3)
    await generation.upstream.changed(lambda: generation.upstream.calls[0].outcome == "left")
    async with generation.worker():
        ended = await generation.ended(running)
    assert (ended.state.status, ended.state.attempt) == ("completed", 2)
    said = TOKEN.findall(text_of(ended.standing))
    assert [int(number) for _, number in said] == list(range(60))
    assert {call for call, _ in said} == ({"1"} if continues == "none" else {"0", "1"})


def test_a_zombies_end_and_the_death_of_the_winner_leave_one_continued_text() -> None:
    async def story() -> None:
        async with Upstream() as upstream:
            log = memory_log()
            generation = Generation(log, upstream, continues="vllm")
            world = World(generation, log, upstream)
            try:
                model = "fake?reply=unique&tokens=8&rate=20"
                request = await generation.admit(model, on_crash="continue")
                await generation.admit(model, on_crash="continue")
                zombie = world.worker(Life())
                await generation.assembled(request, lambda one: len(one.standing) > 2)
                # It lives on, speaks and ends, and does not know that it was succeeded.
                world.expel(zombie)
                winner = world.worker(Life())
                await generation.assembled(request, lambda one: one.state.attempt == 2 and len(one.standing) > 5)
                winner.life.bury()
                world.expel(winner)
                await world.live_through()
                await asyncio.sleep(1)  # whatever the zombie still writes; the clock is virtual
                assert await _check_continued(world) >= 2
            finally:
                await world.end()

    in_virtual_time(story())


def test_what_a_zombie_said_right_before_it_was_superseded_is_continued_as_well() -> None:
    """Open, read back, then speak: the text to go on from is that of the opening's place in the log."""

    async def story() -> None:
        async with Upstream() as upstream:
            log = memory_log()
            generation = Generation(log, upstream, continues="vllm")
            world = World(generation, log, upstream)
            request = await generation.admit("fake?reply=unique&tokens=8", on_crash="continue")
            await generation.write(CHAT_STREAM, "c1", _opening(request))
            for number in (0, 1):
                await generation.write(CHAT_STREAM, "c1", _token(request, number))

            async def speak_before_the_opening(drafts: Sequence[Draft]) -> None:
                if any(dict(draft.headers).get(KIND) == StreamAttempt.KIND.encode() for draft in drafts):
                    await generation.write(CHAT_STREAM, "c1", _token(request, 2))

            log._appending = speak_before_the_opening
            try:
                world.worker(Life(reads_late_s=0.05))
                ended = await generation.ended(request)
                said = [(int(call), int(number)) for call, number in TOKEN.findall(text_of(ended.standing))]
                assert said == [(9, 0), (9, 1), (9, 2), *((0, number) for number in range(3, 8))]
            finally:
                await world.end()

    in_virtual_time(story())


def _opening(request: ChatRequested) -> StreamAttempt:
    return StreamAttempt(request=request.request, tenant="acme", conversation="c1", attempt=1, writer="zombie")


def _token(request: ChatRequested, number: int) -> StreamDelta:
    chunk = {"id": "x", "model": "fake", "choices": [{"index": 0, "delta": {"content": f"<<c9:{number}>>"}}]}
    return StreamDelta(request=request.request, attempt=1, writer="zombie", seq=number, chunk=chunk)
