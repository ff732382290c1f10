"""Connections of a door: a client that takes nothing for too long is cut off, whatever it is being told (trap 42).

What waits to be sent is known here alone: uvicorn leaves the last bytes of every answer, which may be all of it, to the
event loop, and closes a connection only when they have gone. A client counts as alive while it takes any of what it was
sent, however slowly, so that an answer may take as long as it takes; and as long as the kernel has room for all of it,
which is megabytes, nobody asks. Linux tells what the other side has taken; elsewhere what the kernel took itself
counts, which it does in large pieces.
"""

import asyncio
import fcntl
import struct
import termios
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
        self._taken, self._moved_at = -1, 0.0
        super().connection_made(cast("asyncio.Transport", self._counted))

    @property
    def taken(self) -> int:
        """Bytes that the client's machine has taken."""
        return self._counted.given - self.transport.get_write_buffer_size() - _under_way(self.transport)

    def look(self, now: float, patience_s: float) -> None:
        """Cut it off if something waits, and the client has taken nothing for so long."""
        waits, taken = self.transport.get_write_buffer_size(), self.taken
        if not waits or taken != self._taken:
            self._taken, self._moved_at = taken, now
        elif now - self._moved_at > patience_s:
            state = cast("dict[str, Any]", self.scope or {}).get("state", {})
            log.info("client.stuck", request=state.get(REQUEST), waits=waits)
            # To close would be to wait for the client. Whoever answers it hears that it is gone.
            self.transport.abort()


def _under_way(transport: asyncio.Transport) -> int:
    """Bytes that the kernel holds until the client's machine says that it has them (tcp(7), SIOCOUTQ); 0 if it says
    nothing of sockets."""
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):  # such as closed meanwhile
        return 0
    held: int = struct.unpack("i", answer)[0]
    return held


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
