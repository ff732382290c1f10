"""A worker that was stopped reads what stands by now before it calls a model: it may have been cancelled long since."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

import pytest
from tests.workers.generation.conftest import Generation

from klatch_agents.gateway.port import ModelCall, ModelReply
from klatch_agents.gateway.router import Router
from klatch_agents.testing.upstream import Upstream
from klatch_schemas.events import ChatRequested, StreamCancel, Usage
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_STREAM, TOPICS
from klatch_streams.memory_log import MemoryLog, MemoryTail

STALL_S = 1.3


class SlowLog(MemoryLog):
    """A log that keeps back what comes to `chat.stream` while `hearing` is not set."""

    def __init__(self) -> None:
        super().__init__({str(topic.name): 1 for topic in TOPICS})
        self.hearing = asyncio.Event()
        self.hearing.set()
        self.end_asked = asyncio.Event()
        """Somebody asked where `chat.stream` ends."""
        self.on_the_way: Callable[[], Awaitable[None]] | None = None
        """What happens once, between the next answer to that and the moment that it is heard."""

    async def tail(self) -> MemoryTail:
        return _SlowTail(self, self.hearing)

    async def bounds(self, partition: Partition) -> tuple[int, int]:
        found = await super().bounds(partition)
        if partition.topic == CHAT_STREAM.name:
            self.end_asked.set()
            happens, self.on_the_way = self.on_the_way, None
            if happens:
                await happens()
        return found


class _SlowTail(MemoryTail):
    def __init__(self, log: MemoryLog, hearing: asyncio.Event) -> None:
        super().__init__(log)
        self._hearing = hearing
        self._kept = list[Record]()

    def position(self, partition: Partition) -> int | None:
        kept = [record.offset for record in self._kept if record.partition == partition]
        return kept[0] if kept else super().position(partition)

    async def read(self, wait_ms: int) -> Sequence[Record]:
        records = [*self._kept, *await super().read(min(wait_ms, 10))]
        if self._hearing.is_set():
            self._kept = []
            return records
        self._kept = [record for record in records if record.partition.topic == CHAT_STREAM.name]
        return [record for record in records if record.partition.topic != CHAT_STREAM.name]


def cancel_of(request: ChatRequested) -> StreamCancel:
    return StreamCancel(request=request.request, tenant="acme", conversation="c1", by="client", reason="enough")


@pytest.fixture
async def slow() -> AsyncIterator[Generation]:
    async with Upstream() as upstream:
        yield Generation(SlowLog(), upstream)


@pytest.mark.parametrize("stalled", ["stopped", "waited for what it needs", ""])
async def test_a_worker_that_was_stopped_calls_no_model_for_what_was_cancelled_meanwhile(
    slow: Generation, stalled: str
) -> None:
    log = slow.log
    assert isinstance(log, SlowLog)
    if not stalled:
        slow.steady = lambda: 0.0  # and if the machine stands still it is not noticed
    async with slow.worker():
        log.hearing.clear()
        log.end_asked.clear()
        request = slow.request("fake?text=hello")
        cancel = cancel_of(request)
        await slow.write(CHAT_STREAM, "c1", cancel)
        if stalled == "stopped":
            time.sleep(STALL_S)  # noqa: ASYNC251 - the stall: nothing in this process runs
        await slow.write_admission(request)
        if stalled == "waited for what it needs":
            await asyncio.sleep(2 * STALL_S)  # the stall: the verdict keeps it waiting, as soon as it has begun to wait
        await slow.write_verdict(request)
        if stalled:
            async with asyncio.timeout(30):
                await log.end_asked.wait()
        else:
            # Nobody asks: what was read is at most a moment old.
            await slow.upstream.changed(lambda: bool(slow.upstream.calls))
        log.hearing.set()
        settled = await slow.settled(request)
    assert settled.status == "cancelled"
    assert (settled.usage == Usage()) == bool(stalled)
    assert len(slow.upstream.calls) == (0 if stalled else 1)


async def test_a_worker_that_was_stopped_between_two_tries_does_not_try_again_for_what_was_cancelled(
    slow: Generation,
) -> None:
    log = slow.log
    assert isinstance(log, SlowLog)
    async with slow.worker():
        request = await slow.admit("fake?status=503&retry_after=3")
        await slow.upstream.changed(lambda: bool(slow.upstream.calls))
        log.hearing.clear()
        log.end_asked.clear()
        cancel = cancel_of(request)
        await slow.write(CHAT_STREAM, "c1", cancel)
        time.sleep(STALL_S)  # noqa: ASYNC251 - the stall: nothing in this process runs
        await log.end_asked.wait()
        log.hearing.set()
        assert (await slow.settled(request)).status == "cancelled"
    assert len(slow.upstream.calls) == 1


async def test_an_answer_from_before_a_worker_was_stopped_is_no_look(slow: Generation) -> None:
    log = slow.log
    assert isinstance(log, SlowLog)
    request = slow.request("fake?text=hello")
    cancel = cancel_of(request)

    async def stopped_again() -> None:
        log.end_asked.clear()
        log.hearing.clear()
        await slow.write(CHAT_STREAM, "c1", cancel)
        time.sleep(STALL_S)  # noqa: ASYNC251 - the stall: nothing in this process runs

    async with slow.worker():
        time.sleep(STALL_S)  # noqa: ASYNC251 - the first stall, for which it looks
        log.end_asked.clear()
        await slow.write_verdict(request)
        await slow.write_admission(request)
        async with asyncio.timeout(30):
            await log.end_asked.wait()  # before the try
            log.end_asked.clear()
            log.on_the_way = stopped_again
            await log.end_asked.wait()  # on the connection, the last look there was
            await log.end_asked.wait()
        log.hearing.set()
        assert (await slow.settled(request)).status == "cancelled"
    assert not slow.upstream.calls


@dataclass
class StoppedOnTheWay:
    """The router, in a worker that is stopped once its connection to the model stands, and cancelled meanwhile."""

    router: Router
    stop: Callable[[], Awaitable[None]]

    def stream(self, call: ModelCall) -> AbstractAsyncContextManager[ModelReply]:
        look = call.before_send
        assert look

        async def before_send(deployment: str) -> None:
            await self.stop()
            await look(deployment)

        return self.router.stream(replace(call, before_send=before_send))

    def continues(self, call: ModelCall) -> bool:
        return self.router.continues(call)

    async def close(self) -> None:
        await self.router.close()


async def test_a_call_that_a_stopped_worker_did_not_send_after_all_costs_nothing(slow: Generation) -> None:
    log = slow.log
    assert isinstance(log, SlowLog)
    request = slow.request("fake?text=hello")
    cancel = cancel_of(request)

    async def stop() -> None:
        log.hearing.clear()
        await slow.write(CHAT_STREAM, "c1", cancel)
        time.sleep(STALL_S)  # noqa: ASYNC251 - the stall: nothing in this process runs
        log.hearing.set()

    slow.between = lambda router: StoppedOnTheWay(router, stop)
    async with slow.worker():
        await slow.write_verdict(request)
        await slow.write_admission(request)
        settled = await slow.settled(request)
    assert (settled.status, settled.usage, settled.deployment) == ("cancelled", Usage(), "")
    assert not slow.upstream.calls
