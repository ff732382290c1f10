"""`/v1/streams/{id}`: read a stream again, from any door, live or finished; or cancel it.

A stream that another tenant asked for does not exist here. Leaving does not cancel: whoever resumes is one reader
among others.
"""

import re

from klatch_schemas import codec
from klatch_schemas.assembly import check_place, no_place
from klatch_schemas.errors import LogMoved, NotFound
from klatch_schemas.ids import RequestId
from klatch_workers.http.auth import tenant_of
from klatch_workers.http.call import Call
from klatch_workers.http.finding import LAST_EVENT_ID, EventId, Found, Hints, find
from klatch_workers.http.reader import Stream
from klatch_workers.http.replies import EventStream
from klatch_workers.http.runtime import Runtime

_REASON = 1_000
"""Characters of a reason that are kept."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


async def resume(runtime: Runtime, call: Call) -> None:
    """Answer with the stream's events after `Last-Event-ID`, or with all. Raises KlatchError, LogError."""
    last = call.header(b"last-event-id")
    after = EventId.parse(last) if last else None
    found = await _found(runtime, call, after)
    try:
        if after:
            await _check_place(runtime, found, after)
            await found.reader.begin_by(after.offset)
        call.watch(found.reader.abandon)
        include_usage = (call.query("include_usage") or "").lower() in {"1", "true"}
        events = EventStream(
            call,
            found.reader,
            runtime.door.terms,
            runtime.pulse,
            include_usage=include_usage,
            after=after.offset if after else None,
        )
        await events.run()
    finally:
        await found.reader.close()


async def _check_place(runtime: Runtime, found: Found, after: EventId) -> None:
    """Raise LogMoved for a client whose place retention has taken: what followed it may be gone as well.

    InvalidRequest for a place that is none of this stream's: text would be left out in silence.
    """
    first, end = await runtime.door.log.bounds(found.reader.partition)
    if after.number != found.reader.partition.number:
        raise no_place(LAST_EVENT_ID)
    check_place(after.offset, end, param=LAST_EVENT_ID)
    if after.offset + 1 < first:
        raise LogMoved(f"the log has moved on: it begins at offset {first}, and {after.offset + 1} was next")


async def cancel(runtime: Runtime, call: Call) -> None:
    """Append a cancel: the log decides whether it came before the end; `?reason=` stands in it.

    Raises KlatchError, LogError.
    """
    found = await _found(runtime, call, None)
    await found.reader.close()
    reason = (call.query("reason") or "cancelled over HTTP")[:_REASON]
    draft = runtime.cancel_draft(found.reader.stream, found.conversation, reason)
    await runtime.intake.append(draft, runtime.partition(found.conversation))
    said = {"id": call.request, "object": "stream.cancel", "conversation": found.conversation}
    await call.answer(202, codec.dumps(said))


async def _found(runtime: Runtime, call: Call, last: EventId | None) -> Found:
    call.tenant = tenant_of(call.header(b"authorization"), runtime.door.keys)
    named = call.path("id")
    if not _ID.fullmatch(named):
        raise NotFound("no stream of that name: ids are letters, digits and . _ : -")
    call.request = RequestId(named)
    hints = Hints(last, call.query("conversation"))
    found = await find(runtime, Stream(call.tenant, call.request), hints)
    call.conversation = found.conversation
    call.resume = f"/v1/streams/{call.request}"
    # Its id names it as a key would.
    call.accepted = call.keyed = True
    return found
