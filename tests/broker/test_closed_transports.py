# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""A connection to Kafka that breaks under uvloop: who sends at that moment is told what aiokafka's callers expect."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest

from klatch_streams.kafka.closed_transports import expect_closed_transports

if TYPE_CHECKING:
    from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker


class Between:
    """A way to a broker that can break."""

    def __init__(self, bootstrap: str) -> None:
        host, _, port = bootstrap.partition(":")
        self._broker = host, int(port)
        self._writers = list[asyncio.StreamWriter]()
        self._carrying = set[asyncio.Task[None]]()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection(*self._broker)
        self._writers += [writer, there]
        for source, target in ((reader, there), (back, writer)):
            self._carrying.add(asyncio.create_task(self._copy(source, target)))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError, RuntimeError):
            while said := await source.read(2**16):
                target.write(said)

    def reset(self) -> None:
        """As a host that is gone answers: RST."""
        for writer in self._writers:
            linger: socket.socket = writer.get_extra_info("socket")
            linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


async def send_while_it_breaks(bootstrap: str) -> None:
    """Send at every turn of the loop until it fails."""
    between, sent = Between(bootstrap), list[asyncio.Future[Any]]()
    async with await asyncio.start_server(between.carry, "127.0.0.1", 0) as server:
        connection: Any = await create_conn("127.0.0.1", server.sockets[0].getsockname()[1])
        await connection.send(MetadataRequest([]))
        between.reset()
        try:
            while True:
                sent.append(asyncio.ensure_future(connection.send(MetadataRequest([]))))
                await asyncio.sleep(0)
        finally:
            assert not connection.connected()
            await asyncio.gather(*sent, return_exceptions=True)


def test_who_sends_on_a_closed_transport_is_told_that_the_connection_is_broken(kafka: "Cluster") -> None:
    expect_closed_transports()
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(KafkaConnectionError, match="handler is closed"),
    ):
        runner.run(send_while_it_breaks(kafka.bootstrap))
