"""A decider's runner is killed at every await, or frozen there and woken beside its successor.

Whatever the log holds afterwards, its effects, told apart by their causes, are those of one undisturbed `fold`, and
so is the state that the next owner restores. `Life` runs tasks step by step and stops them for ever at the n-th, as
SIGKILL does: no `finally` runs. Time is virtual, so no timer decides how a run goes.

Over 400 lines on purpose: the harness and the laws it checks are read together.
"""
# pyright: basic
# The harness passes coroutines of any type through; there is nothing to gain from naming them.

import asyncio
import contextvars
import random
import selectors
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import msgspec
import pytest

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, Event, Limits, QuotaLimitSet, Usage, UsageSettled
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import ADMISSION_STATE, CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, DEAD_LETTERS, Namespace
from klatch_streams.admission import Admission
from klatch_streams.decider_owner import DeciderOwner, DeciderStage, _Batch
from klatch_streams.kernel import Decider, Emit, Input, drafts_of
from klatch_streams.lane import Room
from klatch_streams.log import Listener, LogError, MembershipLost
from klatch_streams.memory_group import MemoryMembership
from klatch_streams.memory_log import MemoryLog
from klatch_streams.runner import Runner, RunnerSettings

S = TypeVar("S")
NAMESPACE = Namespace.named("t")
REQUESTS, STATES = NAMESPACE.of(CHAT_REQUESTS), NAMESPACE.of(ADMISSION_STATE)
PARTITIONS = 2
SETTINGS = RunnerSettings(commit_s=0.003, drain_s=1.0, room=Room(queue=8, batch=2), read_wait_ms=5)


# --- a life that ends -------------------------------------------------------------------------------------------

LIFE: contextvars.ContextVar["Life | None"] = contextvars.ContextVar("life", default=None)


class Life:
    """Tasks that stop at the n-th step of them all, until they are woken or buried."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.stopped = asyncio.Event()
        self.tasks = list[asyncio.Task[Any]]()
        self._coroutines = list[Coroutine[Any, Any, Any]]()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Go on for ever: what stopped was a zombie."""
        self.left = -1
        self._woken.set()

    async def bury(self) -> None:
        """Let what is stopped unwind, once nobody looks any more."""
        for task in self.tasks:
            task.cancel()
        self.wake()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for coroutine in self._coroutines:
            _unwind(coroutine)

    def run(self, coroutine: Coroutine[Any, Any, Any], mortal: bool = False) -> Coroutine[Any, Any, Any]:
        """`coroutine` within this life. If `mortal`, being cancelled while stopped ends the waiting for it."""
        self._coroutines.append(coroutine)
        return cast("Coroutine[Any, Any, Any]", self._steps(coroutine, mortal))

    @types.coroutine
    def _steps(self, coroutine: Coroutine[Any, Any, Any], mortal: bool) -> Generator[Any, Any, Any]:
        send, given = cast("Any", coroutine.send), None
        while True:
            if self.left == 0:
                self.stopped.set()
                held: asyncio.CancelledError | None = None
                while not self._woken.is_set():
                    try:
                        yield from self._woken.wait().__await__()
                    except asyncio.CancelledError as error:
                        if mortal:
                            raise
                        held = error
                if held:
                    send, given = cast("Any", coroutine.throw), held
            elif self.left > 0:
                self.left -= 1
            token = LIFE.set(self)
            try:
                awaited = send(given)
            except StopIteration as end:
                return end.value
            finally:
                LIFE.reset(token)
            send, given = coroutine.send, None
            try:
                yield awaited
            except BaseException as thrown:  # noqa: BLE001 - passed on, whatever the loop throws
                send, given = cast("Any", coroutine.throw), cast("Any", thrown)


def _unwind(coroutine: Coroutine[Any, Any, Any]) -> None:
    """End what nobody will await again, whatever it does about it."""
    while True:
        try:
            coroutine.throw(asyncio.CancelledError())
        except BaseException:  # noqa: BLE001 - its end, one way or the other
            return


def _born(loop: asyncio.AbstractEventLoop, coroutine: Any, **named: Any) -> asyncio.Task[Any]:
    # The group's tasks are the broker's, whoever made it start them.
    life = LIFE.get()
    name = getattr(coroutine, "__qualname__", "")
    if life is None or name.startswith(("Memory", "Heard")):
        return asyncio.Task(coroutine, loop=loop, **named)
    task = asyncio.Task(life.run(coroutine), loop=loop, **named)
    life.tasks.append(task)
    return task


class Heard:
    """A listener whose calls are steps of a life; the group need not wait for a dead one once it is expelled."""

    def __init__(self, life: Life, listener: Listener) -> None:
        self._life, self._listener = life, listener

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        await self._life.run(self._listener.assigned(partitions), mortal=True)

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        await self._life.run(self._listener.revoked(partitions), mortal=True)


