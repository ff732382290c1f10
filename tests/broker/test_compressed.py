# pyright: reportMissingTypeStubs=false
# aiokafka has no types.
"""Producers that compress: their requests are answered and their cancels heeded; what no codec makes is buried."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer

from klatch_schemas import codec
from klatch_schemas.codec import Delta
from klatch_schemas.events import ChatRequested, StreamCancel
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM

if TYPE_CHECKING:
    from tests.broker.conftest import Stack

pytestmark = pytest.mark.broker

CODECS: Final = ("gzip", "snappy", "lz4", "zstd")
ACME: Final = Tenant("acme")


async def send(producer: Any, draft: Draft, partition: int | None = None) -> None:
    await producer.send_and_wait(
        draft.topic, draft.value, key=draft.key, headers=list(draft.headers), partition=partition
    )


def request(model: str) -> ChatRequested:
    name = str(uuid4())
    body: Mapping[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi " * 100}]}
    return ChatRequested(request=RequestId(name), tenant=ACME, conversation=Conversation(name), body=dict(body))


@pytest.mark.parametrize("compression", CODECS)
async def test_a_request_and_a_cancel_of_every_codec_are_read(stack: "Stack", compression: str) -> None:
    async with AIOKafkaProducer(bootstrap_servers=stack.bootstrap, compression_type=compression) as producer:
        short, long = request("fake?text=done"), request("fake?tokens=100000&rate=20")
        for asked in (short, long):
            await send(producer, codec.draft(stack.namespace.of(CHAT_REQUESTS), ACME, asked))
        assert [end.status for end in (await stack.story(short.request)).ends] == ["completed"]
        await stack.until(CHAT_STREAM, lambda said: isinstance(said, Delta) and said.request == long.request)
        cancel = StreamCancel(
            request=long.request, tenant=ACME, conversation=long.conversation, by="client", reason="enough " * 50
        )
        await send(producer, codec.draft(stack.namespace.of(CHAT_STREAM), long.conversation, cancel))
        assert [end.status for end in (await stack.story(long.request)).ends] == ["cancelled"]
    # The door, which follows the partition, and generation go on.
    assert await stack.text("fake?text=still here", conversation=str(long.conversation)) == "still here"
