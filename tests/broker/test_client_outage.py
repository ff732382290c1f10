"""Kafka dies under a reader of the Python client that holds its reply already: it is told all the same."""

import asyncio
import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from klatch_schemas import codec
from klatch_schemas.client import Client, Shown, Stream
from klatch_schemas.events import StreamAttempt, StreamEnd
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_STREAM, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker

REQUEST, TENANT, TALK, WRITER = RequestId("r-1"), Tenant("acme"), Conversation("talk"), Writer("writer-1")
WORDS = ("one ", "two ", "three")


def reply(topic: str) -> list[Draft]:
    """The records of a whole reply."""
    names = {"request": REQUEST, "tenant": TENANT, "conversation": TALK}
    began = StreamAttempt.model_validate({**names, "attempt": 1, "writer": WRITER, "mode": "restart"})
    ended = StreamEnd.model_validate(
        {**names, "attempt": 1, "writer": WRITER, "seq": len(WORDS), "status": "completed"}
    )
    prefix = codec.delta_prefix(REQUEST, 1, WRITER)
    chunks = [codec.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}) for word in WORDS]
    deltas = [
        codec.delta_draft(topic, TALK.encode(), 0, codec.encode_delta(prefix, seq, chunk))
        for seq, chunk in enumerate(chunks)
    ]
    return [codec.draft(topic, TALK, began), *deltas, codec.draft(topic, TALK, ended)]


class FetchFailed(logging.Handler):
    """Tells when a consumer has been refused, and rests before it asks again."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Failed fetch messages"):
            self.told.set()


@contextmanager
def fetch_failed() -> Generator[asyncio.Event]:
    """Set when a fetch has failed; also where a command run before in this process has silenced aiokafka."""
    fetcher, handler = logging.getLogger("aiokafka.consumer.fetcher"), FetchFailed()
    level = fetcher.level
    fetcher.setLevel(logging.ERROR)
    fetcher.addHandler(handler)
    try:
        yield handler.told
    finally:
        fetcher.removeHandler(handler)
        fetcher.setLevel(level)


async def test_a_reader_that_holds_its_end_when_kafka_dies_is_told_of_it(tmp_path: Path) -> None:
    with fetch_failed() as failed:
        async with Cluster(tmp_path) as cluster:
            options = KafkaOptions(cluster.bootstrap)
            await create_topics(options, Namespace(), Partitions(1, 1))
            log = await KafkaLog.open(options)
            await log.append(reply(Namespace().of(CHAT_STREAM)))
            await log.close()
            # It rests so long that it rests still when the reader has its end.
            async with Client(cluster.bootstrap, tenant=TENANT, retry_backoff_ms=60_000) as client:
                reading = client.read(Stream(TENANT, REQUEST, TALK, 0, 0))
                shown: list[Shown] = [await anext(reading)]
                await cluster.nodes[0].kill()
                await failed.wait()
                shown += [one async for one in reading]
    assert tuple(one.text for one in shown) == WORDS
