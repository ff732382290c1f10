# pyright: basic
# aiokafka has no type information.
"""A client in Python: publish a chat event, iterate over its reply's chunks, resume, cancel. Over Kafka alone.

    async with Client("127.0.0.1:9092", tenant="acme") as client:
        stream = await client.publish(client.request({"model": "m", "messages": [...]}))
        async for shown in client.read(stream):
            print(shown.text, end="")

A reader's position is taken before the request is published, so no delta is missed; every reader of a stream, live,
late or resumed, sees the same text or a clear error. One consumer a reader: for many readers use the HTTP door.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import MessageSizeTooLargeError, OffsetOutOfRangeError
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from klatch_schemas import codec
from klatch_schemas.assembly import Ended, ReplyReader, Said, Standing, check_place
from klatch_schemas.beginning import Beginning
from klatch_schemas.codec import Unreadable
from klatch_schemas.errors import LogMoved, RequestTooLarge, error_of
from klatch_schemas.events import (
    ChatBody,
    ChatRequested,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
    StreamError,
    StreamRetract,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft, partition_of
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, MAX_RECORD_BYTES, Namespace

_OPENING_GONE = "the log no longer holds the beginning of this reply"

_REMEMBERED = 10_000
"""Of how many requests a client knows where it first sent them."""


class Stream(NamedTuple):
    """Where a reply stands in the log."""

    tenant: Tenant
    request: RequestId
    conversation: Conversation
    partition: int
    start: int
    """An offset of `chat.stream` not beyond the stream's first record; the log's first, if nobody knows better."""


class Shown(NamedTuple):
    """A chunk of a reply that stands."""

    offset: int
    """Resume after it with `read(stream, after=offset)`."""
    chunk: dict[str, Any]

    @property
    def text(self) -> str:
        """What choice 0 says in it."""
        for choice in self.chunk.get("choices") or ():
            if choice.get("index", 0) == 0:
                return str((choice.get("delta") or {}).get("content") or "")
        return ""


class Client:
    """A producer and its readers, for one tenant."""

    def __init__(self, bootstrap: str, *, tenant: str, namespace: str = "", **options: Any) -> None:
        """`options` go to aiokafka's producer and consumers: security, client id, timeouts."""
        self._tenant = Tenant(tenant)
        self._namespace = Namespace.named(namespace)
        self._options = {"bootstrap_servers": bootstrap, **options}
        self._producer: AIOKafkaProducer | None = None
        self._places: AIOKafkaConsumer | None = None
        """Asked for the ends of partitions; reads nothing."""
        self._begun = dict[RequestId, Stream]()

    async def __aenter__(self) -> Self:
        # Not idempotent: of such a one aiokafka writes no more to a partition of which a batch has failed. What stands
        # twice counts once (docs/decisions/0002-producer-settings.md).
        self._producer = AIOKafkaProducer(**self._options, acks="all", max_request_size=MAX_RECORD_BYTES)
        self._places = AIOKafkaConsumer(**self._options)
        try:
            await self._producer.start()
            await self._places.start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    def request(self, body: ChatBody, **envelope: Any) -> ChatRequested:
        """A request of this tenant with a new id; without a conversation it is one of its own.

        `envelope` are fields of `ChatRequested`. Raises pydantic's ValidationError.
        """
        request = RequestId(envelope.pop("request", None) or str(uuid4()))
        conversation = envelope.pop("conversation", None) or request
        return ChatRequested(
            request=request, tenant=self._tenant, conversation=Conversation(conversation), body=body, **envelope
        )

    async def publish(self, request: ChatRequested) -> Stream:
        """Write the request to the log; when this returns, it is accepted.

        Raises RequestTooLarge for what fits no record, and aiokafka's KafkaError.

        A request may be sent again when it is not known whether it was written; it is answered once, and its stream
        begins where this client first sent it. Another client that sends it again must be given that `Stream` to
        read: the reply may have ended before its own place.
        """
        draft = codec.draft(
            self._namespace.of(CHAT_REQUESTS),
            request.tenant,
            request,
            traceparent=request.context.traceparent,
        )
        _check_size(draft)
        stream = self._begun.get(request.request) or await self._place(request)
        stream = self._begun.setdefault(request.request, stream)
        if len(self._begun) > _REMEMBERED:
            del self._begun[next(iter(self._begun))]
        await self._send(draft)
        return stream

    async def cancel(self, stream: Stream, reason: str = "") -> None:
        """Ask for the stream to end where it is; a stream that has ended stays as it is."""
        cancel = StreamCancel(
            request=stream.request,
            tenant=stream.tenant,
            conversation=stream.conversation,
            by="client",
            reason=reason,
        )
        draft = codec.draft(self._namespace.of(CHAT_STREAM), stream.conversation, cancel)
        _check_size(draft)
        await self._send(draft._replace(partition=stream.partition))

    async def read(self, stream: Stream, *, after: int | None = None) -> AsyncIterator[Shown]:
        """The chunks that stand, in order, until the reply is complete.

        Raises the KlatchError that the stream ended with, Superseded, StreamBroken or LogMoved; InvalidRequest for an
        `after` that the log does not hold yet; and aiokafka's KafkaError where Kafka cannot be asked: read on after the
        last chunk's offset.
        """
        place = TopicPartition(self._namespace.of(CHAT_STREAM), stream.partition)
        consumer = AIOKafkaConsumer(
            **self._options,
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_wait_ms=100,
            isolation_level="read_committed",
        )
        try:
            # What did not start must be stopped as well: its connections are open.
            await consumer.start()
            consumer.assign([place])
            consumer.seek(place, stream.start)
            live_from = (await consumer.end_offsets([place]))[place]
            async for shown in _read(consumer, place, stream, live_from, after):
                yield shown
        finally:
            await _stop(consumer)

    async def _place(self, request: ChatRequested) -> Stream:
        topic = self._namespace.of(CHAT_STREAM)
        producer = self._open_producer()
        partitions = await producer.partitions_for(topic)
        partition = partition_of(request.conversation.encode(), len(partitions))
        if self._places is None:
            raise RuntimeError("use the client as `async with Client(...) as client:`")
        place = TopicPartition(topic, partition)
        end = (await self._places.end_offsets([place]))[place]
        return Stream(request.tenant, request.request, request.conversation, partition, end)

    async def _send(self, draft: Draft) -> None:
        topic, key, value, headers, partition = draft
        try:
            await self._open_producer().send_and_wait(topic, value, key=key, headers=list(headers), partition=partition)
        except MessageSizeTooLargeError as error:
            raise RequestTooLarge(
                f"Kafka takes no record of {_size(draft):,} bytes in {topic}: `klatch topics check` tells whether its "
                "max.message.bytes is klatch's"
            ) from error

    async def _stop(self) -> None:
        if self._places:
            await _stop(self._places)
        if self._producer:
            await self._producer.stop()

    def _open_producer(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise RuntimeError("use the client as `async with Client(...) as client:`")
        return self._producer


def _size(draft: Draft) -> int:
    size: int = DefaultRecordBatchBuilder.estimate_size_in_bytes(draft.key, draft.value, list(draft.headers))
    return size


def _check_size(draft: Draft) -> None:
    if (size := _size(draft)) > MAX_RECORD_BYTES:
        raise RequestTooLarge(
            f"a record of {size:,} bytes is too large for {draft.topic}, which takes up to {MAX_RECORD_BYTES:,}: send "
            "less text, or images by URL"
        )


async def _stop(consumer: AIOKafkaConsumer) -> None:
    """Stop, and raise nothing that is not for the caller.

    Where a fetch has failed and rests before the next, aiokafka's `stop` cancels it, and the CancelledError of that
    task comes out of `stop`, before its connections are closed; the caller's own task would end by it. (Another way to
    the same: aiokafka's issue 647.)
    """
    # A task of its own: what cancels the caller does not cancel it, so a CancelledError in it is aiokafka's.
    stopping = asyncio.create_task(_stopped(consumer))
    await asyncio.wait({stopping})
    stopping.result()


async def _stopped(consumer: AIOKafkaConsumer) -> None:
    fetcher, client = consumer._fetcher, consumer._client  # noqa: SLF001
    for close in (consumer.stop, *([fetcher.close] if fetcher else []), client.close):
        with suppress(asyncio.CancelledError):
            await close()


async def _read(
    consumer: AIOKafkaConsumer, place: TopicPartition, stream: Stream, live_from: int, after: int | None
) -> AsyncIterator[Shown]:
    if after is not None:
        check_place(after, live_from, param="after")
    reader, beginning, records = ReplyReader(after), Beginning[Said](), _Records(stream)
    caught_up = live = False
    while True:
        caught_up = caught_up or await consumer.position(place) >= live_from
        if caught_up and beginning.missing:
            raise LogMoved(_OPENING_GONE)
        if caught_up and not live:
            live = True
            for shown in shown_of(reader.go_live()):
                yield shown
            if reader.state.status is not None:
                return
        for offset, said in beginning.sift(await _heard(consumer, place, records)):
            heard = reader.hear(offset, said)
            for shown in shown_of([heard] if heard else []):
                yield shown
            if isinstance(heard, Ended):
                return


async def _heard(consumer: AIOKafkaConsumer, place: TopicPartition, records: "_Records") -> list[tuple[int, Said]]:
    try:
        batches = await consumer.getmany(place, timeout_ms=1000)
    except OffsetOutOfRangeError as error:
        raise LogMoved(_OPENING_GONE) from error
    said = [(record.offset, records.said_in(record.value)) for record in batches.get(place, ())]
    return [(offset, one) for offset, one in said if one is not None]


class _Records:
    """Tells which records of a partition are of one stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._others = set[str]()
        """Who writes another tenant's stream under the same id: a delta names its writer and no tenant."""

    def said_in(self, value: bytes | None) -> Said | None:
        """What a record says, if it is of the stream."""
        try:
            said = codec.decode(value)
        except Unreadable:
            return None
        match said:
            case codec.Delta():
                return said if said.request == self._stream.request and said.writer not in self._others else None
            case StreamAttempt() | StreamEnd() | StreamCancel() | StreamRetract() if (
                said.request == self._stream.request
            ):
                if said.tenant == self._stream.tenant:
                    return said
                if isinstance(said, StreamAttempt):
                    self._others.add(said.writer)
                return None
            case _:
                return None


def shown_of(heard: Sequence[Standing | Ended]) -> Iterator[Shown]:
    """What a reader is shown of what it heard. Raises the KlatchError that the stream ended with, after the chunks."""
    for one in heard:
        if isinstance(one, Ended):
            raise_unless_completed(one)
        else:
            yield Shown(one.offset, codec.loads(bytes(one.chunk)))


def raise_unless_completed(ended: Ended) -> None:
    """Raise the error that a stream ended with, if it did not complete."""
    if ended.status == "completed":
        return
    said = ended.error or StreamError(code=ended.status, message=f"the request was {ended.status}")
    error = error_of(said)
    error.ended = ended.status
    raise error
