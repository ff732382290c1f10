# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""The views process on Kafka: it counts every record once, however often it is killed."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import aiohttp
import faust
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition  # type: ignore[import-untyped, unused-ignore]
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete  # type: ignore[import-untyped, unused-ignore]
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from click.testing import CliRunner

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatRefused,
    ChatRequested,
    Refusal,
    TrustVerdict,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, TRUST_VERDICTS, Namespace
from klatch_streams.log import UnknownTopic
from klatch_workers import leash
from klatch_workers.cli.top import top
from klatch_workers.kafka import Cluster
from klatch_workers.settings import Settings
from klatch_workers.views.app import SOURCES, RecordLost, Views
from klatch_workers.views.calm import CalmTransport
from klatch_workers.views.offsets import Offsets
from klatch_workers.views.run import run_views
from klatch_workers.views.shapes import Shape

pytestmark = pytest.mark.broker

PARTITIONS = ((CHAT_REQUESTS, 2), (CHAT_ADMITTED, 3), (TRUST_VERDICTS, 3))
TENANTS = [Tenant("acme"), Tenant("zeta")]
KEY = "the-internal-key"


class Town:
    """A namespace of Kafka with the topics that views read, and what a test does to them."""

    def __init__(self, bootstrap: str, namespace: Namespace) -> None:
        self.bootstrap, self.namespace = bootstrap, namespace

    async def build(self) -> None:
        topics = [NewTopic(self.namespace.of(topic), count, 1) for topic, count in PARTITIONS]
        async with self._admin() as admin:
            await admin.create_topics(topics)

    async def write(self, drafts: Sequence[Draft]) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap, acks="all") as producer:
            sent = [await producer.send(one.topic, one.value, key=one.key, headers=list(one.headers)) for one in drafts]
            await asyncio.gather(*sent)
            self.ends = {
                TopicPartition(record.topic, record.partition): record.offset + 1
                for record in sorted([await one for one in sent], key=lambda record: record.offset)
            }

    async def drained(self) -> None:
        """Return once views have committed everything written: they will count no more, right or wrong."""
        async with self._admin() as admin:
            while True:
                held = await admin.list_consumer_group_offsets(self.namespace.group("views"))
                if all(tp in held and held[tp].offset >= end for tp, end in self.ends.items()):
                    return
                # Kafka tells nobody of a commit: it has to be asked again.
                await asyncio.sleep(0.1)

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[Any]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()


class Worker:
    """A views process, and its reading side."""

    def __init__(self, process: Process, url: str) -> None:
        self.process, self.url = process, url

    async def get(self, path: str, key: str = KEY) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}) as session,
            session.get(self.url + path) as answer,
        ):
            return answer.status, await answer.text()

    async def rows(self, query: str = "") -> dict[tuple[str, str], dict[str, Any]]:
        status, text = await self.get(f"/v1/views/usage?minutes=30{query}")
        assert status == 200, text
        said = json.loads(text)
        assert said["complete"]
        return {(row["tenant"], row["model"]): row for row in said["rows"]}

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


async def start(town: Town, data: Path, **settings: str) -> Worker:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("KLATCH_")},
        "KLATCH_KAFKA": town.bootstrap,
        "KLATCH_NAMESPACE": town.namespace.prefix.rstrip("."),
        "KLATCH_VIEWS": "127.0.0.1:0",
        "KLATCH_DATA": str(data),
        "KLATCH_INTERNAL_KEY": KEY,
        **settings,
    }
    process = await leash.spawn([sys.executable, "-m", "klatch_workers.views"], env=environment, stderr=PIPE)
    assert process.stderr is not None
    heard = list[bytes]()
    async for line in process.stderr:
        heard.append(line)
        if b'"views.ready"' in line:
            return Worker(process, json.loads(line)["url"])
    raise AssertionError(b"".join(heard).decode())


def requests(town: Town, count: int) -> list[Draft]:
    """`count` requests a tenant, all of them settled."""
    topic, drafts = town.namespace.of(CHAT_REQUESTS), list[Draft]()
    for tenant in TENANTS:
        for _ in range(count):
            request = RequestId(uuid4().hex)
            asked = ChatRequested(
                request=request, tenant=tenant, conversation=Conversation("c"), body={"model": "m", "messages": []}
            )
            usage = Usage(prompt_tokens=10, completion_tokens=3)
            settled = UsageSettled(
                request=request,
                tenant=tenant,
                model="m",
                status="completed",
                usage=usage,
                first_token_ms=80,
                total_ms=900,
            )
            drafts += [codec.draft(topic, tenant, asked), codec.draft(topic, tenant, settled)]
    return drafts