class Seen:
    """The log as one runner has it, which knows who its member is."""

    def __init__(self, log: MemoryLog, life: Life) -> None:
        self.member: MemoryMembership | None = None
        self._log, self._life = log, life

    async def join(self, group: str, topic: str, listener: Listener) -> MemoryMembership:
        self.member = await self._log.join(group, topic, Heard(self._life, listener))
        return self.member

    async def append(self, drafts: Sequence[Draft]) -> Sequence[tuple[Partition, int]]:
        """Partition by partition, so that a death in between leaves a part; what was sent is the broker's to do."""
        where = dict[int, tuple[Partition, int]]()
        groups = dict[Partition, list[int]]()
        for index, draft in enumerate(drafts):
            groups.setdefault(self._log._place(draft), []).append(index)
        for indexes in groups.values():
            sent = asyncio.create_task(self._log.append([drafts[index] for index in indexes]))
            where.update(zip(indexes, await asyncio.shield(sent), strict=True))
        return [where[index] for index in range(len(drafts))]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


class _Instant(selectors.DefaultSelector):
    """Waits for nothing: a timeout passes by moving the clock."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("everything waits and nothing will come: a deadlock")
        self.loop.now += timeout
        return cast("list[Any]", super().select(0))


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is moved on by waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Instant()
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now


def in_virtual_time(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `work` on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_task_factory(cast("Any", _born))
        runner.run(work())


# --- a small decider ----------------------------------------------------------------------------------------------


class Tally(msgspec.Struct, frozen=True):
    """What a tenant used."""

    tenant: str
    settled: int = 0
    odd: int = 0
    """Changes every other time: a part that comes back to what it was."""


class Counting:
    """Counts settlements and tells each count; an operator's limit of no requests starts over."""

    name = "counting"
    input = CHAT_REQUESTS
    state = ADMISSION_STATE

    def initial(self, key: str) -> Tally:
        return Tally(key)

    def decide(self, state: Tally, said: Input[Tally]) -> tuple[Tally, Sequence[Emit]]:
        match said.event:
            case UsageSettled():
                counted = Tally(state.tenant, state.settled + 1, (state.odd + 1) % 2)
                usage = Usage(prompt_tokens=counted.settled)
                return counted, [Emit(CHAT_STREAM, state.tenant, said.event.model_copy(update={"usage": usage}))]
            case QuotaLimitSet() if state.settled:
                return Tally(state.tenant), [Emit(CHAT_STREAM, state.tenant, said.event)]
            case _:
                return state, ()

    def dump(self, state: Tally) -> dict[str, object]:
        return {"settled": state.settled, "odd": state.odd} if state.settled else {}

    def load(self, key: str, parts: dict[str, object]) -> Tally:
        return Tally(key, cast("int", parts.get("settled", 0)), cast("int", parts.get("odd", 0)))


def settled(number: int, tenant: str) -> UsageSettled:
    return UsageSettled(request=RequestId(f"r{number}"), tenant=Tenant(tenant), status="completed", usage=Usage())


def counting_script() -> list[Event]:
    """Three tenants; one of them is forgotten and comes again."""
    script: list[Event] = [settled(number, "abc"[number % 3]) for number in range(18)]
    script.insert(9, QuotaLimitSet(tenant=Tenant("a"), limits=Limits()))
    script.insert(14, QuotaLimitSet(tenant=Tenant("b"), limits=Limits()))
    return script


def admission_script() -> list[Event]:
    """Requests of two tenants against a limit, settled here and there, some sent twice."""
    limits = Limits(concurrent_requests=3, tokens_per_minute=2_000)
    script: list[Event] = [QuotaLimitSet(tenant=Tenant(name), limits=limits) for name in "ab"]
    for number in range(12):
        tenant = Tenant("ab"[number % 2])
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x" * number}], "max_tokens": 99}
        asked = ChatRequested(
            request=RequestId(f"r{number}"), tenant=tenant, conversation=Conversation(f"c{number % 3}"), body=body
        )
        script += [asked, asked] if number % 5 == 0 else [asked]
        if number > 4:
            script.append(settled(number - 4, "ab"[number % 2]))
    return script


async def _round_trip(_: Sequence[Draft]) -> None:
    """An append takes a while, in which other tasks go on and timers come up."""
    # Virtual time: it costs nothing, and lets others go on.
    await asyncio.sleep(0.001)


# --- the check ----------------------------------------------------------------------------------------------------


