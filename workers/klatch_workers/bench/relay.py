# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types, and this is what one writes with it by hand.
"""Bare relays on aiokafka: what Kafka alone costs, with nothing of klatch between. Baselines, not products.

`hop` copies a topic to the next one, as aiokafka's documentation shows it. `front` and `back` relay a model server's
stream through a topic, with the self-clocked batches that klatch writes: no quota, no verdict, no attempt, no resume,
no error that a client would understand, and not a byte of JSON is looked at.
"""

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, Final, Self

import aiohttp
import click
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

HOPS: Final = ("bench.hop.1", "bench.hop.2", "bench.hop.3")
REQUESTS: Final = "bench.relay.requests"
TOKENS: Final = "bench.relay.tokens"
PARTITIONS: Final = 8

_INTERVAL_S = 0.020
_PAUSE_S = 0.005
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
_DONE = b"data: [DONE]"


async def create_topics(bootstrap: str) -> None:
    """What the relays read and write."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        wanted = [NewTopic(name, 1, 1) for name in HOPS]
        await admin.create_topics([*wanted, NewTopic(REQUESTS, PARTITIONS, 1), NewTopic(TOKENS, PARTITIONS, 1)])
    finally:
        await admin.close()


async def hop(bootstrap: str, source: str, target: str, ready: Callable[..., None]) -> None:
    """Copy `source` to `target`, message by message."""
    consumer = AIOKafkaConsumer(
        source, bootstrap_servers=bootstrap, group_id=f"bench-{source}", auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await consumer.start()
    await producer.start()
    ready()
    async for message in consumer:
        await producer.send_and_wait(target, message.value, key=message.key)


class ThreeHops:
    """Sends into the first topic and waits for the third; two `hop` processes stand between."""

    def __init__(self, bootstrap: str) -> None:
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
        self._consumer = AIOKafkaConsumer(HOPS[2], bootstrap_servers=bootstrap, auto_offset_reset="earliest")

    async def __aenter__(self) -> Self:
        await self._producer.start()
        await self._consumer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()
        await self._producer.stop()

    async def send(self) -> float:
        """Milliseconds from the first append to the last record."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._producer.send_and_wait(HOPS[0], b"x" * 400)
        await self._consumer.getone()
        return (loop.time() - began) * 1000


# --- streams


class _Lane:
    """Self-clocked batches of one partition: see `klatch_streams.batches`."""

    def __init__(self, producer: AIOKafkaProducer, partition: int) -> None:
        self._producer, self._partition = producer, partition
        self._waiting: list[tuple[bytes, bytes]] = []
        self._some, self._urgent = asyncio.Event(), asyncio.Event()
        self._left_at = 0.0
        self.task = asyncio.create_task(self._run())

    def write(self, key: bytes, value: bytes, urgent: bool) -> None:
        self._waiting.append((key, value))
        self._some.set()
        if urgent:
            self._urgent.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            wait = self._left_at + _INTERVAL_S - loop.time()
            if wait > 0 and not self._urgent.is_set():
                timer = loop.call_later(wait, self._urgent.set)
                await self._urgent.wait()
                timer.cancel()
            self._some.clear()
            self._urgent.clear()
            self._left_at = loop.time()
            batch, waiting = self._producer.create_batch(), self._waiting
            self._waiting = []
            for key, value in waiting:
                batch.append(key=key, value=value, timestamp=None)
            batch.close()
            await (await self._producer.send_batch(batch, TOKENS, partition=self._partition))


async def back(bootstrap: str, model_url: str, ready: Callable[..., None]) -> None:
    """Read requests, ask the model server, append each event of its answer."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, max_batch_size=1 << 19)
    await producer.start()
    lanes = [_Lane(producer, number) for number in range(PARTITIONS)]
    consumer = await _reader(bootstrap, REQUESTS)
    tasks = set[asyncio.Task[None]]()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        ready()
        async for message in consumer:
            task = asyncio.create_task(_answer(session, model_url, message, lanes[message.partition]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


async def _answer(session: aiohttp.ClientSession, model_url: str, message: Any, lane: _Lane) -> None:
    headers = {"content-type": "application/json"}
    first, rest = True, b""
    async with session.post(f"{model_url}/chat/completions", data=message.value, headers=headers) as response:
        async for read in response.content.iter_any():
            *events, rest = (rest + read).split(b"\n\n")
            for event in events:
                lane.write(message.key, event, first)
            first = False


class _Front:
    """Publishes what clients post, and brings them the records that carry their number."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer
        self._numbers = count()
        self._open: dict[bytes, asyncio.StreamWriter] = {}

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        number = next(self._numbers)
        key = b"%d" % number
        self._open[key] = writer
        writer.write(_HEAD)
        await self._producer.send_and_wait(REQUESTS, body, key=key, partition=number % PARTITIONS)

    async def carry(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            arrived: dict[Any, list[Any]] = {}
            for messages in (await consumer.getmany(timeout_ms=1000, max_records=500)).values():
                for message in messages:
                    arrived.setdefault(message.key, []).append(message.value)
            for key, events in arrived.items():
                if writer := self._open.get(key):
                    writer.write(b"\n\n".join([*events, b""]))
                    if events[-1].startswith(_DONE):
                        del self._open[key]
                        writer.close()
            if arrived:
                await asyncio.sleep(_PAUSE_S)


async def front(bootstrap: str, ready: Callable[..., None]) -> None:
    """An HTTP server whose replies come from the topic."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    serving = _Front(producer)
    consumer = await _reader(bootstrap, TOKENS)
    server = await asyncio.start_server(serving.accept, "127.0.0.1", 0, backlog=1024)
    ready(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    await serving.carry(consumer)


async def _reader(bootstrap: str, topic: str) -> AIOKafkaConsumer:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await consumer.start()
    partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    consumer.assign(partitions)
    await consumer.seek_to_beginning()
    return consumer


# --- as a process


@click.command()
@click.argument("what", type=click.Choice(["hop", "front", "back"]))
@click.option("--bootstrap", required=True)
@click.option("--source", default="")
@click.option("--target", default="")
@click.option("--model-url", default="")
def main(what: str, bootstrap: str, source: str, target: str, model_url: str) -> None:
    """One process of a baseline; ends on SIGTERM."""
    works: dict[str, Callable[[], Awaitable[None]]] = {
        "hop": lambda: hop(bootstrap, source, target, _ready),
        "front": lambda: front(bootstrap, _ready),
        "back": lambda: back(bootstrap, model_url, _ready),
    }
    asyncio.run(_until_told(works[what]))


def _ready(**facts: str) -> None:
    click.echo(json.dumps({"event": "ready", **facts}))


async def _until_told(work: Callable[[], Awaitable[None]]) -> None:
    working = asyncio.ensure_future(work())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, working.cancel)
    await asyncio.wait({working})
    if not working.cancelled():
        working.result()


if __name__ == "__main__":
    main()
