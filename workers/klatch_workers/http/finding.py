"""Where a stream stands, when all that is known is its id.

In order of cost: what this door remembers, the event id that a client resumes after, the bits of the request id, the
conversation that a client names; at last the tenant's own requests, which say in which conversation the id belongs.
Every stream begins with a request there, and one partition of requests is far less than all partitions of streams.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.errors import InvalidRequest, NotFound
from klatch_schemas.events import ChatRequested, UsageSettled
from klatch_schemas.ids import Conversation
from klatch_schemas.records import Partition, Record, partition_of
from klatch_schemas.topics import DAY_MS
from klatch_workers.http.clock import now_ms
from klatch_workers.http.reader import Reader, Stream
from klatch_workers.http.request_ids import OWN_CONVERSATION, birth_of
from klatch_workers.http.runtime import Runtime

LAST_EVENT_ID = "Last-Event-ID"
_EVENT_ID = re.compile(r"(\d{1,6})-(\d{1,18})")
_READ_MS = 200


@dataclass(frozen=True, slots=True)
class EventId:
    """The `id` of a server-sent event: where its record stands."""

    number: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> "EventId":
        """Read `partition-offset`. Raises InvalidRequest."""
        match = _EVENT_ID.fullmatch(text)
        if not match:
            raise InvalidRequest(f"{LAST_EVENT_ID} is not the id of an event of this API", param=LAST_EVENT_ID)
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Hints:
    """What a client says about where its stream may stand."""

    last: EventId | None = None
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A stream: a reader of it from its first record on, and its conversation."""

    reader: Reader
    conversation: Conversation


async def find(runtime: Runtime, stream: Stream, hints: Hints) -> Found:
    """The stream of `stream.tenant` that has this id. Raises NotFound, LogError."""
    if place := runtime.recent.get(stream):
        partition = Partition(runtime.stream_topic, place.number)
        return Found(await runtime.open(stream, partition, place.start), place.conversation)
    tried = set[Partition]()
    async for partition, start in _guesses(runtime, stream, hints):
        if partition not in tried and (found := await _look(runtime, stream, partition, start)):
            return found
        tried.add(partition)
    return await _from_requests(runtime, stream)


async def _guesses(runtime: Runtime, stream: Stream, hints: Hints) -> AsyncIterator[tuple[Partition, int]]:
    since = _since(runtime, stream)
    birth = birth_of(stream.request)
    numbers = [hints.last.number] if hints.last else []
    if birth:
        own = runtime.partition(Conversation(stream.request)).number
        numbers.append(own if birth.partition == OWN_CONVERSATION else birth.partition)
    if hints.conversation:
        numbers.append(runtime.partition(Conversation(hints.conversation)).number)
    for number in numbers:
        if number < runtime.streams:
            partition = Partition(runtime.stream_topic, number)
            yield partition, await runtime.door.log.offset_at(partition, since)


def _since(runtime: Runtime, stream: Stream) -> int:
    """From when on its records may stand, as its id says; of one that says nothing likely, what the window allows."""
    birth, now = birth_of(stream.request), now_ms()
    if birth and now - DAY_MS <= birth.milliseconds <= now:
        return birth.milliseconds - runtime.door.terms.clock_skew_ms
    return _oldest(runtime)


def _oldest(runtime: Runtime) -> int:
    return now_ms() - runtime.door.terms.idempotency_window_ms


async def _look(runtime: Runtime, stream: Stream, partition: Partition, start: int) -> Found | None:
    reader = await runtime.open(stream, partition, start)
    try:
        conversation = await reader.find()
    except BaseException:
        await reader.close()
        raise
    if conversation is None:
        await reader.close()
        return None
    return Found(reader, conversation)


async def _from_requests(runtime: Runtime, stream: Stream) -> Found:
    likely, oldest = _since(runtime, stream), _oldest(runtime)
    asked = await _request(runtime, stream, likely)
    if asked is None and oldest < likely:
        # The clock that its id was made by may have been ahead.
        asked = await _request(runtime, stream, oldest)
    if asked is None:
        raise NotFound(f"no stream {stream.request}, or none of yours")
    conversation, timestamp_ms = asked
    partition = runtime.partition(conversation)
    start = await runtime.door.log.offset_at(partition, timestamp_ms - runtime.door.terms.clock_skew_ms)
    # It may have no record yet: then it has not begun.
    return Found(await runtime.open(stream, partition, start), conversation)


async def _request(runtime: Runtime, stream: Stream, since: int) -> tuple[Conversation, int] | None:
    async with aclosing(said_of(runtime, stream, since)) as facts:
        async for said, timestamp_ms in facts:
            if isinstance(said, ChatRequested):
                return said.conversation, timestamp_ms
    return None


async def said_of(
    runtime: Runtime, stream: Stream, since: int
) -> AsyncGenerator[tuple[ChatRequested | UsageSettled, int]]:
    """What the tenant's own log says of a request, with its times: when it was asked for, and that it has ended."""
    number = partition_of(stream.tenant.encode(), runtime.requests)
    partition = Partition(runtime.request_topic, number)
    position = await runtime.door.log.offset_at(partition, since)
    _, end = await runtime.door.log.bounds(partition)
    if position >= end:
        return
    tail = await runtime.door.log.tail()
    try:
        tail.follow(partition, position)
        while position < end:
            for record in await tail.read(_READ_MS):
                if said := _said_of(record, stream):
                    yield said, record.timestamp_ms
            position = tail.position(partition) or position
    finally:
        await tail.close()


def _said_of(record: Record, stream: Stream) -> ChatRequested | UsageSettled | None:
    # Most records are other people's requests, and large: they are not decoded.
    if stream.request.encode() not in (record.value or b""):
        return None
    try:
        said = codec.decode(record.value)
    except Unreadable:
        return None
    if isinstance(said, ChatRequested | UsageSettled) and (said.tenant, said.request) == stream:
        return said
    return None
