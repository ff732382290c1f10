"""Just enough of an HTTP/1.1 server to be cheap a chunk and exact about how a body breaks off.

Keep-alive and chunked bodies; no TLS, no pipelining, no request limits: for loopback and tests.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec


class Request(msgspec.Struct):
    """A whole request; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    query: str = ""


class Connection(asyncio.Protocol):
    """One client. `on_request` is called with each whole request; the handler answers through the
    connection, and may set `on_lost` and `on_writable` for the time of one exchange."""

    def __init__(self, on_request: Callable[["Connection", Request], None], open_ones: set["Connection"]) -> None:
        self._on_request = on_request
        self._open_ones = open_ones
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self.on_lost: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self.writable = True

    # -- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._open_ones.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        self._open_ones.discard(self)
        if self.on_lost is not None:
            self.on_lost()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self.on_writable is not None:
            self.on_writable()

    # -- httptools' callbacks -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", {}, []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        url = urlsplit(self._url.decode("latin-1"))
        method = self._parser.get_method().decode("latin-1")
        self._on_request(self, Request(method, url.path, self._headers, b"".join(self._body), url.query))

    # -- answering ------------------------------------------------------------------------------

    def respond(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A whole JSON answer."""
        given = {"content-type": "application/json", "content-length": str(len(body))}
        self._write(_head(status, {**given, **(headers or {})}) + body)

    def begin_events(self, headers: Mapping[str, str]) -> None:
        given = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        self._write(_head(200, {**given, "transfer-encoding": "chunked", **headers}))

    def write(self, data: bytes) -> None:
        """One chunk of the body, one write."""
        if data:
            self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self._write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Closes the connection where it stands, after what was written."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Sends a TCP reset: an abort with nothing left to linger for."""
        if self._transport is not None:
            wire = self._transport.get_extra_info("socket")
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
