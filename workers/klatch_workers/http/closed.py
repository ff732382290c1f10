"""The door before it can open: whoever asks while Kafka does not answer is told to come again, not left to guess."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.types import Receive, Scope, Send

from klatch_schemas.errors import Unavailable
from klatch_workers.http.app import Server, config_of
from klatch_workers.http.call import Call

_RETRY_AFTER_MS = 1_000


@asynccontextmanager
async def closed_door(listening: socket.socket) -> AsyncGenerator[None]:
    """Answer 503 with `Retry-After` on a socket that listens, but 200 to `/healthz`; who comes after it is left waits
    in the socket's backlog."""
    server = Server(config_of(_refuse, drain_s=0, lifespan="off"))
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
            Unavailable("Kafka has not answered since this door started; try again", retry_after_ms=_RETRY_AFTER_MS)
        )
