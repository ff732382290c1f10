"""From the records of a stream to the answer of a call: as server-sent events, or whole.

A chunk's bytes are relayed as the model server sent them; all that arrived together leaves in one write. `[DONE]`
ends a completed reply, exactly once, and nothing else; whatever else happens after the first byte is an error event.

Which deployment answers is told in a header, where that is known before the status line leaves. Where it is not, or
another deployment goes on, its first chunk says so, in a member of klatch's own behind the model server's.
"""

import asyncio
import re
from collections import deque
from collections.abc import Sequence

from klatch_schemas import codec
from klatch_schemas.assembly import LAST, Assembly, Ended, ReplyReader, Standing
from klatch_schemas.chunks import Json, Reply
from klatch_schemas.errors import KlatchError, StreamBroken, Unavailable
from klatch_schemas.events import StreamEnd, Usage
from klatch_workers.http.call import DEPLOYMENT, Call, header_value
from klatch_workers.http.door import Terms
from klatch_workers.http.errors import error_of_end
from klatch_workers.http.finding import LAST_EVENT_ID
from klatch_workers.http.pulse import Pulse
from klatch_workers.http.rate_limits import rate_limit_headers, rate_limits_in
from klatch_workers.http.reader import Heard, Reader

_COMMENT = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_OURS = re.compile(rb'"klatch"\s*:')
_OFF_LOOP_CHUNKS = 1_000


class Watch:
    """Looks at the clock for one answer, once a second: keep-alives, a stream gone silent."""

    def __init__(self, call: Call, reader: Reader, terms: Terms, pulse: Pulse) -> None:
        self._call = call
        self._reader = reader
        self._terms = terms
        self._pulse = pulse
        self.heard_at = self.wrote_at = call.waits_since or asyncio.get_running_loop().time()
        """When the last write began."""

    def beat(self, now: float) -> None:  # noqa: ARG002 - see `now` of the pulse
        """See `Beating`."""
        if not self._call.writing and (self.comment_due or self.silent):
            self._reader.nudge()

    @property
    def comment_due(self) -> bool:
        """Whether the client has waited long enough for a sign of life."""
        patience = self._terms.keepalive_s if self._call.started else self._terms.hold_s
        return self._pulse.now - self.wrote_at >= patience

    @property
    def silent(self) -> bool:
        """Whether the stream has said nothing for too long."""
        return self._pulse.now - self.heard_at > self._terms.silence_s

    def hear(self, heard: Sequence[Heard]) -> None:
        """Note what was heard. Raises Unavailable when nothing was for too long."""
        if heard:
            self.heard_at = self._pulse.now
        elif self.silent:
            silence = f"the stream was silent for {self._terms.silence_s:.0f} seconds"
            raise Unavailable(f"{silence}; read on at the resume link", retry_after_ms=0)


class _Answer:
    """An answer to `call` from what `reader` reads."""

    def __init__(self, call: Call, reader: Reader, terms: Terms, pulse: Pulse) -> None:
        self._call = call
        self._reader = reader
        self._pulse = pulse
        self._watch = Watch(call, reader, terms, pulse)

    async def run(self) -> bool:
        """Answer; returns whether the stream was over. False: the client is gone.

        Raises the KlatchError that the stream ended with; the client has not been told.
        """
        self._pulse.members.add(self._watch)
        try:
            return await self._run()
        finally:
            self._pulse.members.discard(self._watch)

    async def _run(self) -> bool:
        call, read, hear = self._call, self._reader.read, self._watch.hear
        while not call.gone:
            heard = await read()
            hear(heard)
            if not call.started and (limits := rate_limits_in(heard)):
                call.rate_limits = rate_limit_headers(limits)
            if await self._take(heard):
                return True
        return False

    async def _take(self, heard: Sequence[Heard]) -> bool:
        """Tell the client; returns whether that was all."""
        raise NotImplementedError


