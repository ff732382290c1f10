# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""Topics are created from the table, and what differs from it is found and explained."""

import asyncio
import json
from dataclasses import replace
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]
from click.testing import CliRunner

from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, PROMPTS, TOPICS, Namespace
from klatch_streams.topic_admin import Described, Partitions, check, check_topics, create_topics, describe_topics
from klatch_workers.cli.topics import topics
from klatch_workers.kafka import Cluster

AS_IT_SHOULD_BE = [Described(topic, topic.name, Partitions().of(topic), 1, topic.config) for topic in TOPICS]


def with_change(name: str, **changes: object) -> list[Described]:
    return [replace(found, **changes) if found.name == name else found for found in AS_IT_SHOULD_BE]  # type: ignore[arg-type]


def test_topics_as_the_table_has_them_are_in_order() -> None:
    assert check(AS_IT_SHOULD_BE, "b:1") == []
    assert check(AS_IT_SHOULD_BE, "b:1", Partitions()) == []


def test_a_missing_topic_is_named_with_the_command_that_makes_it() -> None:
    (problem,) = check(with_change(CHAT_STREAM.name, partitions=None, config={}), "b:1")
    assert (problem.topic, problem.what) == ("chat.stream", "missing")
    assert "klatch topics create" in problem.says


def test_a_topic_that_is_not_co_partitioned_with_its_fellows_is_found_without_being_told_a_count() -> None:
    (problem,) = check(with_change(CHAT_STREAM.name, partitions=4), "b:1")
    assert (problem.topic, problem.what) == ("chat.stream", "partitions")
    assert "has 4 partitions" in problem.says
    assert "--partitions 8" in problem.says


def test_every_topic_with_another_count_than_asked_for_is_found() -> None:
    problems = check(AS_IT_SHOULD_BE, "b:1", Partitions(conversation=16, tenant=8))
    assert {problem.topic for problem in problems} == {
        topic.name for topic in TOPICS if topic.partitioning == "conversation"
    }


def test_a_ledger_has_one_partition() -> None:
    (problem,) = check(with_change(PROMPTS.name, partitions=8), "b:1")
    assert (problem.topic, problem.what) == ("prompts", "partitions")


@pytest.mark.parametrize(
    ("key", "value"),
    [("cleanup.policy", "compact"), ("message.timestamp.type", "CreateTime"), ("retention.ms", "1000")],
)
def test_a_wrong_configuration_comes_with_the_command_that_mends_it(key: str, value: str) -> None:
    wrong = {**CHAT_REQUESTS.config, key: value}
    (problem,) = check(with_change(CHAT_REQUESTS.name, config=wrong), "b:1")
    assert (problem.topic, problem.what) == ("chat.requests", key)
    wanted = CHAT_REQUESTS.config[key]
    command = f"kafka-configs.sh --bootstrap-server b:1 --alter --topic chat.requests --add-config {key}={wanted}"
    assert command in problem.says


@pytest.mark.parametrize("kept", ["-1", str(30 * 86_400_000)])
def test_keeping_records_longer_is_no_problem(kept: str) -> None:
    longer = {**CHAT_REQUESTS.config, "retention.ms": kept}
    assert check(with_change(CHAT_REQUESTS.name, config=longer), "b:1") == []


@pytest.mark.broker
async def test_creating_twice_makes_every_topic_once_as_the_table_has_it(kafka: Cluster) -> None:
    namespace = Namespace.named(f"n{uuid4().hex}")
    assert {problem.what for problem in await check_topics(kafka.bootstrap, namespace)} == {"missing"}
    made = await create_topics(kafka.bootstrap, namespace, Partitions(conversation=3, tenant=2))
    assert made == [namespace.of(topic) for topic in TOPICS]
    assert await create_topics(kafka.bootstrap, namespace, Partitions(conversation=3, tenant=2)) == []
    described = {str(found.topic.name): found.partitions for found in await describe_topics(kafka.bootstrap, namespace)}
    assert (described["chat.stream"], described["chat.requests"], described["prompts"]) == (3, 2, 1)
    assert await check_topics(kafka.bootstrap, namespace) == []
    assert await check_topics(kafka.bootstrap, namespace, Partitions(conversation=3, tenant=2)) == []


@pytest.mark.broker
async def test_the_command_line_creates_describes_and_checks(kafka: Cluster) -> None:
    namespace = f"n{uuid4().hex}"
    where = ["--kafka", kafka.bootstrap, "--namespace", namespace, "--json"]

    async def klatch(*args: str) -> tuple[int, dict[str, object]]:
        done = await asyncio.to_thread(CliRunner().invoke, topics, [*args, *where])
        return done.exit_code, json.loads(done.output)

    assert (await klatch("check"))[0] == 1
    code, said = await klatch("create", "--partitions", "2")
    assert (code, said["problems"]) == (0, [])
    assert (await klatch("create", "--partitions", "2"))[1]["created"] == []
    assert (await klatch("check")) == (0, {"ok": True, "problems": []})
    assert (await klatch("check", "--partitions", "4"))[0] == 1
    code, said = await klatch("describe")
    assert code == 0
    assert isinstance(said["topics"], list)
    assert len(said["topics"]) == len(TOPICS)


@pytest.mark.broker
async def test_a_topic_that_was_there_with_another_count_is_left_alone_and_reported(kafka: Cluster) -> None:
    namespace = Namespace.named(f"n{uuid4().hex}")
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(namespace.of(CHAT_STREAM), 5, 1)])
    await admin.close()
    made = await create_topics(kafka.bootstrap, namespace)
    assert namespace.of(CHAT_STREAM) not in made
    problems = await check_topics(kafka.bootstrap, namespace)
    assert {(problem.topic, problem.what) for problem in problems} >= {(namespace.of(CHAT_STREAM), "partitions")}


def test_a_cluster_that_is_not_there_is_exit_code_three_and_named() -> None:
    done = CliRunner().invoke(topics, ["check", "--kafka", "127.0.0.1:1"])
    assert done.exit_code == 3
    assert "127.0.0.1:1" in done.output


@pytest.mark.parametrize("command", ["create", "check"])
def test_more_partitions_than_a_door_can_name_are_refused_with_the_reason(command: str) -> None:
    asked = (command, "--kafka", "127.0.0.1:1", "--partitions")
    refused = CliRunner().invoke(topics, [*asked, "4096"])
    assert refused.exit_code == 2
    assert "no door serves more than 4,095 partitions: a request's id names its own" in " ".join(refused.output.split())
    assert CliRunner().invoke(topics, [*asked, "4095"]).exit_code == 3


def test_a_misspelt_option_is_exit_code_two() -> None:
    assert CliRunner().invoke(topics, ["create", "--partitions", "none"]).exit_code == 2
