"""A streamed reply under way: bytes of an HTTP response to batches of chunks, and how it ended.

It reads, judges and hangs up; it never retries, and it never says that a reply is whole when a
choice lacks its finish_reason. One timer a reply watches for silence, re-armed only when it fires.
"""

import asyncio
from collections.abc import Callable
from typing import Literal, TypedDict

import aiohttp
import msgspec

from klatch_agents import sse
from klatch_agents.gateway import amend
from klatch_agents.gateway.errors import (
    ErrorBody,
    MalformedError,
    ModelError,
    StalledError,
    TruncatedError,
    told_in_a_good_answer,
)
from klatch_agents.gateway.facts import read_chunk
from klatch_agents.gateway.port import Chunk, Finished, Timeouts, Usage

_DONE = b"[DONE]"


class StreamedReply:
    """The `ModelReply` of an HTTP response whose status line was good.

    `choices` is how many the caller asked for (`n`), `running_usage` whether it wants the totals that
    some servers send on every chunk; `linger` takes the response of a whole reply.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        *,
        model: str,
        choices: int,
        running_usage: bool,
        timeouts: Timeouts,
        upstream_request_id: str | None,
        linger: Callable[[aiohttp.ClientResponse], None],
    ) -> None:
        self.model = model
        self.deployment = ""
        self.upstream_request_id = upstream_request_id
        self.finished: Finished | None = None
        self._response = response
        self._linger = linger
        self._asked = choices
        self._timeouts = timeouts
        self._readany = response.content.readany
        self._now = asyncio.get_running_loop().time
        self._decoder = sse.Decoder()
        self._silence = _Silence(timeouts.first_token, response.close)
        self._seen: set[int] = set()
        self._finishes: dict[int, str] = {}
        self._usage: Usage | None = None
        self._running_usage = running_usage
        self._carrier: bytes | None = None
        """The chunk with choices that the last total came on, until a chunk of its own brings one."""
        self._called: set[int] = set()
        self._spoke = False
        self._failure: ModelError | None = None

    def __aiter__(self) -> "StreamedReply":
        return self

    async def __anext__(self) -> list[Chunk]:
        while self.finished is None:
            if self._failure is not None:  # after the good chunks that came before it in its batch
                self.close()
                raise self._failure
            read, cut = b"", None
            self._silence.since = self._now()
            try:
                read = await self._readany()
            except (aiohttp.ClientError, OSError) as error:
                cut = error
            finally:
                self._silence.since = None
            batch = self._take(self._decode(read, cut))
            if not read and self.finished is None and self._failure is None:
                self._end("cut" if cut else "eof", cut)
            if self.finished is not None:
                batch += self._accounting()
            if batch:
                return batch
        self.close()
        raise StopAsyncIteration

    def close(self) -> None:
        """Hangs up at once, or gives the connection back if the reply has been read to its end."""
        self._silence.stop()
        if self.finished is not None and self.finished.ending == "done":
            self._linger(self._response)
        else:
            self._response.close()

    def _decode(self, read: bytes, cut: Exception | None) -> list[sse.Event | sse.Comment]:
        try:
            if read:
                return self._decoder.feed(read)
            return [] if cut else self._decoder.end()
        except sse.TooLargeError as error:
            self._spoil(MalformedError(str(error), **self._named()))
            return []

    def _take(self, items: list[sse.Event | sse.Comment]) -> list[Chunk]:
        batch: list[Chunk] = []
        for item in items:
            if isinstance(item, sse.Comment):
                continue
            if item.data == _DONE:
                self._end("done", None)
                break
            chunk = self._chunk(item)
            if chunk is None:
                break
            if chunk.usage_only and chunk.usage is None:
                continue  # it counts nothing, and says nothing else
            batch.append(self._note(chunk))
        return batch

    def _chunk(self, event: sse.Event) -> Chunk | None:
        """None: the stream is over, well or not."""
        try:
            chunk = read_chunk(event.data, event.name)
        except ValueError:
            if event.data.strip() == _DONE:  # looked at here, where it costs whole replies nothing
                self._end("done", None)
            else:
                what = "the model server sent an event that is no chunk of a reply"
                self._spoil(MalformedError(what, **self._named()))
            return None
        if isinstance(chunk, ErrorBody):
            self._spoil(told_in_a_good_answer(chunk, **self._named()))
            return None
        return chunk

    def _note(self, chunk: Chunk) -> Chunk:
        """Remembers what matters at the end; returns the chunk as clients shall see it."""
        self._seen.update(chunk.choices)
        if chunk.calls:
            self._called.update(chunk.calls)
        if chunk.finishes:
            if self._called:
                chunk = self._finish_calls(chunk)
            self._finishes.update(chunk.finishes)
        if chunk.usage is not None:  # the last one: some servers send a running total
            chunk = self._count(chunk, chunk.usage)
        if chunk.speaks and not self._spoke:
            self._spoke = True
            self._silence.allow(self._timeouts.idle)
        return chunk

    def _finish_calls(self, chunk: Chunk) -> Chunk:
        finishes = tuple((i, amend.finish_of_calls(f) if i in self._called else f) for i, f in chunk.finishes)
        if finishes == chunk.finishes:
            return chunk
        return msgspec.structs.replace(chunk, raw=amend.with_finishes(chunk.raw, self._called), finishes=finishes)

    def _count(self, chunk: Chunk, usage: Usage) -> Chunk:
        self._usage = usage
        self._carrier = None if chunk.usage_only else chunk.raw
        if chunk.usage_only or self._running_usage:
            return chunk
        return msgspec.structs.replace(chunk, raw=amend.without_usage(chunk.raw, usage.raw))

    def _accounting(self) -> list[Chunk]:
        """The chunk that tells the total, where the server told it on others only."""
        if self._usage is None or self._carrier is None:
            return []
        return [Chunk(amend.usage_chunk(self._carrier, self._usage.raw), usage_only=True, usage=self._usage)]

    def _end(self, ending: Literal["done", "eof", "cut"], cut: Exception | None) -> None:
        """The stream is over: the reply is whole, or it is broken.

        Once every choice has finished nothing on the wire can undo the answer, so then a cut, a silence,
        an error or junk is an ending too. Without `[DONE]` every choice that was asked for must be there.
        """
        if self._is_whole(ending):
            self.finished = Finished(dict(self._finishes), self._usage, ending)
        elif self._silence.broken:
            what = f"the model server was silent for {self._silence.limit:g} s"
            self._failure = StalledError(what, **self._named())
        else:
            how = f"was cut off ({type(cut).__name__})" if cut else f"ended ({ending})"
            missing = sorted(self._seen - self._finishes.keys()) or "all"
            what = f"the reply {how} without a finish_reason for choices: {missing}"
            self._failure = TruncatedError(what, **self._named())

    def _spoil(self, failure: ModelError) -> None:
        """What came cannot be read on: see `_end`."""
        if self._is_whole("cut"):
            self._end("cut", None)
        else:
            self._failure = failure

    def _is_whole(self, ending: Literal["done", "eof", "cut"]) -> bool:
        enough = bool(self._finishes) if ending == "done" else len(self._finishes) >= self._asked
        return enough and not self._seen - self._finishes.keys()

    def _named(self) -> "_Named":
        return {"upstream_request_id": self.upstream_request_id, "spoke": self._spoke}


class _Named(TypedDict):
    """What a failure bears of the reply that it ends."""

    upstream_request_id: str | None
    spoke: bool


class _Silence:
    """Calls `on_broken` when one wait lasts longer than `limit` seconds.

    A timer set and cancelled at every read would cost more than the read itself, so the timer
    stays armed and looks, when it fires, at how long the present wait has lasted. The time the
    reader spends elsewhere counts for nothing.
    """

    __slots__ = ("_loop", "_on_broken", "_timer", "broken", "limit", "since")

    def __init__(self, limit: float, on_broken: Callable[[], None]) -> None:
        self.limit = limit
        self.broken = False
        self._on_broken = on_broken
        self._loop = asyncio.get_running_loop()
        self.since: float | None = None  # when the present wait began, None between waits
        self._timer = self._loop.call_later(limit, self._look)

    def allow(self, limit: float) -> None:
        self.limit = limit
        self._timer.cancel()
        self._timer = self._loop.call_later(limit, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self.since is None else self.since
        if now < since + self.limit:
            self._timer = self._loop.call_at(since + self.limit, self._look)
        else:
            self.broken = True
            self._on_broken()
