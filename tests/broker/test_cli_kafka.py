"""The client commands on a real Kafka: what one of them writes, the others show."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from klatch_agents.testing.upstream import Upstream
from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, StreamAttempt, StreamCancel, StreamEnd, Usage
from klatch_schemas.ids import Writer
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, DEAD_LETTERS, Namespace, Topic
from klatch_streams.dead_letters import DeadLetter, dead_letter
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.doctor.group_facts import clock_skew_ms, cluster_admin
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Town:
    """A namespace of Kafka with klatch's topics, and `klatch` beside it."""

    bootstrap: str
    name: str
    log: KafkaLog
    data: Path

    def full(self, topic: Topic) -> str:
        return Namespace.named(self.name).of(topic)

    async def start(self, *arguments: str) -> Process:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("KLATCH_")}
        ours |= {
            "KLATCH_KAFKA": self.bootstrap,
            "KLATCH_NAMESPACE": self.name,
            "KLATCH_DATA": str(self.data),
            "KLATCH_TENANT": "acme",
        }
        main = "from klatch_workers.cli import main; main(prog_name='klatch')"
        command = (sys.executable, "-c", main, *arguments)
        return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=ours)

    async def run(self, *arguments: str, stdin: str = "") -> Said:
        process = await self.start(*arguments)
        async with asyncio.timeout(120):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Said(process.returncode, out.decode(), err.decode())

    async def records(self, topic: Topic) -> AsyncIterator[Record]:
        """The records of a topic, as they come."""
        tail = await self.log.tail()
        for number in range(await self.log.partitions(self.full(topic))):
            tail.follow(Partition(self.full(topic), number), 0)
        try:
            while True:
                for record in await tail.read(1_000):
                    yield record
        finally:
            await tail.close()

    async def first(self, topic: Topic, count: int) -> list[Any]:
        """The first events of a topic, whoever writes them when."""
        found = list[Any]()
        async with asyncio.timeout(60):
            records = self.records(topic)
            async for record in records:
                found.append(codec.decode(record.value))
                if len(found) == count:
                    break
            await records.aclose()  # type: ignore[attr-defined]
        return found

    async def answer(self, asked: ChatRequested, text: str, status: str = "completed") -> None:
        """Write the stream of a request as generation does."""
        topic, key = self.full(CHAT_STREAM), asked.conversation
        names: dict[str, Any] = {"request": asked.request, "tenant": asked.tenant, "conversation": key, "attempt": 1}
        opening = StreamAttempt(**names, writer=Writer("w"))
        chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
        value = codec.encode_delta(codec.delta_prefix(asked.request, 1, "w"), 0, chunk)
        end = StreamEnd.model_validate(
            {**names, "writer": "w", "seq": 1, "status": status, "usage": Usage(completion_tokens=1)}
        )
        await self.log.append([codec.draft(topic, key, opening)])
        await self.log.append([codec.delta_draft(topic, key.encode(), None, value)])
        await self.log.append([codec.draft(topic, key, end)])

    @asynccontextmanager
    async def answering(self, reply: Callable[[ChatRequested], Awaitable[None]]) -> AsyncGenerator[None]:
        """Answer every request once."""

        async def work() -> None:
            async for record in self.records(CHAT_REQUESTS):
                said = codec.decode(record.value)
                if isinstance(said, ChatRequested):
                    await reply(said)

        working = asyncio.create_task(work())
        try:
            yield
        finally:
            working.cancel()
            await asyncio.wait([working])


@pytest_asyncio.fixture
async def town(kafka: Cluster, tmp_path: Path) -> AsyncGenerator[Town]:
    name = f"cli-{uuid4().hex[:8]}"
    await create_topics(kafka.bootstrap, Namespace.named(name), Partitions(3, 2))
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    yield Town(kafka.bootstrap, name, log, tmp_path)
    await log.close()


def lines(count: int) -> str:
    said = (
        {"messages": [{"role": "user", "content": f"{n}"}], "request": f"r{n}", "conversation": f"c{n % 7}"}
        for n in range(count)
    )
    return "".join(json.dumps(one) + "\n" for one in said)