class EventStream(_Answer):
    """A reply as server-sent events, resumable by their ids."""

    def __init__(
        self,
        call: Call,
        reader: Reader,
        terms: Terms,
        pulse: Pulse,
        *,
        include_usage: bool,
        after: int | None = None,
    ) -> None:
        """`after` is the offset of the last event that a resuming client has."""
        super().__init__(call, reader, terms, pulse)
        self._include_usage = include_usage
        self._reply = ReplyReader(after, param=LAST_EVENT_ID)
        self._live = False
        self._last: deque[Standing] = deque(maxlen=LAST)
        self._event_start = b"id: %d-" % reader.partition.number
        self._deployment = ""
        """The last that the client was told of, or will be by the header."""
        self._first_deployment = ""
        """The first that the client is told of, by the header: what is shown at once may be of several."""

    async def _take(self, heard: Sequence[Heard]) -> bool:
        parts, ended, error = self._events(heard)
        if ended and not error and not (error := error_of_end(ended)):
            await self._write([*parts, *self._closing(ended.end)], more=False)
            return True
        if parts:
            await self._write(parts, more=True)
        if error:
            raise error
        if not parts:
            await self._comment()
        return False

    def _events(self, heard: Sequence[Heard]) -> tuple[list[bytes], Ended | None, KlatchError | None]:
        # What came before an error is shown before it.
        parts, hear, live = list[bytes](), self._reply.hear, self._live
        ended: Ended | None = None
        try:
            for offset, said in heard:
                shown = hear(offset, said)
                if isinstance(shown, Standing):
                    parts.append(self._event(shown))
                elif shown is not None:
                    ended = shown
            if not live and self._reader.caught_up:
                parts, ended = self._catch_up()
        except KlatchError as error:
            return parts, ended, error
        return parts, ended, None

    def _catch_up(self) -> tuple[list[bytes], Ended | None]:
        self._live = True
        shown = self._reply.go_live()
        self._deployment = self._reply.deployment
        # What names a usage chunk of klatch's own may be what the client has.
        self._last.extend(self._reply.had)
        parts = [self._event(one) for one in shown if isinstance(one, Standing)]
        return parts, next((one for one in shown if isinstance(one, Ended)), None)

    def _event(self, said: Standing) -> bytes:
        self._last.append(said)
        chunk = bytes(said.chunk)
        if b"\n" in chunk or b"\r" in chunk:
            # Only space between tokens of JSON can be a raw line end, and a line end would end the field.
            chunk = chunk.replace(b"\n", b" ").replace(b"\r", b" ")
        if said.deployment and said.deployment != self._deployment:
            if self._call.started or self._deployment:
                chunk = _told_by(said.deployment, chunk)
            self._deployment = said.deployment
        self._first_deployment = self._first_deployment or self._deployment
        return b"%b%d\ndata: %b\n\n" % (self._event_start, said.offset, chunk)

    def _closing(self, end: StreamEnd | None) -> list[bytes]:
        chunks = trailer_of(end, self._last) if end else []
        shown = [chunk for chunk in chunks if self._include_usage or not _is_usage(chunk)]
        # Without ids: a client that resumes after its last text gets them again.
        return [*(b"data: %b\n\n" % codec.dumps(chunk) for chunk in shown), _DONE]

    async def _comment(self) -> None:
        if self._watch.comment_due and not self._call.gone:
            await self._write([_COMMENT], more=True)

    async def _write(self, parts: list[bytes], *, more: bool) -> None:
        self._watch.wrote_at = self._pulse.now
        if not self._call.started:
            told = self._first_deployment or self._deployment
            await self._call.start_events([(DEPLOYMENT, header_value(told))] if told else None)
        await self._call.write(parts[0] if len(parts) == 1 else b"".join(parts), more=more)


class WholeReply(_Answer):
    """A reply in one piece."""

    def __init__(self, call: Call, reader: Reader, terms: Terms, pulse: Pulse) -> None:
        super().__init__(call, reader, terms, pulse)
        self._assembly = Assembly()

    async def _take(self, heard: Sequence[Heard]) -> bool:
        # Nothing was shown yet, so that a restart takes nothing back from anybody.
        for offset, said in heard:
            self._assembly.hear(offset, said)
        if not (status := self._assembly.state.status):
            return False
        if error := error_of_end(Ended(status, self._assembly.end)):
            raise error
        if gap := self._assembly.gap:
            raise StreamBroken(f"the log lacks deltas {gap.expected} to {gap.got - 1} of this reply; ask again")
        standing, end = self._assembly.standing, self._assembly.end
        # Nobody else's token waits for a long reply to be put together.
        large = len(standing) > _OFF_LOOP_CHUNKS
        body = await asyncio.to_thread(_whole, standing, end) if large else _whole(standing, end)
        told = {b"x-klatch-upstream-request": end.upstream_request, DEPLOYMENT: end.deployment} if end else {}
        await self._call.answer(200, body, [(name, header_value(said)) for name, said in told.items() if said])
        return True


def _whole(standing: Sequence[Standing], end: StreamEnd | None) -> bytes:
    reply = Reply()
    for said in standing:
        reply.add(codec.loads(bytes(said.chunk)))
    for chunk in trailer_of(end, standing[-LAST:]) if end else ():
        reply.add(chunk)
    return codec.dumps(reply.completion())


def trailer_of(end: StreamEnd, last: Sequence[Standing]) -> list[Json]:
    """The chunks that follow the last choice: the model server's own, and a usage chunk if it sent none, named after
    one of the `last`. The usage chunk says in klatch's field which deployment answered last."""
    chunks: list[Json] = list(end.trailer)
    if end.usage and not any(map(_is_usage, chunks)):
        read: list[Json] = [codec.loads(bytes(one.chunk)) for one in reversed(last)]
        nobody: Json = {}
        spoken = next((chunk for chunk in read if chunk.get("id")), nobody)
        said: Json = {name: spoken[name] for name in ("id", "created", "model", "system_fingerprint") if name in spoken}
        chunks.append({**said, "object": "chat.completion.chunk", "choices": [], "usage": _usage(end.usage)})
    if end.deployment:
        ours: Json = {"klatch": {"deployment": end.deployment}}
        chunks = [{**chunk, **ours} if _is_usage(chunk) else chunk for chunk in chunks]
    return chunks


def _told_by(deployment: str, chunk: bytes) -> bytes:
    """A chunk with `klatch.deployment` behind its own members, whose bytes stay as they are."""
    body, brace, _ = chunk.rpartition(b"}")
    if not brace or _OURS.search(body):
        return chunk  # it says so itself: its model server is a klatch, too
    comma = b"" if body.rstrip() == b"{" else b","
    return b"%b%b%b" % (body, comma, codec.dumps({"klatch": {"deployment": deployment}})[1:])


def _is_usage(chunk: Json) -> bool:
    return bool(chunk.get("usage")) and not chunk.get("choices")


def _usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
