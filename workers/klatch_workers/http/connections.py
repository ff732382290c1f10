"""Connections of a door: a client that takes nothing for too long is cut off, whatever it is being told (trap 42).

What waits to be sent is known here alone: uvicorn leaves the last bytes of every answer, which may be all of it, to the
event loop, and closes a connection only when they have gone. A client counts as alive while any of what waits goes out,
however slowly; so an answer may take as long as it takes.
"""

import asyncio
from collections.abc import Collection
from typing import Any, Final, cast

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = structlog.get_logger("klatch.http.connections")

REQUEST: Final = "request"
"""The member of a scope's `state` that names the request, once it is answered."""


class _Counted:
    """A transport that counts the bytes it was given."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.given = 0

    def write(self, data: bytes) -> None:
        self.given += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, and what of it has gone out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        self._counted = _Counted(transport)
        self._gone, self._moved_at = -1, 0.0
        super().connection_made(cast("asyncio.Transport", self._counted))

    def look(self, now: float, patience_s: float) -> None:
        """Cut it off if something waits, and none of it has gone out for so long."""
        waits = self.transport.get_write_buffer_size()
        gone = self._counted.given - waits
        if not waits or gone != self._gone:
            self._gone, self._moved_at = gone, now
        elif now - self._moved_at > patience_s:
            state = cast("dict[str, Any]", self.scope).get("state", {})
            log.info("client.stuck", request=state.get(REQUEST), waits=waits)
            # To close would be to wait for the client. Whoever answers it hears that it is gone.
            self.transport.abort()


class Connections:
    """All connections of a server, looked at once a second."""

    def __init__(self, connections: Collection[object], patience_s: float) -> None:
        self._connections = connections
        self._patience_s = patience_s

    def beat(self, now: float) -> None:
        """See `Beating`."""
        for connection in tuple(self._connections):
            if isinstance(connection, Connection):
                connection.look(now, self._patience_s)
