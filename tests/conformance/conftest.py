# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""The worlds in which the conformance suites run: what a test may do to a log from outside, in memory and on Kafka."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol
from uuid import uuid4

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped, unused-ignore]
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete  # type: ignore[import-untyped, unused-ignore]
from aiokafka.protocol.group import LeaveGroupRequest  # type: ignore[import-untyped, unused-ignore]
from aiokafka.structs import TopicPartition  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas.records import Draft, Partition
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_streams.log import Log, Membership
from klatch_streams.memory_log import MemoryLog
from klatch_workers.kafka import Cluster


class World(Protocol):
    """A log with hands around it."""

    @property
    def log(self) -> Log:
        """The log itself."""
        ...

    async def topic(self, partitions: int = 1) -> str:
        """A new topic."""
        ...

    async def truncate_before(self, partition: Partition, offset: int) -> None:
        """What retention does."""
        ...

    async def expel(self, group: str, member: Membership) -> None:
        """What the session timeout does."""
        ...

    async def transaction(self, partition: Partition, value: bytes, *, commit: bool) -> None:
        """What a producer with exactly-once does: a record, and its marker."""
        ...


class MemoryWorld:
    """A `MemoryLog`."""

    def __init__(self) -> None:
        self.topics = {f"t{size}-{number}": size for size in (1, 2, 4, 8) for number in range(4)}
        self._fresh = list(self.topics)
        self.log = MemoryLog(self.topics)

    async def topic(self, partitions: int = 1) -> str:
        name = next(name for name in self._fresh if self.topics[name] == partitions)
        self._fresh.remove(name)
        return name

    async def truncate_before(self, partition: Partition, offset: int) -> None:
        self.log.truncate_before(partition, offset)

    async def expel(self, group: str, member: Membership) -> None:
        assert member in self.log.members(group)
        self.log.expel(member)  # type: ignore[arg-type]

    async def transaction(self, partition: Partition, value: bytes, *, commit: bool) -> None:
        if commit:
            await self.log.append([Draft(partition.topic, None, value, (), partition.number)])
        else:
            # An aborted record is given to nobody, as its marker.
            self.log.mark(partition)
        self.log.mark(partition)


class KafkaWorld:
    """A `KafkaLog` and an administrator beside it."""

    def __init__(self, log: KafkaLog, admin: Any, bootstrap: str) -> None:
        self.log = log
        self._admin = admin
        self._bootstrap = bootstrap

    async def topic(self, partitions: int = 1) -> str:
        name = f"conformance-{uuid4().hex}"
        await self._admin.create_topics([NewTopic(name, partitions, 1)])
        return name

    async def truncate_before(self, partition: Partition, offset: int) -> None:
        await self._admin.delete_records({TopicPartition(*partition): RecordsToDelete(offset)})

    async def expel(self, group: str, member: Membership) -> None:
        # To the broker, leaving in somebody's name is the same as their session timing out.
        coordinator = member._coordinator  # type: ignore[attr-defined]
        await self._admin._client.send(coordinator.coordinator_id, LeaveGroupRequest(group, coordinator.member_id))

    async def transaction(self, partition: Partition, value: bytes, *, commit: bool) -> None:
        named = f"conformance-{uuid4().hex}"
        async with AIOKafkaProducer(bootstrap_servers=self._bootstrap, transactional_id=named) as producer:
            await producer.begin_transaction()
            await producer.send_and_wait(partition.topic, value, partition=partition.number)
            before = (await self.log.bounds(partition))[1]
            await (producer.commit_transaction() if commit else producer.abort_transaction())
        # The coordinator answers before the marker stands; until then what is behind it is not to be read.
        async with asyncio.timeout(30):
            while (await self.log.bounds(partition))[1] == before:
                pass


@pytest_asyncio.fixture
async def memory_world() -> AsyncIterator[World]:
    """A world of its own for a test."""
    world = MemoryWorld()
    yield world
    await world.log.close()


@pytest_asyncio.fixture
async def kafka_world(kafka: Cluster) -> AsyncIterator[World]:
    """A log of its own for a test, on the broker of the session.

    The long poll is made so long that anything that waits for one shows.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    log = await KafkaLog.open(
        KafkaOptions(
            kafka.bootstrap,
            # As MemoryLog's, and as these topics are made: not from the table.
            max_record_bytes=1_000_000,
            fetch_wait_ms=35_000,
            patience_s=120,
            heartbeat_ms=100,
            session_ms=30_000,
            rebalance_ms=20_000,
        )
    )
    yield KafkaWorld(log, admin, kafka.bootstrap)
    await log.close()
    await admin.close()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.broker)])
def world(request: pytest.FixtureRequest) -> World:
    """Every conformance test runs in both."""
    found: World = request.getfixturevalue(f"{request.param}_world")
    return found
