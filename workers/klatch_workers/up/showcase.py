"""One chat event through the pipeline, before the user's eyes: each record with topic, offset and milliseconds.

It is an ordinary request of the local tenant; what is shown is read from the topics, as anybody could.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import NamedTuple
from uuid import uuid4

from klatch_schemas import codec
from klatch_schemas.chunks import Reply
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRequested,
    Event,
    StreamAttempt,
    StreamEnd,
    TrustVerdict,
    TurnFinished,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import (
    CHAT_ADMITTED,
    CHAT_REQUESTS,
    CHAT_STREAM,
    CHAT_TURNS,
    TRUST_VERDICTS,
    Namespace,
)
from klatch_streams.log import Log, Tail

_TOPICS = (CHAT_REQUESTS, CHAT_ADMITTED, TRUST_VERDICTS, CHAT_STREAM, CHAT_TURNS)
_PATIENCE_S = 60.0
_WARM_MS = 300


class Step(NamedTuple):
    """A record that the request led to."""

    topic: str
    partition: int
    offset: int
    after_ms: float
    what: str
    text: str = ""


async def showcase(log: Log, namespace: Namespace, tenant: str, question: str) -> AsyncIterator[Step]:
    """Publish a request and yield what becomes of it, until its usage is settled. Raises LogError, TimeoutError."""
    request = _request(tenant, question)
    tail = await log.tail()
    try:
        await _follow_all(log, tail, namespace)
        # The first fetch opens connections; what is shown should tell of the pipeline alone.
        await tail.read(_WARM_MS)
        began = time.monotonic()
        topic = namespace.of(CHAT_REQUESTS)
        await log.append([codec.draft(topic, tenant, request)])
        async with asyncio.timeout(_PATIENCE_S):
            async for record, event in _of(tail, request.request):
                yield _step(record, event, (time.monotonic() - began) * 1000, namespace)
                if isinstance(event, UsageSettled):
                    return
    finally:
        await tail.close()


def _request(tenant: str, question: str) -> ChatRequested:
    request = RequestId(str(uuid4()))
    return ChatRequested(
        request=request,
        tenant=Tenant(tenant),
        conversation=Conversation(request),
        use_case="showcase",
        body={"model": "local", "messages": [{"role": "user", "content": question}], "max_tokens": 48},
    )


async def _follow_all(log: Log, tail: Tail, namespace: Namespace) -> None:
    for topic in _TOPICS:
        name = namespace.of(topic)
        for number in range(await log.partitions(name)):
            partition = Partition(name, number)
            _, end = await log.bounds(partition)
            tail.follow(partition, end)


async def _of(tail: Tail, request: str) -> AsyncIterator[tuple[Record, Event | Delta]]:
    while True:
        for record in await tail.read(1000):
            try:
                event = codec.decode(record.value)
            except Unreadable:
                continue
            named = event.request if isinstance(event, ChatAdmitted) else event
            if getattr(named, "request", None) == request:
                yield record, event


def _step(record: Record, event: Event | Delta, after_ms: float, namespace: Namespace) -> Step:
    what, text = _words(event)
    topic = record.partition.topic.removeprefix(namespace.prefix)
    return Step(topic, record.partition.number, record.offset, after_ms, what, text)


def _words(event: Event | Delta) -> tuple[str, str]:
    match event:
        case Delta(chunk=chunk):
            reply = Reply()
            reply.add(codec.loads(bytes(chunk)))
            return "delta", "".join(str(message.get("content") or "") for message in reply.messages())
        case ChatAdmitted():
            return f"admitted, {event.reservation.tokens} tokens reserved", ""
        case TrustVerdict():
            return f"verdict: {event.decision}", ""
        case StreamAttempt():
            return f"attempt {event.attempt} opened", ""
        case StreamEnd():
            return f"end: {event.status}", ""
        case TurnFinished():
            return "turn remembered", ""
        case UsageSettled():
            return f"usage settled: {event.usage.total_tokens} tokens", ""
        case _:
            return event.KIND, ""
