# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""How long a consumer group stands still: when a member dies while it joins, hangs, or leaves in the middle of it."""

import asyncio
import random
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas.records import Partition
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_streams.log import Membership, MembershipLost
from klatch_workers import leash
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker

SESSION_S = KafkaOptions("").session_ms / 1000
LOADED_S = 30.0
"""What a machine under load may add."""
LONG_S = 60.0
"""Of a session or a rebalance that is not to be waited for: told apart from a machine under load."""


async def new_topic(bootstrap: str) -> str:
    name = f"standstill-{uuid4().hex}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 2, 1)])
    finally:
        await admin.close()
    return name


@asynccontextmanager
async def member_process(*arguments: str) -> AsyncGenerator[Process]:
    argv = [sys.executable, str(Path(__file__).with_name("member_child.py")), *arguments]
    process = await leash.spawn(argv, stdout=PIPE)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def says(process: Process, what: str) -> None:
    assert process.stdout
    async with asyncio.timeout(120):
        while (line := await process.stdout.readline()).strip() != what.encode():
            assert line, f"it ended before it was {what}"


@pytest.mark.parametrize(
    ("instance", "session_s", "within_s"), [("one", LONG_S, LOADED_S), (None, SESSION_S, 2 * SESSION_S + LOADED_S)]
)
async def test_members_killed_one_after_the_other_while_they_join_hold_their_successor_up_no_longer_than_sessions(
    kafka: Cluster, instance: str | None, session_s: float, within_s: float
) -> None:
    topic = await new_topic(kafka.bootstrap)
    times = (f"{session_s * 1000:.0f}", f"{LONG_S * 1000:.0f}")
    member = (kafka.bootstrap, f"of-{topic}", topic, *times, *([instance] if instance else []))
    async with member_process(*member) as first:
        await says(first, "assigned")
    for _ in range(2):
        async with member_process(*member) as killed:
            await says(killed, "joining")
            await asyncio.sleep(random.uniform(0, 0.05))  # noqa: S311 - before, between, behind its join and its sync
    async with member_process(*member) as successor:
        await says(successor, "joining")
        began = time.monotonic()
        await says(successor, "assigned")
        assert time.monotonic() - began < within_s


class Listening:
    """Tells when it is assigned, and lets go when it may."""

    def __init__(self) -> None:
        self.owns, self.asked, self.may_let_go = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.may_let_go.set()

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        if partitions:
            self.owns.set()

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        del partitions
        self.asked.set()
        await self.may_let_go.wait()


class Committing(Listening):
    """Commits what it has when it lets go."""

    def __init__(self, place: Partition) -> None:
        super().__init__()
        self._place, self.member = place, list[Membership]()

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        await super().revoked(partitions)
        await self.member[0].commit({self._place: 0})


async def reading(member: Membership) -> None:
    while True:
        await member.read(500)


async def test_a_member_that_does_not_let_go_holds_its_group_up_for_the_rebalance_time_out_and_is_told(
    kafka: Cluster,
) -> None:
    topic, rebalance_s = await new_topic(kafka.bootstrap), 12.0
    group = f"of-{topic}"
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap, rebalance_ms=int(rebalance_s * 1000)))
    hanging, other = Committing(Partition(topic, 0)), Listening()
    hanging.may_let_go.clear()
    hanging.member.append(await log.join(group, topic, hanging))
    told = asyncio.create_task(reading(hanging.member[0]))
    await hanging.owns.wait()
    began = time.monotonic()
    waits = asyncio.create_task(reading(await log.join(group, topic, other)))
    async with asyncio.timeout(rebalance_s + SESSION_S + LOADED_S):
        await other.owns.wait()
    # Not before: whoever drains must be left the time, however long its session.
    assert rebalance_s - 1 < time.monotonic() - began < rebalance_s + LOADED_S
    hanging.may_let_go.set()
    async with asyncio.timeout(SESSION_S + LOADED_S):
        with pytest.raises(MembershipLost):
            await told
    waits.cancel()
    await asyncio.wait({waits})
    await log.close()


async def test_a_member_that_leaves_while_it_joins_is_gone_at_once_and_holds_nobody_up(kafka: Cluster) -> None:
    topic = await new_topic(kafka.bootstrap)
    group = f"of-{topic}"
    long_ms = int(LONG_S * 1000)
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap, session_ms=long_ms, rebalance_ms=long_ms))
    first, second = Listening(), Listening()
    first.may_let_go.clear()
    owner = await log.join(group, topic, first)
    tasks = {asyncio.create_task(reading(owner))}
    await first.owns.wait()
    joins = await log.join(group, topic, Listening())
    # It waits in the group for the owner to let go, which it has been asked to.
    await first.asked.wait()
    began = time.monotonic()
    await joins.close()
    assert time.monotonic() - began < LOADED_S
    tasks.add(asyncio.create_task(reading(await log.join(group, topic, second))))
    first.owns.clear()
    first.may_let_go.set()
    async with asyncio.timeout(LOADED_S):
        await asyncio.gather(first.owns.wait(), second.owns.wait())
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await log.close()
