"""Workers that die at a chosen step.

A `Life` counts what its worker asks of the log and of the model server; at its last step, before or after that step
took effect, the worker is dead: nothing it does reaches the log any more, and its group expels it. Time is virtual
but for sockets, so patience costs nothing.
"""
# pyright: reportPrivateUsage=false
# The broker's side of MemoryLog is looked at: where a draft goes, and what a group committed.

import asyncio
import selectors
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from tests.workers.generation.conftest import Generation

from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import Chunk, ModelCall
from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.assembly import Said
from klatch_schemas.codec import Delta
from klatch_schemas.events import Event, TurnFinished, UsageSettled
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import (
    CHAT_ADMITTED,
    CHAT_REQUESTS,
    CHAT_STREAM,
    CHAT_TURNS,
    GENERATION_STATE,
    TOPICS,
    Namespace,
)
from klatch_streams.log import Listener, LogError, Membership, Tail
from klatch_streams.memory_group import MemoryMembership
from klatch_streams.memory_log import MemoryLog
from klatch_streams.runner import Runner, RunnerSettings
from klatch_streams.snapshots import Snapshots
from klatch_workers.generation.prepare import Preparer, PromptBook
from klatch_workers.generation.stage import GenerationStage

GROUP = "klatch.generation"
SETTINGS = RunnerSettings(commit_s=0.02, drain_s=1.0, read_wait_ms=50)


class _Swift(selectors.DefaultSelector):
    """Sockets are waited for in real time, a moment at most; timers pass by moving the clock."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.now += 1e-6  # a clock that stands still would never reach what rounding put just ahead of it
        if ready := super().select(0):
            return cast("list[Any]", ready)
        if timeout is None:
            ready = super().select(5)
            assert ready, "everything waits and nothing will come: a deadlock"
        elif timeout > 0:
            ready = super().select(0.000_2)
            if not ready:
                self.loop.now += timeout
        return cast("list[Any]", ready)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is moved on by waiting."""

    def __init__(self) -> None:
        self.now = 1_000.0
        selector = _Swift()
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now


def memory_log(appending: Callable[[Sequence[Draft]], Awaitable[None]] | None = None) -> MemoryLog:
    """Every topic, with two partitions where there may be several."""
    topics = {str(topic.name): 1 if topic.partitioning == "ledger" else 2 for topic in TOPICS}
    return MemoryLog(topics, appending=appending)


def in_virtual_time(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work)


class Life:
    """Counts steps down to a death; a negative number of steps is for ever."""

    def __init__(self, steps: int = -1, reads_late_s: float = 0.0) -> None:
        self.left = steps
        self.reads_late_s = reads_late_s
        """How far what is read lags behind what is written."""
        self.taken = 0
        self.died = asyncio.Event()
        self.member: MemoryMembership | None = None
        self._buried = asyncio.Event()

    async def step(self) -> None:
        """One step. The one that dies, and all that follow, never come back before the burial."""
        if not self.died.is_set():
            if self.left != 0:
                self.left -= 1
                self.taken += 1
                return
            self.died.set()
        await self._buried.wait()
        raise LogError("this worker is dead")

    def bury(self) -> None:
        """Let what hangs unwind; nothing of it reaches the log."""
        self.left = 0
        self.died.set()
        self._buried.set()


class MortalLog:
    """A log as a mortal sees it: whatever is asked may be the last, done or not done."""

    def __init__(self, log: MemoryLog, life: Life) -> None:
        self._log, self._life = log, life

    async def append(self, drafts: Sequence[Draft]) -> Sequence[tuple[Partition, int]]:
        """Partition by partition, so that a death in between leaves a part."""
        where = dict[int, tuple[Partition, int]]()
        groups = dict[Partition, list[int]]()
        for index, draft in enumerate(drafts):
            groups.setdefault(self._log._place(draft), []).append(index)
        for indexes in groups.values():
            await self._life.step()
            where.update(zip(indexes, await self._log.append([drafts[index] for index in indexes]), strict=True))
        await self._life.step()
        return [where[index] for index in range(len(drafts))]

    async def bounds(self, partition: Partition) -> tuple[int, int]:
        await self._life.step()
        return await self._log.bounds(partition)

    async def partitions(self, topic: str) -> int:
        return await self._log.partitions(topic)

    async def offset_at(self, partition: Partition, timestamp_ms: int) -> int:
        return await self._log.offset_at(partition, timestamp_ms)

    async def tail(self) -> Tail:
        return cast("Tail", MortalReader(await self._log.tail(), self._life))

    async def join(self, group: str, topic: str, listener: Listener) -> Membership:
        await self._life.step()
        self._life.member = await self._log.join(group, topic, listener)
        return cast("Membership", MortalReader(self._life.member, self._life))

    async def close(self) -> None:
        """The log outlives its mortals."""


class MortalReader:
    """A tail or a membership of a mortal."""

    def __init__(self, reader: Any, life: Life) -> None:
        self._reader, self._life = reader, life

    async def read(self, wait_ms: int) -> Any:
        await asyncio.sleep(self._life.reads_late_s)
        read = await self._reader.read(wait_ms)
        if read or self._life.died.is_set():
            await self._life.step()
        return read

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        await self._life.step()
        await self._reader.commit(offsets)
        await self._life.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


