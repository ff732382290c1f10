"""A reply that lasts longer than the session time-out costs its worker nothing: heartbeats do not wait for it.

`--reply-minutes 10` has the same of a reply that lasts for ten minutes; see docs/reliability.md.
"""
# pyright: basic

import asyncio
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tests.broker.generation_process import TENANT, ask, generation

from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.client import Client
from klatch_schemas.events import StreamAttempt
from klatch_schemas.records import Partition
from klatch_schemas.topics import CHAT_STREAM, Namespace
from klatch_streams.catch_up import catch_up
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.doctor.group_facts import cluster_admin
from klatch_workers.kafka import Cluster

# Ten minutes, and what a machine under load takes; the test has a time-out of its own that fits its reply.
pytestmark = [pytest.mark.broker, pytest.mark.timeout(1200)]

TOKEN_S = 2.5
"""Between two tokens: a slow model, and a worker that is idle nearly all the time."""
PARTITIONS = 2


@pytest.fixture
def reply_s(request: pytest.FixtureRequest) -> float:
    """How long the reply lasts."""
    minutes = request.config.getoption("--reply-minutes", default=0.5)
    assert isinstance(minutes, float)
    return minutes * 60


async def members(bootstrap: str, group: str) -> dict[str, bytes]:
    """The members of a group and what each is assigned, as the group's coordinator has it."""
    async with cluster_admin(KafkaOptions(bootstrap)) as admin:
        response: Any = (await admin.describe_consumer_groups([group]))[0]
    return {member[0]: member[-1] for member in response.groups[0][5]}


async def openings(log: KafkaLog, place: Partition) -> int:
    tail, opened = await log.tail(), 0
    async for records in catch_up(tail, place, *(await log.bounds(place))):
        opened += sum(isinstance(codec.decode(record.value), StreamAttempt) for record in records)
    await tail.close()
    return opened


async def test_a_reply_longer_than_the_session_keeps_the_membership_and_has_one_attempt(
    kafka: Cluster, tmp_path: Path, reply_s: float
) -> None:
    name = f"long-{uuid4().hex[:8]}"
    namespace, tokens = Namespace.named(name), int(reply_s / TOKEN_S)
    assert tokens * TOKEN_S * 1000 > KafkaOptions("").session_ms * 2
    await create_topics(kafka.bootstrap, namespace, Partitions(PARTITIONS, PARTITIONS))
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    async with (
        Upstream() as upstream,
        generation(kafka.bootstrap, name, upstream.url, tmp_path / "generation.log") as worker,
        Client(kafka.bootstrap, tenant=TENANT, namespace=name) as client,
    ):
        owner = await members(kafka.bootstrap, namespace.group("generation"))
        assert len(owner) == 1
        began = time.monotonic()
        model = f"fake?reply=unique&tokens={tokens}&rate={1 / TOKEN_S}"
        stream = await ask(log, namespace, "r1", model, PARTITIONS)
        async with asyncio.timeout(reply_s * 1.5 + 60):
            text = "".join([shown.text async for shown in client.read(stream)])
        assert time.monotonic() - began > (tokens - 1) * TOKEN_S
        [call] = upstream.calls
        assert (call.outcome, text) == ("finished", "".join(f"<<{call.id}:{n}>>" for n in range(tokens)))
        assert await openings(log, Partition(namespace.of(CHAT_STREAM), stream.partition)) == 1
        assert await members(kafka.bootstrap, namespace.group("generation")) == owner, "the partitions changed hands"
        assert (worker.told("runner.assigned"), worker.told("runner.revoked")) == (1, 0)
    await log.close()
