"""Generation while the log does not answer: it stalls, goes on or is succeeded, and every request ends once."""

import asyncio
from typing import Any

import pytest
from tests.workers.generation.readings import lineage, text_of

from klatch_schemas.assembly import Assembly
from klatch_schemas.events import StreamEnd
from klatch_schemas.topics import CHAT_STREAM
from klatch_streams.log import LogError

SLOW = "fake?reply=unique&tokens=40&rate=100"


def begun(assembly: Assembly) -> bool:
    return bool(assembly.standing)


async def ends(generation: Any, request: Any) -> list[str]:
    said = await generation.held(CHAT_STREAM)
    return [one.status for one in said if isinstance(one, StreamEnd) and one.request == request.request]


async def test_a_reply_stalls_while_the_log_is_silent_and_is_whole_when_it_answers(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit(SLOW)
        await generation.assembled(request, begun)
        generation.log.fall_silent()
        # Long enough for the model to say more than it may write.
        await asyncio.sleep(0.2)
        generation.log.answer()
        ended = await generation.ended(request)
    assert (ended.state.attempt, ended.state.status) == (1, "completed")
    assert lineage(text_of(ended.standing))[1] == 40
    assert len(generation.upstream.calls) == 1


async def test_a_worker_that_lost_its_patience_is_succeeded_and_the_reply_is_of_one_call(generation: Any) -> None:
    async def worker_that_fails() -> None:
        async with generation.worker() as worker:
            await generation.assembled(request, begun)
            generation.log.fall_silent()
            await generation.log.asked()
            generation.log.lose_patience()
            with pytest.raises(LogError):
                await worker.stage.follower.failure()
            generation.log.answer()

    request = await generation.admit(SLOW)
    with pytest.raises(LogError):
        await worker_that_fails()
    async with generation.worker():
        ended = await generation.ended(request)
        await generation.settled(request)
        await generation.turn(request)
    assert (ended.state.attempt, ended.state.status) == (2, "completed")
    assert lineage(text_of(ended.standing))[1] == 40
    assert await ends(generation, request) == ["completed"]
