"""A partition's whole generation, for real: MemoryLog, the runner, the gateway, and an upstream on a port."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from klatch_agents.gateway.continuing import Continues
from klatch_agents.gateway.port import Gateway
from klatch_agents.gateway.router import Router
from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRequested,
    Event,
    ModelRouted,
    PromptPublished,
    Reservation,
    TrustVerdict,
    TurnFinished,
    UsageSettled,
)
from klatch_schemas.records import Cause, Partition
from klatch_schemas.topics import (
    CHAT_ADMITTED,
    CHAT_REQUESTS,
    CHAT_STREAM,
    CHAT_TURNS,
    MODELS,
    TOPICS,
    TRUST_VERDICTS,
    Namespace,
    Topic,
)
from klatch_streams.ledger import Ledger
from klatch_streams.log import Log
from klatch_streams.memory_log import MemoryLog
from klatch_streams.runner import Runner, RunnerSettings
from klatch_streams.stalls import Stalls
from klatch_workers.books import RouteBook
from klatch_workers.generation.prepare import Preparer
from klatch_workers.generation.stage import GenerationStage
from klatch_workers.model_servers import ModelServers
from klatch_workers.settings import Settings

NAMESPACE = Namespace()


@dataclass
class Book:
    """Prompts by name."""

    prompts: dict[str, PromptPublished] = field(default_factory=dict[str, PromptPublished])

    def find(self, tenant: str, name: str, version: int | None) -> PromptPublished | None:  # noqa: ARG002 - one book
        return self.prompts.get(name)


@dataclass
class Generation:
    """A running stage, and a hand to write to and read from its log."""

    log: Log
    upstream: Upstream
    book: Book = field(default_factory=Book)
    verdict_patience_s: float = 300.0
    max_in_flight: int = 512
    continues: Continues = "none"
    """How workers believe that the upstream continues."""
    between: Callable[[Router], Gateway] = lambda router: router
    """What stands between workers and their router."""
    wall: Callable[[], float] = time.time
    """By which places at a deployment are shared."""
    steady: Callable[[], float] = time.monotonic
    """By which workers notice that they were stopped."""
    _written: int = 0

    def settings(self) -> Settings:
        """Of its workers."""
        return Settings(
            model_url=self.upstream.url,
            model_continues=self.continues,
        )

    @asynccontextmanager
    async def worker(self, **settings: Any) -> AsyncIterator["Worker"]:
        """One worker process' worth of generation; leaving it drains."""
        worker = Worker(self, RunnerSettings(**{"commit_s": 0.05, **settings}))
        await worker.start()
        try:
            yield worker
        finally:
            await worker.end()

    async def admit(self, model: str, *, verdict: TrustVerdict | None = None, **envelope: Any) -> ChatRequested:
        """Write a request's admission and its verdict, as admission and screening would."""
        request = self.request(model, **envelope)
        await self.write_verdict(request, verdict)
        await self.write_admission(request)
        return request

    def request(self, model: str, **envelope: Any) -> ChatRequested:
        self._written += 1
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        fields = {"request": f"r{self._written}", "tenant": "acme", "conversation": "c1", "body": body, **envelope}
        return ChatRequested(**fields)

    async def write_admission(self, request: ChatRequested, effect: int = 0) -> None:
        admitted = ChatAdmitted(
            request=request,
            requested_ms=int(time.time() * 1000),
            reservation=Reservation(tokens=100, expires_ms=0),
        )
        cause = Cause(Partition(CHAT_REQUESTS.name, 0), int(request.request.removeprefix("r")), effect)
        await self.log.append([codec.draft(CHAT_ADMITTED.name, request.conversation, admitted, cause=cause)])

    async def write_verdict(self, request: ChatRequested, verdict: TrustVerdict | None = None) -> None:
        verdict = verdict or TrustVerdict(
            request=request.request,
            tenant=request.tenant,
            conversation=request.conversation,
            stage="input",
            decision="allow",
            policy="test",
        )
        await self.log.append([codec.draft(TRUST_VERDICTS.name, request.conversation, verdict)])

    async def write(self, topic: Topic, key: str, event: Event) -> None:
        await self.log.append([codec.draft(topic.name, key, event)])

    async def ended(self, request: ChatRequested) -> Assembly:
        """Wait for the stream's settled end; returns what every reader assembles."""
        return await self.assembled(request, lambda assembly: assembly.state.settled)

    async def assembled(self, request: ChatRequested, enough: Callable[[Assembly], object]) -> Assembly:
        assembly = Assembly()
        async for offset, said in self.follow(CHAT_STREAM):
            if said.request == request.request:
                assembly.hear(offset, said)
                if enough(assembly):
                    return assembly
        raise AssertionError("the log ended")

    async def settled(self, request: ChatRequested) -> UsageSettled:
        async for _, said in self.follow(CHAT_REQUESTS):
            if isinstance(said, UsageSettled) and said.request == request.request:
                return said
        raise AssertionError("the log ended")

    async def turn(self, request: ChatRequested) -> TurnFinished:
        async for _, said in self.follow(CHAT_TURNS):
            if isinstance(said, TurnFinished) and said.request == request.request:
                return said
        raise AssertionError("the log ended")

    async def follow(self, topic: Topic) -> AsyncIterator[tuple[int, Any]]:
        """Every event of a topic, from its beginning on, as it comes."""
        tail = await self.log.tail()
        try:
            for number in range(await self.log.partitions(topic.name)):
                tail.follow(Partition(topic.name, number), 0)
            while True:
                for record in await tail.read(1000):
                    yield record.offset, codec.decode(record.value)
        finally:
            await tail.close()

    async def held(self, topic: Topic) -> Sequence[Any]:
        """Every event that stands in a topic now."""
        assert isinstance(self.log, MemoryLog)
        return [codec.decode(record.value) for record in self.log.records(topic.name)]


