# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""A partition without a leader outlasts an append: what aiokafka drops meanwhile leaves no gap that stops the rest."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas.records import Draft, Partition
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.log import AppendFailed, LogError
from klatch_workers.kafka import Cluster, Options

pytestmark = pytest.mark.broker

TOPIC, LEADER = "on-one-node", 3


async def create(bootstrap: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(TOPIC, -1, -1, replica_assignments={0: [LEADER]})])
    finally:
        await admin.close()


@asynccontextmanager
async def closing(options: KafkaOptions) -> AsyncGenerator[KafkaLog]:
    log = await KafkaLog.open(options)
    try:
        yield log
    finally:
        await log.close()


async def append(log: KafkaLog, value: bytes) -> str:
    """What came of it: empty, or why it failed."""
    try:
        await log.append([Draft(TOPIC, b"k", value)])
    except AppendFailed as error:
        return str(error)
    return ""


async def dropped(log: KafkaLog) -> None:
    """Return once aiokafka has given up as well: five seconds after there was no leader."""
    assert log._producer._producer
    held = log._producer._producer._message_accumulator
    assert held._pending_batches or any(held._batches.values()), "it gave up at once"
    async with asyncio.timeout(60):
        while held._pending_batches or any(held._batches.values()):  # noqa: ASYNC110 - see below
            # aiokafka tells nobody that it has dropped a batch.
            await asyncio.sleep(0.1)


async def test_appends_go_on_after_a_partition_had_no_leader_for_longer_than_one_may_take(tmp_path: Path) -> None:
    sooner = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
    async with Cluster(tmp_path, Options(nodes=3, properties=sooner)) as cluster, AsyncExitStack() as opened:
        await create(cluster.bootstrap)
        options = KafkaOptions(cluster.bootstrap, delivery_s=5)
        log = await opened.enter_async_context(closing(options))
        async with asyncio.timeout(60):
            while await append(log, b"before"):
                pass
        await cluster.nodes[LEADER - 1].kill()
        # Klatch gives up first, for certain: both would wait for five seconds.
        log._producer._options = replace(options, delivery_s=2)
        assert "did not acknowledge" in await append(log, b"given up")
        log._producer._options = options
        await dropped(log)
        await cluster.nodes[LEADER - 1].start(members=3)
        async with asyncio.timeout(60):
            while not await _leads(log):
                pass
        refusals = [said for _ in range(3) if (said := await append(log, b"after"))]
        assert len(refusals) <= 1, refusals
        tail = await log.tail()
        tail.follow(Partition(TOPIC, 0), 0)
        values = [record.value for record in await tail.read(10_000)]
        assert [value for value in values if value != b"before"] == [b"after"] * (3 - len(refusals))


async def _leads(log: KafkaLog) -> bool:
    try:
        await log.bounds(Partition(TOPIC, 0))
    except LogError:
        return False
    return True