async def write_on(town: Town, stop: asyncio.Event) -> int:
    """Write 20 requests a tenant again and again; returns how many these were."""
    rounds = 0
    while not stop.is_set():
        await town.write(requests(town, 20))
        rounds += 1
    return 20 * rounds


def decisions(town: Town, count: int) -> list[Draft]:
    """`count` refusals and blocks of acme, over all partitions."""
    drafts = list[Draft]()
    for number in range(count):
        about = {"request": RequestId(uuid4().hex), "tenant": TENANTS[0], "conversation": Conversation(f"c{number}")}
        refusal = Refusal(code="rate_limit_exceeded", limit="requests_per_minute", message="")
        refused = ChatRefused(**about, model="m", refusal=refusal)
        verdict = TrustVerdict(**about, stage="input", decision="block", categories=("injection",), policy="1")
        drafts += [
            codec.draft(town.namespace.of(CHAT_ADMITTED), f"c{number}", refused),
            codec.draft(town.namespace.of(TRUST_VERDICTS), f"c{number}", verdict),
        ]
    return drafts


def unreadable(town: Town) -> list[Draft]:
    topics = [town.namespace.of(topic) for topic, _ in PARTITIONS]
    return [Draft(topic, b"k", value) for topic in topics for value in (b"\xff", b'{"kind":"chat.requested.v1"}', None)]


