"""The HTTP door as an ASGI app, and as a server on a socket.

All handlers have one shape: `async (runtime, call)`, answering through the call or raising. What they raise becomes
an answer here and nowhere else.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

import structlog
import uvicorn
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from klatch_schemas.errors import KlatchError, NotFound, Unavailable
from klatch_workers.http import chat, embeddings, other, streams
from klatch_workers.http.call import Call, Disconnected
from klatch_workers.http.connections import Connection, Connections
from klatch_workers.http.door import Door
from klatch_workers.http.errors import MethodNotAllowed, as_klatch_error
from klatch_workers.http.intake import RETRY_AFTER_MS
from klatch_workers.http.runtime import Runtime

log = structlog.get_logger("klatch.http")

Handler = Callable[[Runtime, Call], Awaitable[None]]


class Endpoint:
    """A path's handlers by method, as an ASGI app."""

    def __init__(self, runtime: Runtime, handlers: Mapping[str, Handler]) -> None:
        self._runtime = runtime
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        call = Call(scope, receive, send)
        try:
            await self._handler(call.method)(self._runtime, call)
        except Disconnected:
            return
        except asyncio.CancelledError:
            # The server ends, and this call has outlasted its grace: bare, this would be a plain 500.
            await _refuse(call, Unavailable("this door is closing; ask again", retry_after_ms=RETRY_AFTER_MS))
        except Exception as error:  # noqa: BLE001 - the boundary: one call's error must not end the door
            await _refuse(call, error)
        finally:
            await call.unwatch()

    def _handler(self, method: str) -> Handler:
        if handler := self._handlers.get(method):
            return handler
        raise MethodNotAllowed(method, ", ".join(self._handlers))


async def _refuse(call: Call, error: Exception) -> None:
    shown = as_klatch_error(error)
    if type(shown) is KlatchError and shown is not error:
        log.error("call.crashed", request=call.request, exc_info=error)
    else:
        log.info("call.refused", request=call.request, code=shown.code, cause=type(error).__name__)
    if not call.finished and not call.gone:
        await call.refuse(shown)


async def _unknown(_: Runtime, call: Call) -> None:
    raise NotFound(f"nothing answers {call.method} here; this is an OpenAI-compatible API under /v1")


class App:
    """The ASGI app of a door; it answers while it is `running`."""

    def __init__(self, door: Door) -> None:
        self._runtime = runtime = Runtime(door)
        routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": chat.complete},
            "/v1/streams/{id}": {"GET": streams.resume, "DELETE": streams.cancel},
            "/v1/embeddings": {"POST": embeddings.embeddings},
            "/v1/models": {"GET": other.models},
            "/healthz": {"GET": other.healthy},
            "/readyz": {"GET": other.ready},
        }
        every = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
        self._router = Router(
            [Route(path, Endpoint(runtime, handlers)) for path, handlers in routes.items()],
            default=Endpoint(runtime, dict.fromkeys(every, _unknown)),
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI 3."""
        await self._router(scope, receive, send)

    def watch(self, server: uvicorn.Server) -> None:
        """Cut off clients of the server that serves this app and that take nothing."""
        runtime = self._runtime
        runtime.pulse.members.add(Connections(server.server_state.connections, runtime.door.terms.write_timeout_s))

    def end_calls(self) -> None:
        """Tell every open call that this door closes.

        Whose request is accepted gets an error with the resume link; who waits for a log that does not answer is told
        so now.
        """
        self._runtime.hub.fail_all(Unavailable("this door is closing; read on at the resume link", retry_after_ms=0))
        self._runtime.intake.give_up()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Read what streams say. Raises LogError, TooManyPartitions.

        No lifespan of ASGI's: where one fails, uvicorn ends the process, and why is not known outside.
        """
        await self._runtime.start()
        try:
            yield
        finally:
            await self._runtime.close()


class Server(uvicorn.Server):
    """A server whose process decides about signals, and that says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self.listening.set()

    @property
    def port(self) -> int:
        """The port it listens on, once it does."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Leave signals to the process: it has other things to stop."""
        return nullcontext()


async def serve(
    door: Door,
    stop: asyncio.Event,
    *,
    listening: socket.socket | None = None,
    drain_s: float = 10.0,
    ready: Callable[[int], None] | None = None,
) -> None:
    """Serve until `stop` is set: then accept no more, let streams finish for `drain_s`, and end the rest politely.

    On `listening`, a socket that listens already; by default on a free port of this machine. `ready` is called with
    the port once the door listens. Raises LogError, TooManyPartitions if it cannot begin.
    """
    app = App(door)
    async with app.running():
        await _serve(app, stop, listening or listen("127.0.0.1", 0), drain_s, ready)


async def _serve(
    app: App, stop: asyncio.Event, listening: socket.socket, drain_s: float, ready: Callable[[int], None] | None
) -> None:
    server = Server(config_of(app, drain_s))
    app.watch(server)
    serving = asyncio.create_task(server.serve([listening]), name="http-server")
    opened = asyncio.create_task(server.listening.wait(), name="http-listening")
    stopping = asyncio.create_task(stop.wait(), name="http-stop")
    try:
        await asyncio.wait([serving, opened], return_when=asyncio.FIRST_COMPLETED)
        if ready and opened.done():
            ready(server.port)
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        # 1. Accept no more. 2. Let streams finish. 3. End the rest with an error, and their resume link.
        server.should_exit = True
        opened.cancel()
        stopping.cancel()
        await asyncio.wait([serving], timeout=drain_s)
        app.end_calls()
        await serving


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio turns Nagle's algorithm off only where it is.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


def config_of(app: ASGIApp, drain_s: float) -> uvicorn.Config:
    """How all of klatch's doors are served."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        # Facts are logged here; uvicorn would only add that clients hang up.
        log_config=None,
        log_level="critical",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(drain_s) + 5,
    )