async def test_what_is_published_stands_where_it_is_said_to(town: Town) -> None:
    said = await town.run("publish", "--json", stdin=lines(500) + "{}\n")
    assert said.code == 1, "one line was no request"
    assert "line 501: messages" in said.err
    assert [one["request"] for one in said.objects] == [f"r{n}" for n in range(500)]
    stands = dict[str, tuple[int, int, str]]()
    async with asyncio.timeout(60):
        async for record in town.records(CHAT_REQUESTS):
            event = codec.decode_as(ChatRequested, record.value)
            stands[event.request] = (record.partition.number, record.offset, event.conversation)
            if len(stands) == 500:
                break
    assert stands == {one["request"]: (one["partition"], one["offset"], one["conversation"]) for one in said.objects}
    offsets = [one["offset"] for one in said.objects]
    assert offsets == sorted(offsets), "a tenant's requests stand in the order of their lines"


async def test_publish_waits_for_the_replies(town: Town) -> None:
    async def reply(asked: ChatRequested) -> None:
        await town.answer(asked, f"answer {asked.request}", "failed" if asked.request == "r3" else "completed")

    async with town.answering(reply):
        said = await town.run("publish", "--json", "--wait", "--patience", "60", stdin=lines(5))
    ends = {one["request"]: (one["status"], one["text"]) for one in said.objects if "status" in one}
    assert ends == {f"r{n}": ("failed" if n == 3 else "completed", f"answer r{n}") for n in range(5)}
    assert said.code == 1, "one reply was not completed"


async def test_tail_shows_a_request_from_its_beginning_and_ends_with_it(town: Town) -> None:
    await town.run("publish", stdin=lines(2))
    asked = await town.first(CHAT_REQUESTS, 2)
    for one, status in zip(asked, ("completed", "failed"), strict=True):
        await town.answer(one, f"answer {one.request}", status)
    said = await town.run("tail", "--request", "r0")
    assert (said.code, said.out) == (0, "── r0  c0\nanswer r0\n── completed, 1 tokens\n")
    failed = await town.run("tail", "--request", "r1", "--json")
    assert failed.code == 1
    assert [one["kind"] for one in failed.objects] == ["stream.attempt.v1", "stream.delta.v1", "stream.end.v1"]


async def test_tail_shows_all_from_then_on_until_ctrl_c(town: Town) -> None:
    await town.run("publish", stdin=lines(2))
    early, late = await town.first(CHAT_REQUESTS, 2)
    await town.answer(early, "early")
    process = await town.start("tail", "--from", "end", "--json")
    assert process.stdout
    reading = asyncio.create_task(process.stdout.readline())
    async with asyncio.timeout(60):
        number = 0
        while not reading.done():  # it may not have begun to follow: what came before is not shown
            number += 1
            await town.answer(late.model_copy(update={"request": f"late-{number}"}), "late")
            await asyncio.wait([reading], timeout=0.5)
    first = json.loads(await reading)
    assert first["request"].startswith("late-")
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_tail_of_a_conversation_begins_where_it_is_told(town: Town) -> None:
    await town.run("publish", stdin=lines(2))
    for one in await town.first(CHAT_REQUESTS, 2):
        await town.answer(one, f"answer {one.request}")
    process = await town.start("tail", "--conversation", "c1", "--from", "-10m", "--raw")
    assert process.stdout
    async with asyncio.timeout(60):
        records = [codec.decode((await process.stdout.readline()).strip()) for _ in range(3)]
    assert [getattr(one, "request", "") for one in records] == ["r1"] * 3
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.wait(), 60)


async def test_cancel_over_kafka_stands_in_the_partition_of_the_conversation(town: Town) -> None:
    said = await town.run("cancel", "r1", "--conversation", "c1", "--reason", "enough", "--json")
    assert said.objects == [{"request": "r1", "cancel": "asked", "over": "kafka"}]
    [cancel] = await town.first(CHAT_STREAM, 1)
    assert isinstance(cancel, StreamCancel)
    assert (cancel.request, cancel.tenant, cancel.conversation, cancel.reason) == ("r1", "acme", "c1", "enough")
    shown = await town.run("tail", "--request", "r1")
    assert (shown.code, shown.out) == (1, "── r1  c1\n── cancelled\n")