@dataclass
class World(Generic[S]):
    """One log with a script in it, and what must come of it."""

    decider: Decider[S]
    script: Sequence[Event]
    log: MemoryLog
    lives: list[Life] = field(default_factory=list[Life])

    @classmethod
    async def of(cls, decider: Decider[S], script: Sequence[Event]) -> "World[S]":
        now = iter(range(1_800_014_400_000, 1_900_014_400_000, 1_700))
        topics = (CHAT_REQUESTS, ADMISSION_STATE, CHAT_ADMITTED, CHAT_STREAM, DEAD_LETTERS)
        log = MemoryLog(
            {NAMESPACE.of(topic): PARTITIONS for topic in topics}, now_ms=lambda: next(now), appending=_round_trip
        )
        world = cls(decider, script, log)
        await world.ask(script)
        return world

    async def ask(self, script: Sequence[Event]) -> None:
        for event in script:
            tenant = cast("UsageSettled", event).tenant
            await self.log.append([codec.draft(REQUESTS, tenant, event)])

    def start(self, life: Life) -> tuple[Runner, asyncio.Task[None], Seen]:
        """A runner that lives `life`."""
        self.lives.append(life)
        seen = Seen(self.log, life)
        stage = DeciderStage(self.decider, cast("Any", seen), NAMESPACE)
        runner = Runner(cast("Any", seen), stage, "g", SETTINGS)
        task = asyncio.Task(life.run(runner.run()))
        life.tasks.append(task)
        return runner, task, seen

    async def end(self) -> None:
        """Bury everybody."""
        for life in self.lives:
            await life.bury()

    async def committed_all(self) -> None:
        """Wait until every input record is committed."""
        while any(self.committed(part) < self.log.held(part).end for part in self.log.records_of(REQUESTS)):  # noqa: ASYNC110
            # Virtual time: it costs nothing.
            await asyncio.sleep(0.005)

    def committed(self, partition: Partition) -> int:
        group = self.log._groups.get("g")
        return group.committed.get(partition, 0) if group else 0

    def expected(self) -> tuple[list[Draft], dict[str, object]]:
        """Every effect of an undisturbed replay, in order, and the final states."""
        states, drafts = dict[str, S](), list[Draft]()
        for record in self.log.records(REQUESTS):
            key = (record.key or b"").decode()
            before = states[key] if key in states else self.decider.initial(key)
            event = cast("Event", codec.decode(record.value))
            states[key], effects = self.decider.decide(before, Input(event, record.timestamp_ms))
            drafts += drafts_of(effects, record, NAMESPACE)
        return drafts, {key: parts for key, state in states.items() if (parts := self.decider.dump(state))}

    def effects(self) -> list[Record]:
        """What stands in the topics that the decider writes to."""
        return [record for topic in (CHAT_STREAM, CHAT_ADMITTED) for record in self.log.records(NAMESPACE.of(topic))]

    async def check(self) -> None:
        """Effects by cause, their order, and the states that the next owner finds, are those of the fold."""
        drafts, states = self.expected()
        wanted = {draft_cause(draft): (draft.topic, draft.key, draft.value) for draft in drafts}
        found = dict[bytes, tuple[str, bytes | None, bytes | None]]()
        for record in self.effects():
            what = (record.partition.topic, record.key, record.value)
            cause = draft_cause(record)
            assert found.setdefault(cause, what) == what, "one cause, two effects"
        assert found == wanted
        assert not self.log.records(NAMESPACE.of(DEAD_LETTERS))
        assert await self.restored() == states

    async def restored(self) -> dict[str, object]:
        """The states that a new owner would begin with."""
        stage = DeciderStage(self.decider, cast("Any", self.log), NAMESPACE)
        found = dict[str, object]()
        for partition in self.log.records_of(REQUESTS):
            owner: DeciderOwner[S] = await stage.own(partition, self.committed(partition))
            for key, held in owner.states.items():
                if parts := self.decider.dump(held.state):
                    found[key] = parts
        return found


async def a_count() -> World[Tally]:
    return await World[Tally].of(Counting(), counting_script())


def draft_cause(record: Draft | Record) -> bytes:
    return next(value for name, value in record.headers if name == codec.CAUSE) or b""


async def steps_of(decider: Decider[S], script: Sequence[Event]) -> int:
    """How many steps an undisturbed runner takes until all is committed and it has stopped."""
    world, life = await World.of(decider, script), Life(1_000_000)
    runner, task, _ = world.start(life)
    await world.committed_all()
    runner.stop()
    await task
    await world.check()
    steps = 1_000_000 - life.left
    await world.end()
    return steps


CASES = [
    pytest.param(Counting(), counting_script(), id="counting"),
    pytest.param(Admission(), admission_script(), id="admission"),
]