class NotUtf8(str):
    """A header's name whose bytes no reader can take for text; Python's producer would not send them otherwise."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        return b"\xff\xfe"


async def odd_headers(town: Town) -> None:
    """A batch that aiokafka cannot unpack, on the first partition of all that views read."""
    async with AIOKafkaProducer(bootstrap_servers=town.bootstrap) as producer:
        for topic, _ in PARTITIONS:
            batch = producer.create_batch()
            batch._builder = _DefaultRecordBatchBuilderPy(2, 0, 0, -1, -1, -1, 1 << 20)
            batch.append(key=b"k", value=b"v", timestamp=None, headers=[(NotUtf8(), b"said")])
            await (await producer.send_batch(batch, town.namespace.of(topic), partition=0))


@pytest.fixture
async def town(kafka: Cluster) -> Town:
    built = Town(kafka.bootstrap, Namespace.named(f"views-{uuid4().hex[:8]}"))
    await built.build()
    return built


async def test_a_worker_that_is_killed_while_it_counts_counts_every_record_once(town: Town, tmp_path: Path) -> None:
    await odd_headers(town)
    await town.write([*unreadable(town), *decisions(town, 50), *requests(town, 500)])
    first = await start(town, tmp_path)
    counted, written, writing = 0, 500, asyncio.create_task(write_on(town, killed := asyncio.Event()))
    while counted < 300:
        rows = await first.rows()
        counted = rows["acme", "m"]["requests"] if ("acme", "m") in rows else 0
    # It is not done before it is killed, however long that takes: there is always more to count.
    await first.kill()
    killed.set()
    written += await writing
    await town.write([*decisions(town, 50), *requests(town, 50)])
    written += 50

    second = await start(town, tmp_path)
    await town.drained()
    rows = await second.rows()
    assert set(rows) == {("acme", "m"), ("acme", ""), ("zeta", "m")}
    for tenant in TENANTS:
        row = rows[tenant, "m"]
        assert (row["requests"], row["completed"], row["failed"]) == (written, written, 0)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (10 * written, 3 * written)
        assert row["first_token_ms"]["count"] == row["total_ms"]["count"] == written
        assert 75 <= row["first_token_ms"]["p50"] <= 100
    assert rows["acme", "m"]["refusals"] == {"requests_per_minute": 100}
    assert rows["acme", ""]["blocks"] == {"injection": 100}
    assert set(await second.rows("&tenant=zeta")) == {("zeta", "m")}

    second.process.terminate()
    assert await second.process.wait() == 0


async def test_what_waits_to_be_written_leaves_though_another_topic_is_new_to_the_producer(kafka: Cluster) -> None:
    town = Town(kafka.bootstrap, Namespace.named(f"views-{uuid4().hex[:8]}"))
    known, new = town.namespace.group("known"), town.namespace.of(CHAT_REQUESTS)
    app = faust.App("views", broker=f"kafka://{kafka.bootstrap}")
    producer: Any = CalmTransport(app.conf.broker_producer, app).create_producer()
    await producer.start()
    await producer.create_topic(known, 1, 1)
    await town.build()
    async with asyncio.timeout(60):
        meeting = asyncio.create_task(producer.send(new, b"k", b"v", 0, None, None))
        await asyncio.sleep(0)
        # The first is on its way when the producer hears of `new`; what comes behind it waits.
        writing = [await producer.send(known, b"k", b"v" * 10_000, 0, None, None) for _ in range(20)]
        writing.append(await meeting)
        assert {(await one).topic for one in writing} == {known, new}
    await producer.stop()


async def test_the_reading_side_answers_those_who_know_the_key(town: Town, tmp_path: Path) -> None:
    await town.write([*unreadable(town), *requests(town, 3)])
    worker = await start(town, tmp_path)
    await town.drained()
    assert (await worker.get("/healthz", key=""))[0] == 200
    assert (await worker.get("/v1/views/usage", key="wrong"))[0] == 401
    assert (await worker.get("/metrics", key=""))[0] == 401
    assert (await worker.get("/v1/views/usage?minutes=0"))[0] == 400
    status, metrics = await worker.get("/metrics")
    assert status == 200
    assert 'klatch_requests_total{tenant="acme",model="m"} 3' in metrics.splitlines()
    assert 'klatch_first_token_seconds_bucket{tenant="zeta",model="m",le="0.1"} 3' in metrics.splitlines()
    assert "klatch_views_skipped_total 9" in metrics.splitlines()

    shown = await asyncio.to_thread(
        CliRunner().invoke,
        top,
        ["--json", "--once", "--tenant", "acme"],
        env={"KLATCH_VIEWS_URL": worker.url, "KLATCH_INTERNAL_KEY": KEY},
    )
    assert shown.exit_code == 0, shown.output
    assert [(row["tenant"], row["requests"]) for row in map(json.loads, shown.output.splitlines())] == [("acme", 3)]
    await worker.kill()


async def test_a_missing_topic_is_named_with_what_makes_it(kafka: Cluster, tmp_path: Path) -> None:
    settings = Settings(kafka=kafka.bootstrap, namespace=f"views-{uuid4().hex[:8]}", data=tmp_path)
    with pytest.raises(UnknownTopic, match="klatch topics create"):
        await run_views(settings, asyncio.Event(), lambda facts: pytest.fail(f"ready: {facts}"))


async def records(town: Town, topic: str, values: Sequence[bytes], *, transactional: bool = False) -> None:
    """Append to partition 0, each in a transaction of its own if `transactional`."""
    name = uuid4().hex if transactional else None
    async with AIOKafkaProducer(bootstrap_servers=town.bootstrap, transactional_id=name) as producer:
        for value in values:
            if transactional:
                async with producer.transaction():
                    await producer.send_and_wait(topic, value, partition=0)
            else:
                await producer.send_and_wait(topic, value, partition=0)


async def places(town: Town, data: Path, topic: str, offsets: Sequence[int]) -> list[bool]:
    """Of records of partition 0 that are delivered with these offsets, which are taken."""
    views = Views(town.bootstrap, town.namespace, dict.fromkeys(SOURCES, Shape(3, 1)), data)
    taken = list[bool]()
    try:
        for offset in offsets:
            progress = await views._next(SimpleNamespace(tp=(topic, 0), offset=offset))
            taken.append(progress is not None)
            if progress:
                progress.take(offset)
    finally:
        await views._offsets.close()
    return taken


async def test_a_record_that_faust_lost_stops_the_process_before_anything_after_it_is_counted(
    town: Town, tmp_path: Path
) -> None:
    topic = town.namespace.of(TRUST_VERDICTS)
    await records(town, topic, [b"0", b"1", b"2", b"3"])
    assert await places(town, tmp_path, topic, [0, 1, 0, 1, 2]) == [True, True, False, False, True]
    for lost in ([1], [0, 2], [0, 1, 3]):
        with pytest.raises(RecordLost, match=f"{lost[-1]} came where"):
            await places(town, tmp_path, topic, lost)


async def test_a_hole_that_the_log_has_itself_is_passed(town: Town, tmp_path: Path) -> None:
    topic = town.namespace.of(TRUST_VERDICTS)
    await records(town, topic, [b"0", b"2", b"4"], transactional=True)
    assert await places(town, tmp_path, topic, [0, 2, 4]) == [True, True, True]
    with pytest.raises(RecordLost, match="4 came where 1 is next"):
        await places(town, tmp_path, topic, [0, 4])

    async with town._admin() as admin:
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=4)})
    assert await places(town, tmp_path, topic, [4]) == [True]


async def test_reading_begins_at_what_the_group_has_committed(town: Town) -> None:
    offsets = Offsets(town.bootstrap, town.namespace.group("views"))
    assert await offsets.committed() == {}
    topic = town.namespace.of(TRUST_VERDICTS)
    await records(town, topic, [b"0", b"1"])
    async with AIOKafkaConsumer(
        bootstrap_servers=town.bootstrap, group_id=town.namespace.group("views"), enable_auto_commit=False
    ) as member:
        member.assign([TopicPartition(topic, 0)])
        await member.commit({TopicPartition(topic, 0): 1})
    assert await offsets.committed() == {(topic, 0): 1}