async def test_without_a_conversation_cancel_over_kafka_is_misuse(town: Town) -> None:
    said = await town.run("cancel", "r1")
    assert said.code == 2
    assert "--conversation" in said.err


async def test_prompts_are_published_under_growing_versions_that_never_change(town: Town) -> None:
    said = [await town.run("prompts", "publish", "-", "--name", "hello", "--json", stdin=f"v{n}") for n in (1, 2)]
    assert [one.objects[0]["version"] for one in said] == [1, 2]
    again = await town.run("prompts", "publish", "-", "--name", "hello", "--version", "2", stdin="v2")
    assert again.code == 0, "what stands already may be published again"
    other = await town.run("prompts", "publish", "-", "--name", "hello", "--version", "2", stdin="v2, mended")
    assert other.code == 1
    assert "versions never change" in other.err
    own = await town.run("prompts", "publish", "-", "--name", "hello", "--tenant", "acme", stdin="acme's\n")
    assert own.code == 0
    listed = await town.run("prompts", "list", "--json")
    assert [(one["tenant"], one["version"], one["in_force"]) for one in listed.objects] == [
        (None, 1, False),
        (None, 2, True),
        ("acme", 1, True),
    ]
    assert (await town.run("prompts", "show", "hello")).out == "v2\n"
    assert (await town.run("prompts", "show", "hello", "--version", "1")).out == "v1\n"
    assert (await town.run("prompts", "show", "hello", "--tenant", "acme")).out == "acme's\n"
    assert (await town.run("prompts", "show", "nothing")).code == 1


async def test_routes_of_models_are_applied_from_a_file_listed_tried_and_removed(town: Town) -> None:
    file = town.data / "models.toml"
    async with Upstream() as upstream:
        file.write_text(
            f"""
            [deployments.own]
            kind = "vllm"
            url = "{upstream.url}"
            model = "fake?tokens=3"
            [deployments.gone]
            url = "http://127.0.0.1:9/v1"
            [routes.m]
            to = ["own", {{ deployment = "gone", tier = 1 }}]
            """
        )
        applied = await town.run("models", "apply", str(file), "--by", "ops", "--json")
        assert applied.objects == [{"routes": 1, "changed": ["m"], "removed": []}]
        single = await town.run(
            "models", "set", "other/name", "--url", upstream.url, "--model", "fake?tokens=2", "--json"
        )
        assert single.objects == [{"alias": "other/name", "changed": True}]
        kept = await town.run("models", "set", "m", "--name", "own", "--concurrency", "4", "--json")
        assert kept.objects == [{"alias": "m", "changed": True}]
        listed = await town.run("models", "list", "--json")
        assert listed.objects[0]["deployments"][0]["concurrency"] == 4
        assert [(one["alias"], [to["name"] for to in one["deployments"]]) for one in listed.objects] == [
            ("m", ["own", "gone"]),
            ("other/name", ["other-name"]),
        ]
        tried = await town.run("models", "test", "m", "--json")
    assert tried.code == 1, "one of them is not there"
    assert {one["deployment"]: one["ok"] for one in tried.objects} == {"own": True, "gone": False}
    assert next(one for one in tried.objects if one["ok"])["text"] == "The quick brown "
    assert (await town.run("models", "remove", "other/name")).code == 0
    assert (await town.run("models", "remove", "other/name")).code == 1
    assert (await town.run("models", "set", "m", "--name", "own", "--url", "nowhere")).code == 2
    assert (await town.run("models", "set", "m", "--url", "http://127.0.0.1:9/v1")).code == 2, "which of the two?"


