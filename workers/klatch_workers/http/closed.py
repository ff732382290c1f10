"""The door before it can open: whoever asks while Kafka does not answer is told to come again, not left to guess."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.types import Receive, Scope, Send

from klatch_schemas.errors import Unavailable
from klatch_workers.http.app import Server, config_of
from klatch_workers.http.call import Call
from klatch_workers.http.intake import RETRY_AFTER_MS

T = TypeVar("T")
_MOMENT_S = 1.0
"""Where Kafka is there the door opens within it, and need not be opened twice."""


async def closed_until(opened: Awaitable[T], listening: socket.socket) -> T:
    """Await what the door needs; if that takes longer than a moment, whoever asks on `listening` hears 503 meanwhile.

    `/healthz` answers 200. Who comes before, and after, waits in the socket's backlog for the door itself.
    """
    opening = asyncio.ensure_future(opened)
    try:
        await asyncio.wait({opening}, timeout=_MOMENT_S)
        if not opening.done():
            async with _refusing(listening):
                await asyncio.wait({opening})
        return await opening
    finally:
        opening.cancel()
        await asyncio.wait({opening})


@asynccontextmanager
async def _refusing(listening: socket.socket) -> AsyncGenerator[None]:
    server = Server(config_of(_refuse, drain_s=0))
    serving = asyncio.create_task(server.serve([listening.dup()]), name="http-closed")
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    call = Call(scope, receive, send)
    if scope["path"] == "/healthz":
        await call.answer(200, b'{"status":"ok"}')
    else:
        await call.refuse(
            Unavailable("Kafka has not answered since this door started; try again", retry_after_ms=RETRY_AFTER_MS)
        )
