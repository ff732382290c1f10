"""A reply that lasts longer than the session time-out costs its worker nothing: heartbeats do not wait for it."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import time
from uuid import uuid4

import pytest

from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import ChatAdmitted, ChatRequested, PromptPublished, Reservation, StreamAttempt, TrustVerdict
from klatch_schemas.records import Cause, Partition, partition_of
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, TRUST_VERDICTS, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.runner import Runner, RunnerSettings
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.generation.prepare import Preparer
from klatch_workers.generation.stage import GenerationStage
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker

SESSION_MS = 6_000
LASTS_S = 20
PARTITIONS = 2


class NoPrompts:
    """An empty ledger."""

    def find(self, *_: object) -> PromptPublished | None:
        return None


async def ask(log: KafkaLog, namespace: Namespace) -> ChatRequested:
    """A request as admission and screening hand it on, whose reply takes `LASTS_S`."""
    model = f"fake?reply=unique&tokens={LASTS_S * 2}&rate=2"
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    request = ChatRequested(request="r1", tenant="acme", conversation="c1", body=body)
    verdict = TrustVerdict(
        request="r1", tenant="acme", conversation="c1", stage="input", decision="allow", policy="test"
    )
    now_ms = int(time.time() * 1000)
    admitted = ChatAdmitted(
        request=request, requested_ms=now_ms, reservation=Reservation(tokens=100, expires_ms=now_ms)
    )
    cause = Cause(Partition(namespace.of(CHAT_REQUESTS), 0), 0, 0)
    await log.append(
        [
            codec.draft(namespace.of(TRUST_VERDICTS), "c1", verdict),
            codec.draft(namespace.of(CHAT_ADMITTED), "c1", admitted, cause=cause),
        ]
    )
    return request


async def test_a_reply_longer_than_the_session_keeps_the_membership_and_has_one_attempt(kafka: Cluster) -> None:
    namespace = Namespace.named(f"long-{uuid4().hex[:8]}")
    options = KafkaOptions(kafka.bootstrap, session_ms=SESSION_MS, heartbeat_ms=1_000)
    await create_topics(options, namespace, Partitions(PARTITIONS, PARTITIONS))
    log = await KafkaLog.open(options)
    async with Upstream() as upstream, OpenAICompatible(Endpoint(upstream.url)) as gateway:
        stage = GenerationStage(log, namespace, gateway, Preparer(NoPrompts()))
        assigned = list[int]()

        class Watched(Runner):
            async def assigned(self, partitions: object) -> None:
                assigned.append(len(list(partitions)))  # type: ignore[call-overload]
                await super().assigned(partitions)  # type: ignore[arg-type]

        runner = Watched(log, stage, namespace.group(stage.name), RunnerSettings(drain_s=1.0))
        running = asyncio.create_task(runner.run())
        request = await ask(log, namespace)
        assembly, openings = Assembly(), 0
        tail = await log.tail()
        tail.follow(Partition(namespace.of(CHAT_STREAM), partition_of(b"c1", PARTITIONS)), 0)
        began = time.monotonic()
        async with asyncio.timeout(LASTS_S * 3):
            while not assembly.state.settled:
                for record in await tail.read(1_000):
                    said = codec.decode(record.value)
                    assert said.request == request.request  # type: ignore[union-attr]
                    openings += isinstance(said, StreamAttempt)
                    assembly.hear(record.offset, said)
                assert not running.done(), "the worker lost its membership"
        assert time.monotonic() - began > SESSION_MS / 1000 * 2
        assert assembly.state.status == "completed"
        assert (openings, len(upstream.calls), len(assigned)) == (1, 1, 1)
        runner.stop()
        await running
        await tail.close()
        await stage.close()
    await log.close()
