"""One HTTP exchange on raw ASGI: read a bounded body, answer once, and know when the client is gone.

Every answer carries `x-request-id`. Nothing here wraps the response: a token goes from the hub to the socket in one
`send`, and a middleware that buffers, or hides a disconnect, has no place to stand.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import parse_qs, quote

from starlette.types import Receive, Scope, Send

from klatch_schemas.errors import KlatchError, RequestTooLarge
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_workers.http.connections import REQUEST
from klatch_workers.http.errors import Answered, Headers, error_body, error_headers, status_of
from klatch_workers.http.request_ids import new_request_id

_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

DEPLOYMENT = b"x-klatch-deployment"


class Disconnected(Exception):
    """The client went away before its request was whole."""


class Call:
    """A request and the one answer to it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._watching: asyncio.Task[None] | None = None
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.method: str = scope["method"]
        self.request: RequestId = new_request_id()
        self.tenant = Tenant("")
        self.conversation: Conversation | None = None
        self.resume: str | None = None
        """Where a client that lost its answer may read on."""
        self.accepted = False
        """Whether its request is known to stand in the log."""
        self.waits_since: float | None = None
        """Since when its client waits for first words, in the event loop's time; None: since now."""
        self.keyed = b"idempotency-key" in self.headers
        """Whether asking again finds the same request."""
        self.rate_limits: Headers = []
        """What the answer says of limits, if it is known before it begins."""
        self.started = False
        self.finished = False
        self.gone = False
        self.writing = False

    def header(self, name: bytes) -> str | None:
        """A request header, if it was sent."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def path(self, name: str) -> str:
        """A parameter of the path."""
        return str(self._scope["path_params"][name])

    def query(self, name: str) -> str | None:
        """The first value of a query parameter."""
        values = parse_qs(self._scope["query_string"].decode("latin-1")).get(name)
        return values[0] if values else None

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises RequestTooLarge, Disconnected."""
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        parts, size = list[bytes](), 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part: bytes = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            if not message.get("more_body"):
                return b"".join(parts)

    def place(self, conversation: Conversation) -> None:
        """Note where its stream stands, and is read on."""
        self.conversation = conversation
        self.resume = f"/v1/streams/{self.request}?conversation={quote(conversation, safe='')}"

    def watch(self, on_gone: Callable[[], object]) -> None:
        """Call `on_gone` as soon as the client hangs up: only `receive` tells, a failed send never does."""

        async def until_gone() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.gone = True
            on_gone()

        self._watching = asyncio.create_task(until_gone(), name="http-watch")

    async def unwatch(self) -> None:
        """Stop watching."""
        watching, self._watching = self._watching, None
        if watching:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def answer(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Send a whole JSON answer."""
        await self._start(
            status,
            [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *(headers or [])],
        )
        self.finished = True
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: KlatchError) -> None:
        """Answer with an error: as a status, or, once a stream has begun, as its last event."""
        asked = Answered(self.request, self.resume, self.accepted, self.keyed)
        body = error_body(error, asked)
        if not self.started:
            headers = error_headers(error, asked)
            if error.deployment:
                headers.append((DEPLOYMENT, header_value(error.deployment)))
            if self.rate_limits:
                headers = [header for header in headers if not header[0].startswith(b"x-ratelimit-")]
            await self.answer(status_of(error), body, headers)
        else:
            # No [DONE]: a client that checks for it must see that this is not the end of a reply.
            await self.write(b"data: %b\n\n" % body, more=False)

    async def start_events(self, headers: Headers | None = None) -> None:
        """Begin a stream of server-sent events."""
        await self._start(200, [*_EVENTS, *(headers or [])])

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send bytes of a stream that has begun; waits while the client's socket is full."""
        self.finished = not more
        self.writing = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.writing = False

    async def _start(self, status: int, headers: Headers) -> None:
        self.started = True
        self._scope.setdefault("state", {})[REQUEST] = self.request
        ours: Headers = [(b"x-request-id", self.request.encode())]
        if self.conversation is not None:
            ours.append((b"x-klatch-conversation", header_value(self.conversation)))
        ours += self.rate_limits
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *ours]})


def header_value(text: str) -> bytes:
    """Text as the value of a header: visible ASCII; anything else is percent-encoded, as is the percent sign."""
    return b"".join(bytes([c]) if 0x20 < c < 0x7F and c != 0x25 else b"%%%02X" % c for c in text.encode())


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the request body is larger than {limit} bytes: send less text, or images by URL")
