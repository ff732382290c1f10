"""What a checkpoint leaves in the log is all that a successor needs, whenever its owner is killed."""
# pyright: basic, reportPrivateUsage=false
# What an owner has heard is awaited at its table.

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from tests.workers.generation.conftest import NAMESPACE, Book
from tests.workers.generation.mortal import memory_log

from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_schemas.records import Draft, Partition
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_STREAM, DEAD_LETTERS
from klatch_streams.memory_log import MemoryLog
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
