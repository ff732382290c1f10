# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""Kafka as a child process: it keeps data, says what is wrong, and never outlives us."""

from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer  # type: ignore[import-untyped, unused-ignore]
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker


async def create_topic(bootstrap: str, *, replicas: int = 1) -> str:
    topic = f"t-{uuid4().hex}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, replicas)])
    finally:
        await admin.close()
    return topic


async def produce(bootstrap: str, topic: str, *values: bytes) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer:
        for value in values:
            await producer.send_and_wait(topic, value)


async def consume(bootstrap: str, topic: str, count: int) -> list[bytes | None]:
    async with AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest") as consumer:
        return [(await consumer.getone()).value for _ in range(count)]


async def test_the_shared_broker_gives_back_what_was_produced(kafka: Cluster) -> None:
    topic = await create_topic(kafka.bootstrap)
    await produce(kafka.bootstrap, topic, b"one", b"two")
    assert await consume(kafka.bootstrap, topic, 2) == [b"one", b"two"]
