"""The Python client takes what a record may hold, both ways."""

from typing import Any
from uuid import uuid4

import pytest

from klatch_schemas import codec
from klatch_schemas.client import Client, Stream
from klatch_schemas.events import ChatRequested, StreamAttempt, StreamEnd
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Partition
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, MAX_BODY_BYTES, MAX_RECORD_BYTES, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker


async def test_a_body_with_pictures_in_it_is_published_and_a_reply_as_large_as_a_record_is_read(kafka: Cluster) -> None:
    name = f"sizes-{uuid4().hex[:8]}"
    topic, options = Namespace.named(name).of, KafkaOptions(kafka.bootstrap)
    await create_topics(options, Namespace.named(name), Partitions(1, 1))
    log = await KafkaLog.open(options)
    async with Client(kafka.bootstrap, tenant="acme", namespace=name) as client:
        picture = "data:image/png;base64," + "A" * (MAX_BODY_BYTES - 200)
        content: Any = [{"type": "image_url", "image_url": {"url": picture}}]
        asked = client.request({"model": "m", "messages": [{"role": "user", "content": content}]})
        await client.publish(asked)
        tail = await log.tail()
        tail.follow(Partition(topic(CHAT_REQUESTS), 0), 0)
        [stands] = await tail.read(10_000)
        await tail.close()
        assert codec.decode_as(ChatRequested, stands.value) == asked

        long = "x" * (MAX_RECORD_BYTES - 1_000)
        names = {"request": "r-1", "tenant": "acme", "conversation": "talk", "attempt": 1, "writer": "w"}
        chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": long}}]})
        delta = codec.encode_delta(codec.delta_prefix(RequestId("r-1"), 1, Writer("w")), 0, chunk)
        await log.append([codec.draft(topic(CHAT_STREAM), "talk", StreamAttempt.model_validate(names))])
        await log.append([codec.delta_draft(topic(CHAT_STREAM), b"talk", 0, delta)])
        ended = StreamEnd.model_validate({**names, "seq": 1, "status": "completed"})
        await log.append([codec.draft(topic(CHAT_STREAM), "talk", ended)])
        stream = Stream(Tenant("acme"), RequestId("r-1"), Conversation("talk"), 0, 0)
        assert [shown.text for shown in [one async for one in client.read(stream)]] == [long]
    await log.close()
