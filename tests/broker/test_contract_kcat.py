# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""The examples of docs/contract.md, run as they stand there on a real Kafka.

klatch itself is not running: where an example asks, the test answers, record by record, so that it decides what a
reader has to cope with.
"""

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas import codec
from klatch_schemas.client import Client, Stream
from klatch_schemas.documents import examples
from klatch_schemas.errors import Cancelled, Superseded
from klatch_schemas.events import ChatRequested, Event, StreamAttempt, StreamCancel, StreamEnd
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Draft, Partition, Record, partition_of
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, Namespace, Topic
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker

PARTITIONS: Mapping[str, int] = {CHAT_REQUESTS.name: 4, CHAT_STREAM.name: 8}


@dataclass(frozen=True)
class Place:
    """A namespace of Kafka, as the examples and the test see it."""

    bootstrap: str
    name: str
    log: KafkaLog

    @property
    def environment(self) -> dict[str, str]:
        """What the examples read."""
        return {**os.environ, "KLATCH_KAFKA": self.bootstrap, "KLATCH_NAMESPACE": self.name}

    def full(self, topic: Topic) -> str:
        return Namespace.named(self.name).of(topic)

    def client(self) -> Client:
        return Client(self.bootstrap, tenant="acme", namespace=self.name)

    async def first(self, topic: Topic, count: int) -> list[Record]:
        """The first `count` records of the topic, on whatever partitions they come; waits for them."""
        tail, found = await self.log.tail(), list[Record]()
        for number in range(PARTITIONS[topic.name]):
            tail.follow(Partition(self.full(topic), number), 0)
        async with asyncio.timeout(60):
            while len(found) < count:
                found += await tail.read(1_000)
        await tail.close()
        return found

    async def say(self, conversation: str, *said: Event | Draft) -> list[int]:
        """Write records of a stream, as generation would; returns their offsets."""
        topic = self.full(CHAT_STREAM)
        drafts = [one if isinstance(one, Draft) else codec.draft(topic, conversation, one) for one in said]
        return [offset for _, offset in await self.log.append(drafts)]

    def delta(self, asked: ChatRequested, attempt: int, writer: str, seq: int, text: str) -> Draft:
        chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
        value = codec.encode_delta(codec.delta_prefix(asked.request, attempt, writer), seq, chunk)
        return codec.delta_draft(self.full(CHAT_STREAM), asked.conversation.encode(), None, value)


@pytest_asyncio.fixture
async def place(kafka: Cluster) -> AsyncIterator[Place]:
    name = f"contract-{uuid4().hex[:8]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    of = Namespace.named(name).of
    topics = [
        NewTopic(of(topic), PARTITIONS[topic.name], 1, topic_configs=topic.config)
        for topic in (CHAT_REQUESTS, CHAT_STREAM)
    ]
    await admin.create_topics(topics)
    await admin.close()
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    yield Place(kafka.bootstrap, name, log)
    await log.close()


@pytest.fixture
def kcat() -> str:
    """The program; without it these tests are skipped, except in CI, where `.ci/run` installs it."""
    found = shutil.which("kcat")
    if found is None and os.environ.get("CI") != "true":
        pytest.skip("kcat is not installed: apt-get install kafkacat")
    assert found, "CI must have kcat: .ci/run installs the package kafkacat"
    return found


async def run(example: str, place: Place) -> str:
    """Run a shell example of the contract; returns what it printed."""
    shell = await asyncio.create_subprocess_exec(
        "bash", "-euo", "pipefail", "-c", example, env=place.environment, stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(60):
        out, err = await shell.communicate()
    assert shell.returncode == 0, err.decode()
    return out.decode()


def opening(asked: ChatRequested, attempt: int, writer: str) -> StreamAttempt:
    return StreamAttempt(
        request=asked.request,
        tenant=asked.tenant,
        conversation=asked.conversation,
        attempt=attempt,
        writer=Writer(writer),
    )


def ending(asked: ChatRequested, attempt: int, writer: str, seq: int) -> StreamEnd:
    return StreamEnd(
        request=asked.request,
        tenant=asked.tenant,
        conversation=asked.conversation,
        attempt=attempt,
        writer=Writer(writer),
        seq=seq,
        status="completed",
    )


# --- kcat --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kcat")
async def test_a_request_published_with_kcat_is_read_by_klatch_from_the_partition_of_its_key(place: Place) -> None:
    await run(examples()["publish"], place)
    [record] = await place.first(CHAT_REQUESTS, 1)
    asked = codec.decode_as(ChatRequested, record.value)
    assert asked.body["messages"] == [{"role": "user", "content": "Grüße an alle!"}]
    assert record.key == asked.tenant.encode()
    assert record.partition.number == partition_of(asked.tenant.encode(), PARTITIONS[CHAT_REQUESTS.name])


async def test_the_partitioner_that_the_contract_names_agrees_with_ours_on_every_key(place: Place, kcat: str) -> None:
    keys = [*(f"conversation-{number}" for number in range(60)), "Grüße", "会話", "a", "ab", "abc", str(uuid4())]
    lines = "".join(f"{key}\t{{}}\n" for key in keys)
    # The options are the example's own: a wrong partitioner there is found here.
    options = examples()["publish"].split("\n")[1].split("-k ")[0]
    await run(
        f"""{kcat} -P -b "$KLATCH_KAFKA" -t {place.full(CHAT_STREAM)} -K '\t' {options} <<'EOF'\n{lines}EOF""", place
    )
    records = await place.first(CHAT_STREAM, len(keys))
    assert {(record.key or b"").decode(): record.partition.number for record in records} == {
        key: partition_of(key.encode(), PARTITIONS[CHAT_STREAM.name]) for key in keys
    }


@pytest.mark.usefixtures("kcat")
async def test_a_cancel_written_with_kcat_ends_the_stream_for_its_readers(place: Place) -> None:
    async with place.client() as client:
        stream = await client.publish(
            client.request({"model": "default", "messages": []}, request="r-1", conversation="c-1")
        )
        await run(examples()["cancel"], place)
        [record] = await place.first(CHAT_STREAM, 1)
        assert codec.decode_as(StreamCancel, record.value).by == "me"
        with pytest.raises(Cancelled):
            _ = [shown async for shown in client.read(stream)]


@pytest.mark.usefixtures("kcat")
async def test_kcat_shows_a_stream_in_plain_text(place: Place) -> None:
    asked = request_of("c-9")
    offsets = await place.say(
        "c-9", opening(asked, 1, "a"), place.delta(asked, 1, "a", 0, "Hello"), ending(asked, 1, "a", 1)
    )
    number = partition_of(b"c-9", PARTITIONS[CHAT_STREAM.name])
    lines = (await run(examples()["watch"], place)).splitlines()
    assert [line.split(" ", 3)[:3] for line in lines] == [[str(number), str(offset), "c-9"] for offset in offsets]
    assert '"content":"Hello"' in lines[1]


# --- Python ------------------------------------------------------------------------------------------------------


async def test_the_python_example_prints_a_reply_while_it_is_written(place: Place) -> None:
    example = await asyncio.create_subprocess_exec(
        sys.executable, "-c", examples()["ask"], env=place.environment, stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(60):
            await answer_and_watch(example, place)
    finally:
        if example.returncode is None:
            example.kill()
            await example.wait()


async def answer_and_watch(example: Process, place: Place) -> None:
    [record] = await place.first(CHAT_REQUESTS, 1)
    asked = codec.decode_as(ChatRequested, record.value)
    assert example.stdout
    await place.say("c-2", opening(asked, 1, "a"), place.delta(asked, 1, "a", 0, "Good "))
    assert await example.stdout.readexactly(5) == b"Good "
    await place.say("c-2", place.delta(asked, 1, "a", 1, "day."), ending(asked, 1, "a", 2))
    out, err = await example.communicate()
    assert (out, err, example.returncode) == (b"day.", b"", 0)


async def test_a_reader_that_resumes_at_any_offset_reads_the_rest_or_is_told_that_it_was_superseded(
    place: Place,
) -> None:
    scope: dict[str, Any] = {}
    exec(examples()["resume"], scope)  # noqa: S102 - the example is ours, and is what is tested
    rest: Callable[[Client, Stream, int | None], Awaitable[str]] = scope["rest"]
    async with place.client() as client:
        asked = client.request({"model": "default", "messages": []}, conversation="c-3")
        stream = await client.publish(asked)
        void, texts = await write_a_stream_with_everything(place, asked)
        assert await rest(client, stream, None) == "".join(texts.values())
        for offset in texts:
            after = "".join(text for at, text in texts.items() if at > offset)
            assert await rest(client, stream, offset) == after
        for offset in void:
            with pytest.raises(Superseded):
                await rest(client, stream, offset)


async def write_a_stream_with_everything(place: Place, asked: ChatRequested) -> tuple[list[int], dict[int, str]]:
    """A superseded attempt, a zombie, a duplicate, another's stream; the void offsets and the texts that stand."""
    other = request_of("c-3")

    def one(seq: int, text: str) -> Draft:
        return place.delta(asked, 1, "a", seq, text)

    def two(seq: int, text: str) -> Draft:
        return place.delta(asked, 2, "b", seq, text)

    offsets = await place.say(
        "c-3",
        opening(asked, 1, "a"),
        one(0, "void"),
        opening(other, 1, "z"),
        one(1, "void"),
        opening(asked, 2, "b"),
        one(2, "zombie"),
        two(0, "Hel"),
        place.delta(other, 1, "z", 0, "another's"),
        two(0, "Hel"),
        two(1, "lo, "),
        two(2, "world"),
        ending(other, 1, "z", 1),
        ending(asked, 1, "a", 3),
        ending(asked, 2, "b", 3),
    )
    return [offsets[1], offsets[3]], {offsets[6]: "Hel", offsets[9]: "lo, ", offsets[10]: "world"}


def request_of(conversation: str) -> ChatRequested:
    return ChatRequested(
        request=RequestId(str(uuid4())),
        tenant=Tenant("acme"),
        conversation=Conversation(conversation),
        body={"messages": []},
    )
