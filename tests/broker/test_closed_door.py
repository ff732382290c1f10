"""A door that is started while Kafka is away: it listens, says so, and opens when Kafka is there."""

import asyncio
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from klatch_schemas.topics import Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.kafka import Cluster
from klatch_workers.settings import Settings
from klatch_workers.up.everything import free_address
from klatch_workers.wiring import run_stage

pytestmark = pytest.mark.broker


class Way:
    """The way to a broker, which is closed until `open`: a relay of bytes at an address of its own."""

    def __init__(self, address: str, broker: str) -> None:
        self._address, self._broker = address, broker
        self._server: asyncio.Server | None = None
        self._relays = set[asyncio.Task[None]]()

    async def open(self) -> None:
        host, _, port = self._address.partition(":")
        self._server = await asyncio.start_server(self._relay, host, int(port))

    async def close(self) -> None:
        if self._server:
            self._server.close()
        for relay in self._relays:
            relay.cancel()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._broker.partition(":")
        there, back = await asyncio.open_connection(host, int(port))
        for source, target in ((reader, back), (there, writer)):
            relay = asyncio.create_task(_pass_on(source, target))
            self._relays.add(relay)
            relay.add_done_callback(self._relays.discard)


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while some := await source.read(65_536):
            target.write(some)
    finally:
        target.close()


async def told(session: aiohttp.ClientSession, method: str, path: str) -> tuple[int, str | None, str]:
    async with session.request(method, path, json={"model": "m", "messages": []}) as answer:
        return answer.status, answer.headers.get("retry-after"), await answer.text()


async def test_a_door_that_starts_before_kafka_answers_503_and_opens_when_kafka_is_there(
    kafka: Cluster, tmp_path: Path
) -> None:
    name, bootstrap, http = f"closed-{uuid4().hex[:8]}", free_address(), free_address()
    await create_topics(KafkaOptions(kafka.bootstrap), Namespace.named(name), Partitions(1, 1))
    way = Way(bootstrap, kafka.bootstrap.split(",")[0])
    settings = Settings(kafka=bootstrap, namespace=name, http=http, data=tmp_path, model_url="http://127.0.0.1:9/v1")
    stop, ready, began = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def begin() -> Settings:
        began.set()
        return settings

    door = asyncio.create_task(run_stage("http", begin, stop, lambda _facts: ready.set()))
    async with aiohttp.ClientSession(f"http://{http}") as session:
        await began.wait()
        while True:
            try:
                status, retry_after, text = await told(session, "POST", "/v1/chat/completions")
                break
            except aiohttp.ClientConnectionError:
                assert not door.done(), door.result()
        assert (status, retry_after) == (503, "1")
        assert '"code":"unavailable"' in text
        assert (await told(session, "GET", "/readyz"))[0] == 503
        assert (await told(session, "GET", "/healthz"))[0] == 200
        await way.open()
        try:
            async with asyncio.timeout(60):
                await ready.wait()
            # It has no tenants: whoever asks now is asked for a key.
            assert (await told(session, "POST", "/v1/chat/completions"))[0] == 401
            assert (await told(session, "GET", "/readyz"))[0] == 200
        finally:
            stop.set()
            await door
            await way.close()


async def test_a_door_that_waits_for_kafka_ends_when_it_is_told(tmp_path: Path) -> None:
    http = free_address()
    settings = Settings(kafka=free_address(), namespace="closed", http=http, data=tmp_path)
    stop = asyncio.Event()

    async def begin() -> Settings:
        return settings

    door = asyncio.create_task(run_stage("http", begin, stop, lambda _facts: pytest.fail("there is no Kafka")))
    await asyncio.sleep(0)
    stop.set()
    async with asyncio.timeout(20):
        await door
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*http.split(":"))
