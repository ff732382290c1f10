"""A generation worker is killed at every step, twice in a row, and while it restores: nothing in the log may show it.

The steps are those of `mortal.py`: every append, read, commit and batch of chunks, before and after it takes effect.
Every call of the model says something else, so that text of two calls in one reply cannot go unseen.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

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
from klatch_schemas.events import ChatRequested, StreamCancel, TrustVerdict
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_STREAM

# c1 and c2 are in one partition, c4 is in the other.
STATUSES = {"r1": "completed", "r2": "completed", "r3": "completed", "r4": "cancelled", "r5": "blocked", "r6": "failed"}
TOKENS = {"r1": 6, "r2": 5, "r3": 2}
TURNS = {"c1": ["r1", "r2"], "c2": ["r3", "r4"], "c4": ["r6"]}


async def _script(generation: Generation) -> ChatRequested:
    """Six requests of three conversations; returns the one that is to be cancelled."""
    memory = {"recent": 5}
    await generation.admit("fake?reply=unique&tokens=6&rate=200", conversation="c1", memory=memory)
    await generation.admit("fake?reply=unique&tokens=5&rate=100", conversation="c1", memory=memory)
    await generation.admit("fake?reply=unique&tokens=2", conversation="c2", memory=memory)
    cancelled = await generation.admit("fake?reply=unique&tokens=1000&rate=100", conversation="c2", memory=memory)
    blocked = generation.request("fake?reply=unique", conversation="c4")
    await generation.write_verdict(blocked, _block(blocked))
    await generation.write_admission(blocked)
    await generation.admit("fake?reply=unique&tokens=4&rate=100&fault=drop&fault_after=2", conversation="c4")
    return cancelled


def _block(request: ChatRequested) -> TrustVerdict:
    return TrustVerdict(
        request=request.request,
        tenant=request.tenant,
        conversation=request.conversation,
        stage="input",
        decision="block",
        policy="test",
    )


async def _cancel_once_it_speaks(generation: Generation, request: ChatRequested) -> None:
    await generation.assembled(request, lambda assembly: len(assembly.standing) > 2)
    cancel = StreamCancel(request=request.request, tenant=request.tenant, conversation=request.conversation, by="test")
    await generation.write(CHAT_STREAM, request.conversation, cancel)


@asynccontextmanager
async def a_world(upstream: Upstream) -> AsyncGenerator[World]:
    """The script in a log of its own."""
    log = memory_log()
    generation = Generation(log, upstream)
    cancelling = asyncio.create_task(_cancel_once_it_speaks(generation, await _script(generation)))
    world = World(generation, log, upstream)
    try:
        yield world
    finally:
        cancelling.cancel()
        with suppress(asyncio.CancelledError):
            await cancelling
        await world.end()


async def check(world: World) -> None:
    """What must hold of the log, whoever died."""
    for request, status in STATUSES.items():
        stream = world.stream_of(request)
        assembly = assembled(stream)
        assert (assembly.state.status, assembly.state.settled) == (status, True), request
        every_reader_agrees(stream)
        _, tokens = lineage(text_of(assembly.standing))
        assert tokens == TOKENS.get(request, tokens), request
        settled = check_settled_once(world, request)
        assert settled.status == status
        assert settled.usage.completion_tokens >= tokens, f"{request}: text that stands is not billed"
    check_turns(world, await world.heads(), TURNS)
    for turn in [turn for turns in world.turns().values() for turn in turns.values()]:
        assert turn.reply[0]["content"] == text_of(assembled(world.stream_of(turn.request)).standing)
        assert turn.messages, f"the turn of {turn.request} does not hold what was asked"
    check_no_dead_letters(world)
    await _check_nothing_is_left(world)


async def _check_nothing_is_left(world: World) -> None:
    """The next owner restores and finds nothing to do."""
    before, calls = len(world.log.records(CHAT_STREAM.name)), len(world.upstream.calls)
    for partition in world.log.records_of(CHAT_ADMITTED.name):
        assert world.committed(partition) == world.log.held(partition).end
    mortal = world.worker(Life())
    await mortal.runner.ready.wait()
    await mortal.stop()
    assert (len(world.log.records(CHAT_STREAM.name)), len(world.upstream.calls)) == (before, calls)


async def _steps() -> int:
    """How many steps an undisturbed worker takes."""
    async with Upstream() as upstream, a_world(upstream) as world:
        [life] = await world.live_through()
        await check(world)
    return life.taken


def _each(stories: Callable[[int], Sequence[tuple[int, ...]]]) -> None:
    async def all_of_them() -> None:
        steps = await _steps()
        assert steps > 100
        async with Upstream() as upstream:
            for lives in stories(steps):
                async with a_world(upstream) as world:
                    try:
                        await world.live_through(*lives)
                        await check(world)
                    except BaseException as error:
                        error.add_note(f"lives: {lives} of {steps} steps")
                        raise

    in_virtual_time(all_of_them())


def test_a_worker_killed_at_any_step_leaves_a_log_that_does_not_show_it() -> None:
    _each(lambda steps: [(step,) for step in range(steps)])


def test_a_worker_and_its_successor_killed_at_any_pair_of_steps_leave_no_trace_either() -> None:
    dice = random.Random(7)  # noqa: S311 - no secret
    _each(lambda steps: [(dice.randrange(steps), dice.randrange(steps)) for _ in range(60)])


def test_successors_killed_while_they_restore_leave_no_trace_either() -> None:
    # The first dies with much under way; restoring takes under 20 steps.
    _each(lambda steps: [(steps // 2, step, step + 1) for step in range(20)])


def test_owners_killed_again_and_again_come_to_an_end() -> None:
    dice = random.Random(11)  # noqa: S311 - no secret
    _each(lambda steps: [tuple(dice.randrange(10, steps // 2) for _ in range(8)) for _ in range(8)])