async def test_quotas_are_set_shown_and_remembered(town: Town) -> None:
    (town.data / "tenants.toml").write_text('[tenants.acme]\nkeys = ["klatch-0123456789"]\n')
    assert (await town.run("tenants", "apply", str(town.data / "tenants.toml"))).code == 0
    nobody = await town.run("quota", "set", "acne", "--weight", "2")
    assert (nobody.code, "it holds acme" in nobody.err) == (2, True)
    set_ = ("quota", "set", "acme", "--by", "ann", "--json")
    assert (await town.run(*set_, "--tokens-per-day", "5000", "--cost-per-month", "12.5")).code == 0
    [said] = (await town.run(*set_, "--person", "*", "--tokens-per-day", "900")).objects
    assert said["limits"] == {"tokens_per_day": 5_000, "cost_micros_per_month": 12_500_000}
    assert said["rules"] == [{"person": "*", "limits": {"tokens_per_day": 900}}]
    asked = '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "person": "bob"}\n'
    assert (await town.run("publish", stdin=asked)).code == 0
    [shown] = (await town.run("quota", "show", "acme", "--json")).objects
    used = {(one["scope"].get("person"), one["limit"]): one["used"] for one in shown["limits"]}
    assert used[None, "tokens_per_day"] == used["bob", "tokens_per_day"] > 100
    changes = [(one["by"], one["changes"]) for one in (await town.run("quota", "history", "acme", "--json")).objects]
    assert changes[-2:] == [
        ("ann", ["tokens_per_day: none -> 5000", "cost_micros_per_month: none -> 12500000"]),
        ("ann", ["person=* tokens_per_day: none -> 900"]),
    ]
    plain = (await town.run("quota", "show", "acme")).out
    assert "tokens per day: 900" in plain


async def test_a_template_that_does_not_compile_is_refused_before_it_is_published(town: Town) -> None:
    said = await town.run("prompts", "publish", "-", "--name", "hello", stdin="Hello {{ name")
    assert said.code == 1
    assert "line 1" in said.err
    assert (await town.run("prompts", "list", "--json")).out == ""


async def test_the_doctor_finds_what_is_wrong_on_kafka(town: Town) -> None:
    before = await town.run("publish", stdin=lines(3))
    assert before.code == 0
    record = Record(Partition("chat.requests", 0), 7, 1, b"k", b"bad")
    letter: Draft = dead_letter(record, Namespace.named(town.name), "admission", DeadLetter("unreadable", "no JSON"))
    await town.log.append([letter])
    said = await town.run("doctor", "--json", "--http", "127.0.0.1:1")
    assert said.code == 1
    found = {one["check"]: one for one in said.objects}
    assert found["kafka"]["level"] == found["topics"]["level"] == found["clock"]["level"] == "ok"
    assert found["admission"]["level"] == "problem"
    assert "3 records wait for one" in found["admission"]["says"]
    assert found["memory"]["level"] == "warning"
    assert "admission could not use a record (unreadable)" in found["dead letters"]["says"]
    assert town.full(DEAD_LETTERS) in found["dead letters"]["fix"]
    assert found["door"]["level"] == "problem"
    assert all(one["fix"] for one in said.objects if one["level"] != "ok")


async def test_the_doctor_sees_the_clock_of_the_cluster(kafka: Cluster) -> None:
    async with cluster_admin(KafkaOptions(kafka.bootstrap)) as admin:
        skew = await clock_skew_ms(admin)
    assert skew is not None
    ahead_ms, wrong_ms = skew
    assert abs(ahead_ms) <= wrong_ms + 50, "one machine has one clock"


async def test_the_doctor_says_that_topics_are_missing(town: Town) -> None:
    said = await town.run("doctor", "--json", "--namespace", "nobody")
    found = {one["check"]: one for one in said.objects}
    assert "klatch topics create" in found["topics"]["fix"]
    assert "admission" not in found


async def test_the_doctor_counts_workers_and_what_waits_for_them(town: Town) -> None:
    assert (await town.run("publish", stdin=lines(3))).code == 0
    group = Namespace.named(town.name).group("admission")
    member = await town.log.join(group, town.full(CHAT_REQUESTS), Nobody())
    async with asyncio.timeout(60):
        while not (read := await member.read(1_000)):
            pass
        # The last record is left for later.
        places = {place: records[-1].offset for place, records in read.items()}
        await member.commit(places)
        said = await town.run("doctor", "--json")
    await member.close()
    found = {one["check"]: one for one in said.objects}
    assert (found["admission"]["level"], found["admission"]["says"]) == ("ok", "1 admission worker, 1 records behind")


class Nobody:
    """A listener that has nothing to restore."""

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        """See `Listener`."""

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        """See `Listener`."""
