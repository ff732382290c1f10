"""Clients that take what they are told slowly, and clients that take nothing: trap 42.

Most tests here have a server of one answer, with real sockets, and look at its connections at times of their own.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from starlette.types import Receive, Scope, Send
from tests.workers.http.conftest import KEYS

from klatch_schemas.ids import Tenant
from klatch_workers.http.app import Server, config_of, listen
from klatch_workers.http.call import Call
from klatch_workers.http.connections import Connection, Connections
from klatch_workers.http.door import Terms

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kits, Teller

PATIENCE_S = 30.0
LARGE = b"x" * 8_000_000
RECEIVES = 65_536
"""The client's buffer in its kernel."""
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
Answering = Callable[[Call], Awaitable[None]]


async def whole(call: Call) -> None:
    """A reply in one piece."""
    await call.answer(200, LARGE)


async def replayed(call: Call) -> None:
    """A finished stream that is read again: all of it is the last write."""
    await call.start_events()
    await call.write(LARGE, more=False)


async def live(call: Call) -> None:
    """A stream that goes on."""
    await call.start_events()
    for _ in range(8):
        await call.write(b"x" * 1_000_000)
    await call.write(b"", more=False)


ANSWERS = pytest.mark.parametrize("answering", [whole, replayed, live])


@dataclass
class Served:
    """A server of one answer, and a client that has asked for it and reads when it is told to."""

    server: Server
    client: socket.socket
    over: asyncio.Event
    """The answer was written, or its client is gone."""

    @property
    def connections(self) -> Connections:
        """As the door looks at them."""
        return Connections(self.server.server_state.connections, PATIENCE_S)

    async def waits(self) -> Connection:
        """The connection, once a part of the answer waits in it."""
        assert await self.take(1)
        (connection,) = self.server.server_state.connections
        assert isinstance(connection, Connection)
        assert connection.transport.get_write_buffer_size()
        return connection

    async def take(self, size: int = 65_536) -> int:
        """Read some bytes; 0 at the end, or behind it."""
        await asyncio.sleep(0)  # the server's turn: what is there already is read without waiting
        try:
            return len(await asyncio.get_running_loop().sock_recv(self.client, size))
        except ConnectionError:
            return 0

    async def take_until_it_shows(self, connection: Connection) -> int:
        """Read until the server knows that something was taken; how much that took."""
        before, total = connection.taken, 0
        while connection.taken == before:
            taken = await self.take(4_096)
            assert taken, "all that was sent was read"
            total += taken
        return total

    async def take_all(self) -> int:
        """Read to the end."""
        total = 0
        while taken := await self.take():
            total += taken
        return total


@asynccontextmanager
async def served(answering: Answering) -> AsyncGenerator[Served]:
    over = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        await answering(call)
        over.set()

    server, listening = Server(config_of(app, 0)), listen("127.0.0.1", 0)
    serving = asyncio.create_task(server.serve([listening]))
    await server.listening.wait()
    loop = asyncio.get_running_loop()
    try:
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVES)
            await loop.sock_connect(client, ("127.0.0.1", server.port))
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: door\r\nconnection: close\r\n\r\n")
            yield Served(server, client, over)
    finally:
        server.should_exit = True
        await serving


@LOOPS
@ANSWERS
def test_who_takes_nothing_is_cut_off_whatever_it_is_told_trap_42(loop: Any, answering: Answering) -> None:
    async def told() -> None:
        async with served(answering) as at, asyncio.timeout(10):
            connection, now, look = await at.waits(), 100.0, at.connections.beat
            while True:
                before = connection.taken
                look(now)
                look(now + PATIENCE_S)
                assert connection.transport.get_write_buffer_size(), "it was not patient"
                look(now + PATIENCE_S + 1)
                if connection.taken == before or not connection.transport.get_write_buffer_size():
                    break
                # The client's kernel took some by itself meanwhile, as it may a while later: it is looked once more.
                await at.take_until_it_shows(connection)
                now += 100
            assert await at.take_all() < len(LARGE)
            await at.over.wait()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(told())


@LOOPS
@ANSWERS
def test_who_takes_a_little_in_time_gets_all_of_it_trap_42(loop: Any, answering: Answering) -> None:
    async def told() -> None:
        async with served(answering) as at, asyncio.timeout(10):
            connection = await at.waits()
            now, taken = 100.0, 0
            for _ in range(8):
                at.connections.beat(now)
                taken += await at.take_until_it_shows(connection)
                now += PATIENCE_S - 1
            assert taken + await at.take_all() > len(LARGE)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(told())


@LOOPS
def test_the_little_that_a_slow_client_takes_is_a_sign_of_life_trap_42(loop: Any) -> None:
    """What the kernel takes is none: megabytes at a time, once a client has taken as much."""

    async def told() -> None:
        async with served(whole) as at, asyncio.timeout(10):
            connection = await at.waits()
            taken = [await at.take_until_it_shows(connection) for _ in range(8)]
            assert max(taken) <= 2 * RECEIVES

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(told())


async def test_a_slow_client_of_a_door_gets_all_of_a_long_write_trap_42(kits: "Kits") -> None:
    """The write takes four times as long as a client may take nothing."""
    told, go = asyncio.Event(), asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        for _ in range(40):
            await teller.delta(content="x" * 25_000)
        told.set()
        await go.wait()
        await teller.end()

    loop = asyncio.get_running_loop()
    async with kits.serving(Terms(write_timeout_s=1.0, keepalive_s=0.1)) as kit:
        kit.stages.script = script
        first = await kit.chat(klatch={"on_disconnect": "continue"})
        await told.wait()
        with socket.socket() as client:
            client.setblocking(False)
            # As on a real network: else the kernel would take all of it at once.
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            await loop.sock_connect(client, ("127.0.0.1", kit.port))
            path, key = f"/v1/streams/{first.headers['x-request-id']}", KEYS[Tenant("acme")]
            await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\nauthorization: Bearer {key}\r\n\r\n".encode())
            got = bytearray()
            while taken := await loop.sock_recv(client, 16_384):
                got += taken
                if len(got) > 1_000_000:
                    go.set()
                if b"[DONE]" in taken:
                    break
                await asyncio.sleep(0 if go.is_set() else len(taken) / 250_000)  # the pace of this client
    assert got.count(b"data: ") == 41
