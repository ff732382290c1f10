"""What a successor does with what another owner left, in the cases that a kill at a random step seldom meets."""

import asyncio
import time
from collections.abc import Sequence

from tests.workers.generation.conftest import NAMESPACE, Generation
from tests.workers.generation.mortal import GROUP, World, in_virtual_time, memory_log
from tests.workers.generation.readings import assembled, every_reader_agrees, lineage, text_of

from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.testing.upstream import Upstream
from klatch_schemas.events import ChatRequested, PromptReference, StreamAttempt
from klatch_schemas.ids import Writer
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_STREAM
from klatch_streams.runner import Runner, RunnerSettings
from klatch_workers.generation.prepare import Preparer
from klatch_workers.generation.stage import GenerationStage


async def leave_open(generation: Generation, request: ChatRequested, writer: str = "dead") -> None:
    """An attempt whose owner died before it said anything."""
    opening = StreamAttempt(
        request=request.request,
        tenant=request.tenant,
        conversation=request.conversation,
        attempt=1,
        writer=Writer(writer),
    )
    await generation.write(CHAT_STREAM, request.conversation, opening)


async def test_a_deadline_that_passed_while_nobody_owned_the_request_ends_it(generation: Generation) -> None:
    request = generation.request("fake", deadline_ms=int(time.time() * 1000) - 1)
    await generation.write_verdict(request)
    await leave_open(generation, request)
    await generation.write_admission(request)
    async with generation.worker(), asyncio.timeout(30):
        assert (await generation.ended(request)).state.status == "expired"
    assert not generation.upstream.calls


async def test_a_prompt_that_is_gone_by_the_time_of_the_successor_fails_the_request(generation: Generation) -> None:
    request = generation.request("fake", prompt=PromptReference(name="gone"))
    await generation.write_verdict(request)
    await leave_open(generation, request)
    await generation.write_admission(request)
    async with generation.worker(), asyncio.timeout(30):
        assert (await generation.ended(request)).state.status == "failed"


async def _lose_and_regain() -> None:
    """A partition goes and comes back to one process while the log keeps what it wrote first waiting."""
    answers, waiting = asyncio.Event(), asyncio.Event()

    async def slow(drafts: Sequence[Draft]) -> None:
        if drafts[0].topic == CHAT_STREAM.name:
            waiting.set()
            await answers.wait()

    log = memory_log(appending=slow)
    async with Upstream() as upstream, OpenAICompatible(Endpoint(upstream.url)) as gateway:
        generation = Generation(log, upstream)
        stage = GenerationStage(log, NAMESPACE, gateway, Preparer(prompts=generation.book))
        request = await generation.admit("fake?reply=unique&tokens=6&rate=10")
        first = Runner(log, stage, GROUP, RunnerSettings(drain_s=0.25))
        running = asyncio.create_task(first.run())
        await waiting.wait()
        first.stop()
        await running
        second = Runner(log, stage, GROUP, RunnerSettings(commit_s=0.02))
        running = asyncio.create_task(second.run())
        while len(upstream.calls) < 2:  # noqa: ASYNC110 - the clock is virtual
            await asyncio.sleep(0.01)  # the server tells nobody of calls
        answers.set()
        await generation.settled(request)
        second.stop()
        await running
        stream = World(generation, log, upstream).stream_of(request.request)
        every_reader_agrees(stream)
        assert assembled(stream).state.status == "completed"
        assert lineage(text_of(assembled(stream).standing))[1] == 6
        await stage.close()


def test_a_process_that_gets_its_partition_back_does_not_take_its_old_attempt_for_its_new_one() -> None:
    in_virtual_time(_lose_and_regain())
