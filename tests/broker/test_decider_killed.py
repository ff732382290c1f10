# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""Admission on real Kafka is killed with SIGKILL, at work and while it restores: the log shows what came of it.

The test trusts only the log: what a replay of the input decides is what stands there, told apart by cause.
"""

import asyncio
import random
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, Event, Limits, QuotaLimitSet, Usage, UsageSettled
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import ADMISSION_STATE, CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, DEAD_LETTERS, Namespace
from klatch_streams.admission import Admission
from klatch_streams.catch_up import catch_up
from klatch_streams.decider_owner import DeciderStage
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_streams.kernel import Input, drafts_of
from klatch_streams.log import Log
from klatch_streams.quota.ledger import Ledger
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker

PARTITIONS = 2
EVENTS_PER_SECOND = 200
TENANTS = 20


async def make_topics(bootstrap: str, namespace: Namespace) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        topics = (CHAT_REQUESTS, ADMISSION_STATE, CHAT_ADMITTED, CHAT_STREAM, DEAD_LETTERS)
        await admin.create_topics(
            [NewTopic(namespace.of(topic), PARTITIONS, 1, topic_configs=topic.config) for topic in topics]
        )
    finally:
        await admin.close()


class Child:
    """An admission process."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @classmethod
    @asynccontextmanager
    async def started(
        cls, bootstrap: str, namespace: Namespace, *, commits_every_s: float = 0.2
    ) -> "AsyncGenerator[Child, None]":
        """A child that is killed at the end, if it lives."""
        script = Path(__file__).with_name("admission_child.py")
        arguments = (bootstrap, namespace.prefix, str(commits_every_s))
        process = await asyncio.create_subprocess_exec(sys.executable, script, *arguments, stdout=DEVNULL, stderr=PIPE)
        try:
            yield cls(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def says(self, what: str) -> None:
        assert self.process.stderr
        said = list[str]()
        while line := (await self.process.stderr.readline()).decode():
            said.append(line)
            if line.strip() == what:
                return
        raise AssertionError(f"the child ended before it said {what}: {''.join(said)}")


class Producing:
    """Asks and settles, 200 events a second, until told to stop."""

    def __init__(self, log: Log, namespace: Namespace) -> None:
        self.stopped = asyncio.Event()
        self.sent = 0
        self._log, self._topic = log, namespace.of(CHAT_REQUESTS)

    async def run(self) -> None:
        await self._say(
            *[QuotaLimitSet(tenant=tenant(n), limits=Limits(concurrent_requests=9)) for n in range(TENANTS)]
        )
        pace = asyncio.get_running_loop()
        began = pace.time()
        while not self.stopped.is_set():
            due = int((pace.time() - began) * EVENTS_PER_SECOND) - self.sent
            await self._say(*[event(self.sent + n) for n in range(due)])
            self.sent += due
            # The load's own pace.
            await asyncio.sleep(0.01)

    async def ask_all(self) -> None:
        """One more request of every tenant: when these are decided, everything before them is."""
        await self._say(*[request(f"last-{number}", number) for number in range(TENANTS)])

    async def _say(self, *events: Event) -> None:
        await self._log.append([codec.draft(self._topic, cast("UsageSettled", one).tenant, one) for one in events])


def tenant(number: int) -> Tenant:
    return Tenant(f"tenant-{number % TENANTS}")


def event(number: int) -> Event:
    """Two requests, then a settlement of one of the tenant's earlier ones."""
    if number % 3 == 2:
        earlier = number - 3 * TENANTS - 1
        used = Usage(prompt_tokens=number % 50)
        return UsageSettled(request=RequestId(f"r{earlier}"), tenant=tenant(earlier), status="completed", usage=used)
    return request(f"r{number}", number)


def request(name: str, number: int) -> ChatRequested:
    return ChatRequested(
        request=RequestId(name),
        tenant=tenant(number),
        conversation=Conversation(f"c{number % 7}"),
        body={"model": "m", "messages": [{"role": "user", "content": "x" * (number % 90)}], "max_tokens": 64},
    )


async def everything(log: Log, topic: str) -> list[Record]:
    records, tail = list[Record](), await log.tail()
    for number in range(PARTITIONS):
        partition = Partition(topic, number)
        async for some in catch_up(tail, partition, *(await log.bounds(partition))):
            records += some
        tail.unfollow(partition)
    await tail.close()
    return records


async def all_decided(log: Log, namespace: Namespace) -> None:
    """Wait until every effect stands in the log."""
    wanted, _ = await replayed(log, namespace)
    async with asyncio.timeout(120):
        while not {cause_of(record) for record in await effects_in(log, namespace)} >= wanted.keys():  # noqa: ASYNC110
            # The log tells nobody that it grew; the time-out above bounds this.
            await asyncio.sleep(0.2)


async def effects_in(log: Log, namespace: Namespace) -> list[Record]:
    return [record for topic in (CHAT_ADMITTED, CHAT_STREAM) for record in await everything(log, namespace.of(topic))]


async def an_effect(log: Log, namespace: Namespace) -> None:
    """Return once there is one more."""
    tail = await log.tail()
    for topic in (CHAT_ADMITTED, CHAT_STREAM):
        for number in range(PARTITIONS):
            place = Partition(namespace.of(topic), number)
            tail.follow(place, (await log.bounds(place))[1])
    async with asyncio.timeout(60):
        while not await tail.read(1_000):
            pass
    await tail.close()


async def states(log: Log, namespace: Namespace) -> dict[str, object]:
    stage = DeciderStage[Ledger](Admission(), log, namespace)
    found = dict[str, object]()
    for number in range(PARTITIONS):
        owner = await stage.own(Partition(stage.topic, number), 0)
        found |= {key: plain(held.state) for key, held in owner.states.items()}
    return found


def plain(state: Ledger) -> object:
    return codec.loads(codec.dumps(Admission().dump(state)))


async def replayed(
    log: Log, namespace: Namespace
) -> tuple[dict[bytes, tuple[str, bytes | None, bytes | None]], dict[str, object]]:
    """What an undisturbed admission decides on the input: its effects by cause, and its states."""
    admission, ledgers = Admission(), dict[str, Ledger]()
    effects = dict[bytes, tuple[str, bytes | None, bytes | None]]()
    for record in await everything(log, namespace.of(CHAT_REQUESTS)):
        key = (record.key or b"").decode()
        said: Input[Ledger] = Input(cast("Event", codec.decode(record.value)), record.timestamp_ms)
        ledgers[key], emitted = admission.decide(ledgers.get(key) or admission.initial(key), said)
        for draft in drafts_of(emitted, record, namespace):
            effects[cause_of(draft)] = (draft.topic, draft.key, draft.value)
    return effects, {key: plain(ledger) for key, ledger in ledgers.items()}


def cause_of(record: Record | Draft) -> bytes:
    return next(value for name, value in record.headers if name == codec.CAUSE) or b""


async def test_admission_killed_at_work_and_while_it_restores_loses_doubles_and_mistakes_nothing(
    kafka: Cluster,
) -> None:
    namespace = Namespace.named(f"kill-{uuid4().hex[:8]}")
    await make_topics(kafka.bootstrap, namespace)
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    try:
        sent = await keep_killing(kafka.bootstrap, namespace, log)
        wanted, ledgers = await replayed(log, namespace)
        found = dict[bytes, tuple[str, bytes | None, bytes | None]]()
        effects = await effects_in(log, namespace)
        for record in effects:
            what = (record.partition.topic, record.key, record.value)
            assert found.setdefault(cause_of(record), what) == what, "one cause, two effects"
        assert found == wanted, "lost or wrong effects"
        assert await states(log, namespace) == ledgers
        assert await everything(log, namespace.of(DEAD_LETTERS)) == []
        assert sent > 500
        assert len(effects) > len(found), "no kill fell between an effect and its commit: nothing was shown"
    finally:
        await log.close()


async def keep_killing(bootstrap: str, namespace: Namespace, log: Log) -> int:
    """Kill admission at work and while it restores, then let one finish; returns how many events were sent."""
    producing = Producing(log, namespace)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(producing.run())
        try:
            for kill_at in ("ready", "owning", "ready", "owning", "ready"):
                async with Child.started(bootstrap, namespace) as child:
                    await child.says(kill_at)
                    if kill_at == "ready":
                        # Somewhere between two commits, with records on their way.
                        await asyncio.sleep(random.uniform(0.5, 1.2))  # noqa: S311 - not a secret
            async with Child.started(bootstrap, namespace, commits_every_s=600) as child:
                await child.says("ready")
                # This one is killed between an effect and its commit, however slow the machine is.
                await an_effect(log, namespace)
        finally:
            producing.stopped.set()
    async with Child.started(bootstrap, namespace) as child:
        await producing.ask_all()
        await all_decided(log, namespace)
        child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0, "admission did not stop as it should"
    return producing.sent
