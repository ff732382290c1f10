"""What a successor does with what another owner left, in the cases that a kill at a random step seldom meets."""

import asyncio
import time
from typing import Any

from klatch_schemas.events import ChatRequested, PromptReference, StreamAttempt
from klatch_schemas.topics import CHAT_STREAM
from klatch_streams.memory_log import MemoryLog

from tests.workers.generation.conftest import Generation


async def leave_open(generation: Generation, request: ChatRequested, writer: str = "dead") -> None:
    """An attempt whose owner died before it said anything."""
    opening = StreamAttempt(
        request=request.request,
        tenant=request.tenant,
        conversation=request.conversation,
        attempt=1,
        writer=writer,  # type: ignore[arg-type]
    )
    await generation.write(CHAT_STREAM, request.conversation, opening)


async def test_a_deadline_that_passed_while_nobody_owned_the_request_ends_it(generation: Generation) -> None:
    request = generation.request("fake", deadline_ms=int(time.time() * 1000) - 1)
    await generation.write_verdict(request)
    await leave_open(generation, request)
    await generation.write_admission(request)
    async with generation.worker(), asyncio.timeout(5):
        assert (await generation.ended(request)).state.status == "expired"
    assert not generation.upstream.calls


async def test_a_prompt_that_is_gone_by_the_time_of_the_successor_fails_the_request(generation: Generation) -> None:
    request = generation.request("fake", prompt=PromptReference(name="gone"))
    await generation.write_verdict(request)
    await leave_open(generation, request)
    await generation.write_admission(request)
    async with generation.worker(), asyncio.timeout(5):
        assert (await generation.ended(request)).state.status == "failed"