def each_step(decider: Decider[S], script: Sequence[Event], story: Callable[[World[S], Life], Awaitable[None]]) -> None:
    """Run `story` with a life that stops at every step of an undisturbed run, one after another."""

    async def all_of_them() -> None:
        steps = await steps_of(decider, script)
        assert steps > 80
        repeats = 0
        for step in range(steps):
            world, life = await World.of(decider, script), Life(step)
            try:
                await story(world, life)
                await world.check()
            finally:
                await world.end()
            repeats += len(world.effects()) - len(set(map(draft_cause, world.effects())))
        assert repeats > steps, "deaths between an effect and its commit were not among them"

    in_virtual_time(all_of_them)


async def succeeded(world: World[S]) -> None:
    """A successor finishes the work and stops as it should."""
    runner, task, _ = world.start(life := Life(-1))
    await world.committed_all()
    runner.stop()
    await task
    assert life.left == -1


@pytest.mark.parametrize(("decider", "script"), CASES)
def test_a_runner_killed_at_any_await_leaves_effects_and_state_as_if_it_had_not_been(
    decider: Decider[Any], script: Sequence[Event]
) -> None:
    async def killed(world: World[Any], life: Life) -> None:
        _, _, seen = world.start(life)
        await life.stopped.wait()
        if seen.member:
            world.log.expel(seen.member)
        await succeeded(world)

    each_step(decider, script, killed)


@pytest.mark.parametrize(("decider", "script"), CASES)
def test_a_zombie_that_wakes_beside_its_successor_changes_nothing(
    decider: Decider[Any], script: Sequence[Event]
) -> None:
    async def woken(world: World[Any], life: Life) -> None:
        _, zombie, seen = world.start(life)
        await life.stopped.wait()
        if seen.member:
            world.log.expel(seen.member)
        runner, task, _ = world.start(Life(-1))
        await runner.ready.wait()
        life.wake()
        if seen.member:
            with pytest.raises(LogError):
                await zombie
        else:
            # It had not joined yet: it is a member like any other now, and shares the work.
            await world.committed_all()
            zombie.cancel()
            await asyncio.wait([zombie])
        await world.committed_all()
        runner.stop()
        await task
        # What the zombie wrote after its successor had restored is put right by the next one.
        await succeeded(world)

    each_step(decider, script, woken)


@pytest.mark.parametrize("seed", range(40))
def test_owners_killed_again_and_again_at_random_awaits_come_to_the_same(seed: int) -> None:
    async def story() -> None:
        dice = random.Random(seed)  # noqa: S311 - not a secret
        script = [event for _ in range(4) for event in counting_script()]
        world = await World[Tally].of(Counting(), script)
        # Compaction waits for longer than a zombie lives: see `Snapshots`.
        compacts = seed % 2
        try:
            for _ in range(12):
                _, task, seen = world.start(life := Life(dice.randrange(20, 250)))
                await asyncio.wait([asyncio.ensure_future(life.stopped.wait()), task], timeout=3)
                assert seen.member
                world.log.expel(seen.member)
                if compacts:
                    world.log.compact(STATES)
                elif dice.random() < 0.5:
                    life.wake()
            await succeeded(world)
            await world.check()
        finally:
            await world.end()

    in_virtual_time(story)


def test_a_member_that_lost_its_partitions_commits_nothing_more() -> None:
    async def story() -> None:
        world = await a_count()
        runner, task, seen = world.start(Life(-1))
        await runner.ready.wait()
        assert seen.member
        world.log.expel(seen.member)
        before = [world.committed(part) for part in world.log.records_of(REQUESTS)]
        with pytest.raises(MembershipLost):
            await task
        assert [world.committed(part) for part in world.log.records_of(REQUESTS)] == before

    in_virtual_time(story)


def test_an_append_that_failed_is_repeated_by_the_next_runner() -> None:
    async def story() -> None:
        for stands in (False, True):
            for topic in (NAMESPACE.of(CHAT_STREAM), STATES):
                world = await a_count()
                world.log.fail_next_append(stands=stands, topic=topic)
                _, task, _ = world.start(Life(-1))
                with pytest.raises(LogError):
                    await task
                await succeeded(world)
                await world.check()

    in_virtual_time(story)


def test_the_harness_sees_a_snapshot_written_before_its_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: states count before their effects are acknowledged."""
    accept, append = DeciderOwner._accept, MemoryLog.append

    async def early(self: DeciderOwner[Any], records: Sequence[Record]) -> None:
        batch: Any = _Batch()
        for record in records:
            self._decide(record, batch)
        accept(self, batch, records)
        # Virtual time; the planted bug has to leave room for a kill.
        await asyncio.sleep(0.02)
        if batch.drafts:
            await append(cast("Any", self._log)._log, batch.drafts)

    # The bug that the harness has to find is planted here, in this test alone.
    monkeypatch.setattr(DeciderOwner, "_settle", early)
    with pytest.raises(AssertionError):
        test_a_runner_killed_at_any_await_leaves_effects_and_state_as_if_it_had_not_been(Counting(), counting_script())