class Worker:
    """Generation in one process, wired as `wiring.py` does it; models without a route go to the upstream."""

    def __init__(self, generation: Generation, settings: RunnerSettings) -> None:
        self._generation = generation
        self._settings = settings
        self._parts = AsyncExitStack()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        log, settings = self._generation.log, self._generation.settings()
        opened = await Ledger[ModelRouted].open(log, MODELS, NAMESPACE, ModelRouted)
        self.routes, servers = await self._parts.enter_async_context(opened), ModelServers(settings)
        router = Router(RouteBook(self.routes), servers.open, servers.default_route(), wall=self._generation.wall)
        gateway = await self._parts.enter_async_context(router)
        preparer = Preparer(prompts=self._generation.book, verdict_patience_s=self._generation.verdict_patience_s)
        self.stage = GenerationStage(
            log,
            NAMESPACE,
            self._generation.between(gateway),
            preparer,
            max_in_flight=self._generation.max_in_flight,
            prices=RouteBook(self.routes).prices,
        )
        self.stage.stalls = Stalls(clock=self._generation.steady)
        self.runner = Runner(log, self.stage, "klatch.generation", self._settings)
        self._task = asyncio.create_task(self.runner.run())
        ready = asyncio.create_task(self.runner.ready.wait())
        await asyncio.wait({self._task, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            await self._task

    async def end(self) -> None:
        """Drain and stop."""
        self.runner.stop()
        try:
            if self._task and not self._task.cancelled():
                await asyncio.wait({self._task})
                if not self._task.cancelled():
                    self._task.result()
        finally:
            await self.stage.close()
            await self._parts.aclose()


@pytest.fixture
async def generation() -> AsyncIterator[Generation]:
    log = MemoryLog({topic.name: 1 if topic.partitioning == "ledger" else 2 for topic in TOPICS})
    async with Upstream() as upstream:
        yield Generation(log, upstream)
    await log.close()
