"""A lean client of streamed chat completions over HTTP/1.1: notes when events come, and reads nothing into them.

One connection a request, opened before the clock starts. All sides of a comparison are read by it, so that what it
costs itself is the same for all. It is no client for applications: of a reply it keeps the times alone, and it does not
undo the transfer coding, whose chunks must not cut an event's first bytes apart (no server here does that).
"""

import asyncio
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

import msgspec

_EVENT, _DONE = b"data: {", b"data: [DONE]"
_CARRY = len(_DONE) - 1
_SPEAKS = re.compile(rb'"content": ?"[^"]')
_BODY_ENDS = b"\r\n0\r\n\r\n"
_ERROR = b'data: {"error"'


class ReplyFailed(Exception):
    """A side did not answer as it should: its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Target:
    """One side: an OpenAI-compatible server."""

    name: str
    url: str
    """With its `/v1`."""
    key: str = ""

    async def ask(self, model: str, gaps: "Gaps | None" = None) -> "Reply":
        """Send a request for a streamed reply; `model` carries the script for the model server. Raises OSError."""
        parts = urlsplit(self.url)
        loop = asyncio.get_running_loop()
        _, reply = await loop.create_connection(lambda: Reply(self.name, gaps), parts.hostname or "", parts.port or 80)
        reply.send(self._request(parts.netloc, parts.path, model))
        return reply

    def _request(self, host: str, path: str, model: str) -> bytes:
        said = [{"role": "user", "content": "In one short sentence: what is a klatch?"}]
        # Servers between us and the model server pass unknown members on, but know models by their names.
        name, _, script = model.partition("?")
        scripted = {"x-fake": dict(parse_qsl(script))} if script else {}
        body = msgspec.json.encode({"model": name, "stream": True, "messages": said, **scripted})
        head = (
            f"POST {path}/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(slots=True, eq=False)
class Gaps:
    """Seconds between neighbouring events of streams, noted while `open`."""

    seconds: list[float]
    open: bool = False


class Reply(asyncio.Protocol):
    """One streamed reply; times are the event loop's."""

    def __init__(self, name: str, gaps: Gaps | None) -> None:
        self.chunks = 0
        self.sent_at = 0.0
        self.first_at: float | None = None
        """When the first text came."""
        self._name = name
        self._gaps = gaps
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._tail = b""
        self._head = b""
        self._heard_at = 0.0

    @property
    def first_token_ms(self) -> float:
        """From sending the request to the first text."""
        if self.first_at is None:
            raise ReplyFailed(f"{self._name}: a reply without text")
        return (self.first_at - self.sent_at) * 1000

    def send(self, request: bytes) -> None:
        """Start the clock."""
        assert self._transport  # noqa: S101 - connected before it is given out
        self.sent_at = self._loop.time()
        self._transport.write(request)

    async def spoke(self) -> None:
        """Until the first text. Raises ReplyFailed."""
        await self._first

    async def whole(self) -> "Reply":
        """Until the end. Raises ReplyFailed unless that is `[DONE]`."""
        await self._over
        return self

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Count events, also those that are cut in two."""
        now = self._loop.time()
        seen = self._tail + data
        # What is carried over is shorter than any mark by one byte, so that no mark is counted twice.
        events = seen.count(_EVENT, max(0, len(self._tail) - len(_EVENT) + 1))
        self._tail = seen[-_CARRY:]
        if self.first_at is None:
            self._look_for_text(data, now)
        if events:
            self._note(events, now)
        if _DONE in seen:
            self._end(None)
        elif seen.endswith(_BODY_ENDS):
            self._end(ReplyFailed(f"{self._name}: the reply ended after {self.chunks} chunks without [DONE]"))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._end(ReplyFailed(f"{self._name}: the reply was cut off after {self.chunks} chunks ({exc})"))

    def _look_for_text(self, data: bytes, now: float) -> None:
        self._head += data
        if not self._head.startswith(b"HTTP/1.1 200"[: len(self._head)]) or _ERROR in self._head:
            self._end(ReplyFailed(f"{self._name} answered: {self._head[:300].decode(errors='replace')}"))
        elif _SPEAKS.search(self._head):
            self.first_at, self._head = now, b""
            if not self._first.done():
                self._first.set_result(None)

    def _note(self, events: int, now: float) -> None:
        if self._gaps and self._gaps.open and self.chunks:
            self._gaps.seconds.append(now - self._heard_at)
            self._gaps.seconds += [0.0] * (events - 1)
        self.chunks += events
        self._heard_at = now

    def _end(self, error: ReplyFailed | None) -> None:
        for future in (self._over, self._first):
            if not future.done():
                if error:
                    future.set_exception(error)
                    future.exception()  # whoever waits for the other one is told
                else:
                    future.set_result(None)
        if self._transport:
            self._transport.close()
