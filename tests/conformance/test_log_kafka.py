# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""What only a broker can do to a `KafkaLog`: be away, keep its own time, count heartbeats, answer late."""

import asyncio
import gc
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas.records import Draft, Partition
from klatch_streams.kafka_log import KafkaLog, KafkaOptions, Unreachable
from klatch_streams.log import AppendFailed, Listener, LogError
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker


async def new_topic(bootstrap: str, partitions: int = 1, **configs: str) -> str:
    name = f"kafka-{uuid4().hex}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        topic_configs = {key.replace("_", "."): value for key, value in configs.items()}
        await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=topic_configs)])
    finally:
        await admin.close()
    return name


async def test_a_broker_that_never_comes_up_is_named() -> None:
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 within 1 s.*KLATCH_KAFKA"):
        await KafkaLog.open(KafkaOptions("127.0.0.1:1", startup_s=1))
    assert time.monotonic() - started < 4


async def test_a_topic_with_log_append_time_shows_the_brokers_time(kafka: Cluster) -> None:
    topic = await new_topic(kafka.bootstrap, message_timestamp_type="LogAppendTime")
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    before = time.time_ns() // 1_000_000
    await log.append([Draft(topic, b"k", b"1"), Draft(topic, b"k", b"2")])
    tail = await log.tail()
    tail.follow(Partition(topic, 0), 0)
    first, second = await tail.read(10_000)
    assert before <= first.timestamp_ms == second.timestamp_ms <= time.time_ns() // 1_000_000
    await log.close()


async def test_a_reader_that_was_closed_is_not_kept(kafka: Cluster) -> None:
    """A door opens one for each stream that it looks up, and each knows the whole cluster."""
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    tail, member = await log.tail(), await log.join(uuid4().hex, await new_topic(kafka.bootstrap), Nobody())
    kept: list[weakref.ref[Any]] = [weakref.ref(tail), weakref.ref(member)]
    await tail.close()
    await member.close()
    del tail, member
    await log.tail()
    gc.collect()
    assert [one() for one in kept] == [None, None]
    await log.close()


class Nobody(Listener):
    """Is told, and does nothing."""

    async def assigned(self, partitions: Sequence[Partition]) -> None: ...

    async def revoked(self, partitions: Sequence[Partition]) -> None: ...


async def test_getting_ready_may_take_longer_than_a_session(kafka: Cluster) -> None:
    class Slow(Listener):
        async def assigned(self, partitions: Sequence[Partition]) -> None:
            del partitions
            # Longer than the group's session time-out: that is what is tested.
            await asyncio.sleep(8)

        async def revoked(self, partitions: Sequence[Partition]) -> None: ...

    topic = await new_topic(kafka.bootstrap)
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap, session_ms=6_000, heartbeat_ms=1_000))
    await log.append([Draft(topic, b"k", b"v")])
    member = await log.join(f"g-{uuid4().hex}", topic, Slow())
    async with asyncio.timeout(20):
        while not (got := await member.read(1_000)):
            pass
    assert len(got[Partition(topic, 0)]) == 1
    await member.commit({Partition(topic, 0): 1})
    await log.close()


async def test_a_reader_that_rests_gets_more_at_a_time_and_misses_nothing(kafka: Cluster) -> None:
    topic, pause_s = await new_topic(kafka.bootstrap), 0.05
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    try:
        tail = await log.tail(pause_ms=50)
        tail.follow(Partition(topic, 0), 0)

        async def write() -> None:
            for _ in range(100):
                await log.append([Draft(topic, b"k", b"v")])

        began = time.monotonic()
        writing, seen, reads = asyncio.create_task(write()), list[int](), 0
        while len(seen) < 100:
            seen += [record.offset for record in await tail.read(10_000)]
            reads += 1
        # Some may go without a rest; all others are so far apart, however slow the machine is.
        assert reads <= 6 + (time.monotonic() - began) / pause_s
        await writing
        assert seen == list(range(100))
    finally:
        await log.close()


async def test_what_the_broker_refuses_leaves_no_gap_that_stops_what_comes_after(kafka: Cluster) -> None:
    topic = await new_topic(kafka.bootstrap, max_message_bytes="2000")
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    try:
        await log.append([Draft(topic, b"k", b"1")])
        for _ in range(2):
            with pytest.raises(AppendFailed, match="MessageSizeTooLarge"):
                await log.append([Draft(topic, b"k", b"x" * 5_000)])
            await log.append([Draft(topic, b"k", b"2")])
        tail = await log.tail()
        tail.follow(Partition(topic, 0), 0)
        assert [record.value for record in await tail.read(10_000)] == [b"1", b"2", b"2"]
    finally:
        await log.close()


async def test_a_broker_that_stops_fails_appends_in_time_and_one_that_comes_back_takes_them(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    await cluster.start()
    try:
        topic = await new_topic(cluster.bootstrap)
        log = await KafkaLog.open(KafkaOptions(cluster.bootstrap, delivery_s=2, patience_s=3))
        await log.append([Draft(topic, b"k", b"1")])
        tail = await log.tail()
        tail.follow(Partition(topic, 0), 0)
        assert len(await tail.read(10_000)) == 1
        await cluster.stop()
        started = time.monotonic()
        with pytest.raises(AppendFailed, match=f"{topic}/0"):
            await log.append([Draft(topic, b"k", b"lost")])
        assert time.monotonic() - started < 8
        with pytest.raises(LogError, match="no broker has answered"):
            await tail.read(10_000)
        await cluster.start()
        async with asyncio.timeout(30):
            while True:
                try:
                    await log.bounds(Partition(topic, 0))
                    break
                except LogError:
                    continue
        await log.append([Draft(topic, b"k", b"2")])
        tail.follow(Partition(topic, 0), 1)
        values = [record.value for record in await tail.read(10_000)]
        # What was given up may stand after all, but only before what was appended later.
        assert values in ([b"2"], [b"lost", b"2"])
        await log.close()
    finally:
        await cluster.stop()
