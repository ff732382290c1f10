"""An `Idempotency-Key` names one request of its tenant: what to do where it has named another before.

Admission drops in silence whatever repeats an id that it knows. A door that finds the stream publishes nothing; one
that finds none publishes, and cannot know whether an earlier request of the key waits for its turn, stands in another
conversation, or is so old that the log has lost its stream. So where a stream stays silent it looks through the
tenant's requests, as far back as admission remembers. That may be much to read: it is done for one client at a time,
with pauses, and for nobody longer than a status line may take; whoever has no turn by then waits on.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

import structlog

from klatch_schemas.errors import InvalidRequest, LogMoved
from klatch_schemas.events import ChatRequested
from klatch_schemas.ids import Conversation
from klatch_streams.log import LogError
from klatch_streams.seen import LONGEST_MS, MEMORY_MS
from klatch_workers.http.call import Call
from klatch_workers.http.clock import now_ms
from klatch_workers.http.finding import said_of
from klatch_workers.http.reader import Reader, Stream
from klatch_workers.http.runtime import Runtime

log = structlog.get_logger("klatch.http.repeats")

_MOMENT_S: Final = 0.5
_REST: Final = 9
"""So many times as long as a look took nobody looks: a door spends a tenth of its time on this at most."""


def must_name(call: Call, conversation: Conversation) -> None:
    """Raise InvalidRequest if the call names another conversation than the request of its key."""
    named = call.conversation
    call.place(conversation)
    if named != conversation:
        raise InvalidRequest(
            f"this Idempotency-Key named a request of the conversation {conversation!r} before: "
            "send the same conversation again, or another key for another request",
            param="klatch.conversation",
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """The first request of a key."""

    conversation: Conversation
    timestamp_ms: int
    again: bool = False
    ended: bool = False


async def doubt(runtime: Runtime, call: Call, stream: Stream, reader: Reader) -> None:
    """Wait for the first words of a stream of which `reader` has found nothing yet, and ask why there are none.

    Returns once it is worth while to read on. Raises InvalidRequest if its key names a request of another
    conversation, LogMoved if what it names is gone.
    """
    terms = runtime.door.terms
    call.waits_since = asyncio.get_running_loop().time()
    if await _speaks(call, reader, terms.doubt_s):
        return
    looking = asyncio.create_task(_look(runtime, stream), name="http-repeats")
    looking.add_done_callback(lambda _: reader.nudge())
    try:
        # No longer than anybody waits for a status line.
        if await _speaks(call, reader, max(0.0, terms.hold_s - terms.doubt_s)) or not looking.done():
            return
        asked = looking.result()
    finally:
        looking.cancel()
        await asyncio.wait({looking})
    # Admission may have forgotten what is older than a day, and let the key in anew.
    if asked and asked.again and asked.timestamp_ms >= now_ms() - MEMORY_MS:
        log.info("request.repeated", request=call.request, tenant=call.tenant, ended=asked.ended)
        must_name(call, asked.conversation)
        await _look_back(runtime, call, reader, asked)


async def _speaks(call: Call, reader: Reader, within_s: float) -> bool:
    patience = asyncio.get_running_loop().call_later(within_s, reader.nudge)
    try:
        return await reader.speaks() or call.gone
    finally:
        patience.cancel()


async def _look_back(runtime: Runtime, call: Call, reader: Reader, asked: _Asked) -> None:
    terms, stream_log = runtime.door.terms, runtime.door.log
    if asked.timestamp_ms < now_ms() - terms.idempotency_window_ms:
        since = asked.timestamp_ms - terms.clock_skew_ms
        if await reader.find_from(await stream_log.offset_at(reader.partition, since)):
            return
    if not asked.ended:
        return  # it waits for its turn
    _, end = await stream_log.bounds(reader.partition)
    for _ in range(max(1, ceil(terms.hold_s / _MOMENT_S))):
        # What the hub has not read yet may be its stream; what it had read before is heard by now.
        had_read = runtime.hub.position(reader.partition)
        if await _speaks(call, reader, _MOMENT_S):
            return
        if had_read >= end:
            raise LogMoved("the log no longer holds the stream that this Idempotency-Key named: ask under another key")


async def _look(runtime: Runtime, stream: Stream) -> _Asked | None:
    since = now_ms() - LONGEST_MS - runtime.door.terms.clock_skew_ms
    try:
        async with turn(runtime.looking), aclosing(said_of(runtime, stream, since)) as facts:
            asked: _Asked | None = None
            async for said, timestamp_ms in facts:
                if not isinstance(said, ChatRequested):
                    asked = asked and replace(asked, ended=True)
                else:
                    asked = replace(asked, again=True) if asked else _Asked(said.conversation, timestamp_ms)
            return asked
    except LogError as error:
        log.warning("repeats.log_failed", request=stream.request, error=str(error))
        return None


@asynccontextmanager
async def turn(looking: asyncio.Lock) -> AsyncGenerator[None]:
    """One look at a time, and none for a while after it."""
    loop = asyncio.get_running_loop()
    await looking.acquire()
    began = loop.time()
    try:
        yield
    finally:
        loop.call_later(_REST * (loop.time() - began), looking.release)
