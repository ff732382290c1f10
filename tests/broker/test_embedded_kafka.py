# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""Kafka as a child process: it keeps data, says what is wrong, and never outlives us."""

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer  # type: ignore[import-untyped, unused-ignore]
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]

from klatch_workers.kafka import BrokerFailedError, Cluster, DataFolderError, Options
from klatch_workers.kafka.folder import settle_layout

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


async def test_a_cluster_whose_id_begins_with_a_dash_starts(tmp_path: Path) -> None:
    layout = settle_layout(tmp_path, Options())
    record = tmp_path / "cluster.json"
    record.write_text(record.read_text().replace(layout.cluster_id, "-" + layout.cluster_id[1:]))
    async with Cluster(tmp_path) as cluster:
        assert cluster.running


async def test_records_and_ports_outlast_a_restart(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as first:
        bootstrap = first.bootstrap
        topic = await create_topic(bootstrap)
        await produce(bootstrap, topic, b"kept")
    assert not first.running
    async with Cluster(tmp_path) as second:
        assert second.bootstrap == bootstrap
        assert await consume(bootstrap, topic, 1) == [b"kept"]


async def test_records_outlast_a_killed_broker(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        topic = await create_topic(cluster.bootstrap)
        await produce(cluster.bootstrap, topic, b"kept")
        await cluster.nodes[0].kill()
        assert cluster.nodes[0].pid is None
        await cluster.nodes[0].start()
        assert await consume(cluster.bootstrap, topic, 1) == [b"kept"]


async def test_three_nodes_acknowledge_to_all_while_one_is_dead(tmp_path: Path) -> None:
    # Kafka's own 9 s until a dead node is given up are nothing that this test has to wait for.
    sooner = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
    async with Cluster(tmp_path, Options(nodes=3, properties=sooner)) as cluster:
        topic = await create_topic(cluster.bootstrap, replicas=3)
        await produce(cluster.bootstrap, topic, b"before")
        await cluster.nodes[0].kill()
        await produce(cluster.bootstrap, topic, b"while it is dead")
        await cluster.nodes[0].start(members=3)
        await produce(cluster.bootstrap, topic, b"after")
        values = await consume(cluster.bootstrap, topic, 3)
        assert values == [b"before", b"while it is dead", b"after"]


PARENT = """
import asyncio, sys
from pathlib import Path
from klatch_workers.kafka import Cluster

async def main():
    async with Cluster(Path(sys.argv[1])) as cluster:
        print(cluster.nodes[0].pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_broker_ends_with_a_parent_killed_by_sigkill(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(*(sys.executable, "-c", PARENT, str(tmp_path)), stdout=PIPE)
    assert parent.stdout is not None
    broker = int(await parent.stdout.readline())
    found = Cluster.find(tmp_path)
    assert found is not None
    assert found.nodes[0].pid == broker
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(10):
        await found.nodes[0].wait()


async def test_a_data_folder_in_use_is_refused_and_its_broker_left_alone(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        with pytest.raises(DataFolderError, match=f"in use by a broker .pid {cluster.nodes[0].pid}"):
            await Cluster(tmp_path).start()
        with pytest.raises(DataFolderError, match="in use"):
            await cluster.wipe()
        assert cluster.running


async def test_a_data_folder_of_another_size_of_cluster_is_refused(tmp_path: Path) -> None:
    settle_layout(tmp_path, Options(nodes=1))
    with pytest.raises(DataFolderError, match=r"1 node\(s\), 3 asked for"):
        await Cluster(tmp_path, Options(nodes=3)).start()


async def test_a_folder_with_somebody_elses_files_is_neither_used_nor_wiped(tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("dear")
    with pytest.raises(DataFolderError, match="not empty and holds no Kafka"):
        await Cluster(tmp_path).start()
    with pytest.raises(DataFolderError, match="not empty and holds no Kafka"):
        await Cluster(tmp_path).wipe()
    assert letter.read_text() == "dear"


async def test_data_of_another_cluster_put_into_the_folder_is_refused(tmp_path: Path) -> None:
    settle_layout(tmp_path, Options())
    foreign = tmp_path / "node-1" / "data"
    foreign.mkdir(parents=True)
    (foreign / "meta.properties").write_text("version=1\ncluster.id=other\nnode.id=1\n")
    with pytest.raises(DataFolderError, match="node 1 of cluster other"):
        await Cluster(tmp_path).start()


async def test_a_port_in_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        cluster = Cluster(tmp_path, Options(port=port))
        with pytest.raises(BrokerFailedError, match=f"port {port} .*choose another one") as raised:
            await cluster.start()
    assert str(cluster.nodes[0].log) in str(raised.value)
    assert not cluster.running


async def test_a_wrong_property_is_reported_with_the_brokers_own_words(tmp_path: Path) -> None:
    options = Options(properties={"num.io.threads": "many"})
    with pytest.raises(BrokerFailedError, match=r"A property is wrong(.|\n)*num\.io\.threads"):
        await Cluster(tmp_path, options).start()


async def test_a_cluster_that_loses_a_node_says_so(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        failure = asyncio.create_task(cluster.failed())
        cluster.nodes[0].signal(signal.SIGKILL)
        assert "node 1" in str(await failure)


async def klatch_kafka(*argv: str) -> tuple[int | None, dict[str, Any]]:
    """Run the command as a script does: exit code, and the one JSON object."""
    code = "from klatch_workers.cli.kafka import kafka; kafka()"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *argv, stdout=PIPE)
    out, _ = await process.communicate()
    return process.returncode, json.loads(out)


async def test_a_detached_cluster_is_started_found_stopped_and_wiped(tmp_path: Path) -> None:
    data = tmp_path / "kafka"
    where = ("--data", str(data), "--json")
    assert await klatch_kafka("status", *where) == (3, {"running": False, "nodes": []})
    code, started = await klatch_kafka("start", *where)
    try:
        assert (code, started.get("already")) == (0, False), started
        topic = await create_topic(started["bootstrap"])
        await produce(started["bootstrap"], topic, b"one")
        assert (await klatch_kafka("start", *where))[1]["nodes"] == started["nodes"]
        assert (await klatch_kafka("status", *where))[0] == 0
        assert (await klatch_kafka("wipe", "--yes", *where))[1]["error"] == "DataFolderError"
    finally:
        assert await klatch_kafka("stop", *where) == (0, {"stopped": True})
    assert (await klatch_kafka("status", *where))[0] == 3
    assert await klatch_kafka("wipe", "--yes", *where) == (0, {"wiped": True})
    assert not data.exists()


async def test_stop_leaves_a_stranger_with_a_recorded_pid_alone(tmp_path: Path) -> None:
    settle_layout(tmp_path, Options())
    (tmp_path / "node-1").mkdir()
    (tmp_path / "node-1" / "kafka.pid").write_text(str(os.getpid()))
    where = ("--data", str(tmp_path), "--json")
    assert await klatch_kafka("stop", *where) == (0, {"stopped": False})
