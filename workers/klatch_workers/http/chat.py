"""`POST /v1/chat/completions`: publish a request, and answer with its stream.

A request is accepted once it stands in the log, not before: until then every failure is a status. The reader's
place is known before the request is published, so that no record can be missed between the two.
"""

import asyncio
from typing import Final

import structlog
from pydantic import ValidationError

from klatch_schemas import codec
from klatch_schemas.errors import InvalidRequest, KlatchError
from klatch_schemas.ids import Conversation, request_id_for_key
from klatch_schemas.records import Draft, Partition
from klatch_streams.log import LogError
from klatch_workers.http.auth import tenant_of
from klatch_workers.http.call import Call, Disconnected
from klatch_workers.http.clock import now_ms
from klatch_workers.http.envelope import Asked, asked_in, read_json
from klatch_workers.http.reader import Reader, Stream
from klatch_workers.http.recent import Place
from klatch_workers.http.repeats import doubt, must_name
from klatch_workers.http.replies import EventStream, WholeReply
from klatch_workers.http.request_ids import new_request_id
from klatch_workers.http.runtime import Runtime

log = structlog.get_logger("klatch.http.chat")

_MAX_KEY: Final = 255


async def complete(runtime: Runtime, call: Call) -> None:
    """Answer a chat completion request. Raises KlatchError, LogError, Disconnected."""
    call.tenant = tenant_of(call.header(b"authorization"), runtime.door.keys)
    terms = runtime.door.terms
    raw = await call.body(terms.max_body_bytes)
    asked = asked_in(await read_json(raw, terms.off_loop_bytes))
    stream = _name(runtime, call, asked)
    with runtime.intake.room_for(len(raw)):
        reader = await _attach(runtime, call, stream, asked, large=len(raw) > terms.off_loop_bytes)
    try:
        # Of what was published under a key nothing is known until some of it was read.
        if runtime.recent.get(stream) is None:
            await doubt(runtime, call, stream, reader)
        over = await _answer(runtime, call, reader, asked)
    finally:
        await reader.close()
    if not over:
        await _abandoned(runtime, call, stream, asked)


def _name(runtime: Runtime, call: Call, asked: Asked) -> Stream:
    conversation = asked.fields.klatch.conversation
    key = call.header(b"idempotency-key")
    if key is not None:
        if not 0 < len(key) <= _MAX_KEY:
            raise InvalidRequest(f"an Idempotency-Key has 1 to {_MAX_KEY} characters", param="Idempotency-Key")
        call.request = request_id_for_key(call.tenant, key)
    elif conversation is not None:
        call.request = new_request_id(runtime.partition(conversation).number)
    call.place(conversation or Conversation(call.request))
    return Stream(call.tenant, call.request)


async def _attach(runtime: Runtime, call: Call, stream: Stream, asked: Asked, *, large: bool) -> Reader:
    """A reader of the stream: of the one that exists already under this key, else of the one that is asked for."""
    if call.keyed and (place := runtime.recent.under_key(stream, now_ms())):
        call.accepted = True
        must_name(call, place.conversation)
        partition = Partition(runtime.stream_topic, place.number)
        return await _opened(runtime, call, stream, partition, place.start)
    assert call.conversation is not None  # noqa: S101 - set by _name
    partition = runtime.partition(call.conversation)
    start = await _window_start(runtime, partition) if call.keyed else None
    reader = await _opened(runtime, call, stream, partition, start)
    try:
        named = await reader.find() if call.keyed else None
        if named is None:
            await _publish(runtime, call, asked, large=large)
        call.accepted = True
        if named is not None:
            must_name(call, named)
        elif not call.keyed:
            # One with a key may stand elsewhere: `Runtime.open` sees to it that it is remembered once it was read here.
            runtime.recent.put(stream, Place(partition.number, reader.position, now_ms(), call.conversation))
    except BaseException:
        await reader.close()
        raise
    return reader


async def _opened(runtime: Runtime, call: Call, stream: Stream, partition: Partition, start: int | None) -> Reader:
    async with runtime.intake.turn(partition):
        reader = await runtime.open(stream, partition, start)
    call.watch(reader.abandon)
    return reader


async def _window_start(runtime: Runtime, partition: Partition) -> int:
    async with runtime.intake.turn(partition):
        return await runtime.door.log.offset_at(partition, now_ms() - runtime.door.terms.idempotency_window_ms)


async def _publish(runtime: Runtime, call: Call, asked: Asked, *, large: bool) -> None:
    if call.gone:
        raise Disconnected
    drafted = (runtime.request_topic, call, asked)
    draft = await asyncio.to_thread(_draft, *drafted) if large else _draft(*drafted)
    # `complete` has taken the room.
    async with runtime.intake.turn(runtime.requests_of(call.tenant)):
        await runtime.door.log.append([draft])
    log.info("request.accepted", request=call.request, tenant=call.tenant)


def _draft(topic: str, call: Call, asked: Asked) -> Draft:
    try:
        event = asked.event(call.request, call.tenant, call.header(b"traceparent"))
        return codec.draft(topic, call.tenant, event, traceparent=event.context.traceparent)
    except (ValidationError, RecursionError) as error:
        raise InvalidRequest("the request body is nested too deeply, or is not plain JSON") from error


async def _answer(runtime: Runtime, call: Call, reader: Reader, asked: Asked) -> bool:
    terms, pulse = runtime.door.terms, runtime.pulse
    if asked.fields.stream:
        return await EventStream(call, reader, terms, pulse, include_usage=asked.fields.include_usage).run()
    return await WholeReply(call, reader, terms, pulse).run()


async def _abandoned(runtime: Runtime, call: Call, stream: Stream, asked: Asked) -> None:
    wish = asked.fields.klatch.on_disconnect
    log.info("client.gone", request=call.request, cancels=wish)
    if wish == "continue" or (wish is None and call.keyed):
        return
    assert call.conversation is not None  # noqa: S101 - set by _name
    draft = runtime.cancel_draft(stream, call.conversation, "the client disconnected")
    try:
        await runtime.intake.append(draft, runtime.partition(call.conversation))
    except (KlatchError, LogError, TimeoutError) as error:
        log.warning("cancel.failed", request=call.request, error=str(error))
