"""What a checkpoint leaves in the log is all that a successor needs, whenever its owner is killed."""
# pyright: reportPrivateUsage=false
# What an owner has heard is awaited at its table.

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from tests.workers.generation.conftest import NAMESPACE, Book, Generation
from tests.workers.generation.mortal import memory_log

from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_schemas.records import Draft, Partition
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_STREAM, CHAT_TURNS, DEAD_LETTERS, GENERATION_STATE
from klatch_streams.memory_log import MemoryLog
from klatch_streams.snapshots import look
from klatch_workers.generation.prepare import Preparer
from klatch_workers.generation.stage import GenerationOwner, GenerationStage

ADMITTED, STREAM = Partition(CHAT_ADMITTED.name, 0), Partition(CHAT_STREAM.name, 0)


@asynccontextmanager
async def an_owner(log: MemoryLog, committed: int = 0) -> AsyncGenerator[GenerationOwner]:
    """The owner of a partition; leaving it is its process' death: nothing is drained, and nothing committed."""
    gateway = OpenAICompatible(Endpoint("http://127.0.0.1:9"))
    stage = GenerationStage(log, NAMESPACE, gateway, Preparer(prompts=Book()))
    try:
        yield await stage.own(ADMITTED, committed)
    finally:
        await stage.close()
        await gateway.close()


async def hear_garbage(log: MemoryLog, owner: GenerationOwner, value: bytes) -> None:
    """Have the owner hear a record of chat.stream that nobody can read."""
    [(_, offset)] = await log.append([Draft(STREAM.topic, b"c1", value, (), STREAM.number)])
    await owner._means.table.passed(offset)


async def test_garbage_heard_while_other_garbage_is_buried_is_buried_by_the_successor() -> None:
    burying, go_on = asyncio.Event(), asyncio.Event()

    async def hold_letters(drafts: Sequence[Draft]) -> None:
        if drafts[0].topic == DEAD_LETTERS.name:
            burying.set()
            await go_on.wait()

    log = memory_log(appending=hold_letters)
    async with an_owner(log) as owner:
        await hear_garbage(log, owner, b"first")
        checkpoint = asyncio.create_task(owner.checkpoint())
        await burying.wait()
        await hear_garbage(log, owner, b"second")
        go_on.set()
        committed = await checkpoint
    async with an_owner(log, committed) as successor:
        await successor.checkpoint()
    assert {record.value for record in log.records(DEAD_LETTERS.name)} == {b"first", b"second"}
    await log.close()


MEMORY = {"recent": 5}


def log_of(generation: Generation) -> MemoryLog:
    assert isinstance(generation.log, MemoryLog)
    return generation.log


async def kept(log: MemoryLog) -> set[str]:
    """The conversations that a successor would know."""
    states = [await look(log, Partition(GENERATION_STATE.name, number)) for number in range(2)]
    return {key.removeprefix("turns/") for saved in states for key in saved if key.startswith("turns/")}


def state_keys(log: MemoryLog) -> set[bytes]:
    """What compaction leaves of generation.state once the time of tombstones is over."""
    last = {record.key: record.value for record in log.records(GENERATION_STATE.name)}
    return {key or b"" for key, value in last.items() if value is not None}


async def test_requests_that_stand_alone_leave_no_record_in_snapshots(generation: Generation) -> None:
    async with generation.worker():
        for number in range(1, 6):
            await generation.turn(await generation.admit("fake?text=hello", conversation=f"r{number}"))
        await generation.turn(await generation.admit("fake?text=hello", conversation="c1"))
    assert await kept(log_of(generation)) == {"acme/c1"}
    assert not [key for key in state_keys(log_of(generation)) if b"turns/acme/r" in key]


async def test_a_conversation_whose_last_turn_retention_took_is_forgotten_and_begins_anew(
    generation: Generation,
) -> None:
    log = log_of(generation)
    names = ("c1", "c2", "c4")
    async with generation.worker():
        for name in names:
            await generation.turn(await generation.admit("fake?text=gone", conversation=name, memory=MEMORY))
    assert await kept(log) == {f"acme/{name}" for name in names}
    for partition in log.records_of(CHAT_TURNS.name):
        log.truncate_before(partition, log.held(partition).end)
    async with generation.worker():
        pass
    assert await kept(log) == set()
    assert not [key for key in state_keys(log) if b"turns/" in key]
    async with generation.worker():
        await generation.settled(await generation.admit("fake?text=anew", conversation="c1", memory=MEMORY))
    [anew] = await generation.held(CHAT_TURNS)
    assert anew.previous is None
    assert await kept(log) == {"acme/c1"}