class MortalGateway:
    """Models as a mortal calls them: every batch of chunks may be the last."""

    def __init__(self, gateway: OpenAICompatible, life: Life) -> None:
        self._gateway, self._life = gateway, life

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[Any]:
        async with self._gateway.stream(call) as reply:
            yield _MortalReply(reply, self._life)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gateway, name)


class _MortalReply:
    def __init__(self, reply: Any, life: Life) -> None:
        self._reply, self._life = reply, life

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        async for chunks in self._reply:
            yield chunks
            await self._life.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reply, name)


@dataclass
class Mortal:
    """A generation worker that lives `life`."""

    life: Life
    stage: GenerationStage
    runner: Runner
    gateway: OpenAICompatible
    running: asyncio.Task[None]

    async def died_or_done(self, done: asyncio.Future[Any]) -> bool:
        """Wait for the worker's death, or for `done`; true if it died."""
        died = asyncio.ensure_future(self.life.died.wait())
        await asyncio.wait({died, done, self.running}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if self.running.done() and not self.life.died.is_set():
            self.running.result()
        return self.life.died.is_set()

    async def stop(self) -> None:
        """Drain and end, as SIGTERM makes it."""
        self.runner.stop()
        await self.running
        await self.close()

    async def close(self) -> None:
        """Give back what a process gives back by ending."""
        self.life.bury()
        self.running.cancel()
        await asyncio.wait({self.running})
        await self.stage.close()
        await self.gateway.close()


@dataclass
class World:
    """One log, one model server, the workers that come and go, and the requests that were accepted."""

    generation: Generation
    log: MemoryLog
    upstream: Upstream
    mortals: list[Mortal] = field(default_factory=list[Mortal])

    def worker(self, life: Life, book: PromptBook | None = None) -> Mortal:
        """Start a worker that lives `life`."""
        log = cast("Any", MortalLog(self.log, life))
        gateway = OpenAICompatible(Endpoint(self.upstream.url, continues=self.generation.continues))
        preparer = Preparer(prompts=book or self.generation.book)
        stage = GenerationStage(log, Namespace(), cast("Any", MortalGateway(gateway, life)), preparer)
        runner = Runner(log, stage, GROUP, SETTINGS)
        mortal = Mortal(life, stage, runner, gateway, asyncio.create_task(runner.run()))
        self.mortals.append(mortal)
        return mortal

    def expel(self, mortal: Mortal) -> None:
        """What the session time-out does to a dead worker."""
        if mortal.life.member:
            self.log.expel(mortal.life.member)

    async def all_committed(self) -> None:
        """Wait until every admission is committed."""
        while any(self.committed(part) < self.log.held(part).end for part in self.log.records_of(CHAT_ADMITTED.name)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # nobody is told of commits; the clock is virtual

    async def heads(self) -> dict[tuple[Partition, str], int]:
        """The last turn of every conversation, as the next owner would find it."""
        heads = dict[tuple[Partition, str], int]()
        for number in range(await self.log.partitions(CHAT_ADMITTED.name)):
            state, admitted = Partition(GENERATION_STATE.name, number), Partition(CHAT_ADMITTED.name, number)
            snapshots = await Snapshots.open(self.log, state, self.committed(admitted))
            for key, saved in snapshots.saved.items():
                if key.startswith("turns/"):
                    conversation = key.removeprefix("turns/").split("/", 1)[1]
                    last = cast("dict[str, int]", saved.parts["last"])
                    heads[Partition(CHAT_TURNS.name, number), conversation] = last["offset"]
        return heads

    def committed(self, partition: Partition) -> int:
        group = self.log._groups.get(GROUP)
        return group.committed.get(partition, 0) if group else 0

    async def live_through(self, *lives: int) -> list[Life]:
        """Workers that die after so many steps each, then one that finishes the work."""
        lived = list[Life]()
        for steps in (*lives, -1):
            lived.append(life := Life(steps))
            mortal = self.worker(life)
            done = asyncio.ensure_future(self.all_committed())
            try:
                async with asyncio.timeout(300):
                    if not await mortal.died_or_done(done):
                        mortal.runner.stop()
                        await mortal.died_or_done(mortal.running)
            finally:
                done.cancel()
            if life.died.is_set():
                self.expel(mortal)
            else:
                break
        return lived

    async def end(self) -> None:
        """Bury everybody."""
        for mortal in self.mortals:
            await mortal.close()

    # --- what the log says

    def said(self, topic: str) -> list[tuple[Record, Event | Delta]]:
        return [(record, codec.decode(record.value)) for record in self.log.records(topic)]

    def stream_of(self, request: str) -> list[tuple[int, Said]]:
        """Every record of a request's stream, deltas of nobody's attempts included."""
        return [
            (record.offset, said)
            for record, said in self.said(CHAT_STREAM.name)
            if getattr(said, "request", None) == request
        ]

    def settlements(self, request: str) -> list[tuple[bytes | None, UsageSettled]]:
        """Event id and record of every settlement of a request."""
        return [
            (record.header(codec.EVENT_ID), said)
            for record, said in self.said(CHAT_REQUESTS.name)
            if isinstance(said, UsageSettled) and said.request == request
        ]

    def turns(self) -> dict[Partition, dict[int, TurnFinished]]:
        turns = dict[Partition, dict[int, TurnFinished]]()
        for record, said in self.said(CHAT_TURNS.name):
            assert isinstance(said, TurnFinished)
            turns.setdefault(record.partition, {})[record.offset] = said
        return turns
