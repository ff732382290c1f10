"""Apache Kafka of one or three KRaft nodes on loopback, its data in a folder that is kept.

    async with Cluster(data) as kafka:
        ... kafka.bootstrap ...

Not a production deployment: one machine, no authentication, everything on 127.0.0.1.
"""

import asyncio
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from klatch_workers.kafka.errors import BrokerFailedError, DataFolderError
from klatch_workers.kafka.filelock import locked
from klatch_workers.kafka.folder import LOCK, read_layout, settle_layout, wipe
from klatch_workers.kafka.jars import Progress, ensure_jars
from klatch_workers.kafka.java import find_java
from klatch_workers.kafka.node import Node
from klatch_workers.kafka.places import Places
from klatch_workers.kafka.properties import Options, Program


class Cluster:
    """A cluster in the folder `data`, made the first time, started again every other time.

    Its ports are those of the last start where these are free. It ends with this process, unless
    `options.leash` is off.
    """

    def __init__(
        self,
        data: Path,
        options: Options | None = None,
        *,
        places: Places | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.data = data.resolve()
        self.options = options or Options()
        self.nodes: tuple[Node, ...] = ()
        self.started_in = 0.0  # seconds from the first process to the last answer
        self._places = places or Places.from_environ()
        self._progress = progress

    @classmethod
    def find(cls, data: Path) -> Self | None:
        """The cluster of that folder as it is, running or not, whoever started it. None: no such."""
        cluster = cls(data)
        layout = read_layout(cluster.data)
        if layout is None:
            return None
        cluster.options = Options(nodes=len(layout.ports))
        ids = range(1, len(layout.ports) + 1)
        cluster.nodes = tuple(Node(i, cluster.data, layout.cluster_id, layout.ports) for i in ids)
        return cluster

    @property
    def bootstrap(self) -> str:
        """What a client's `bootstrap_servers` takes."""
        return ",".join(node.bootstrap for node in self.nodes)

    @property
    def running(self) -> bool:
        return any(node.pid is not None for node in self.nodes)

    async def start(self) -> None:
        """Return when every node answers. Raises `KafkaChildError`; then nothing of it runs."""
        java = await find_java()
        jars = await ensure_jars(self._places, self._progress)
        program = Program(java.path, java.major, jars.resolve(), self.options)
        self.nodes = await asyncio.to_thread(self._settle)
        for node in self.nodes:
            node.equip(program)
        began = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as starting:
                for node in self.nodes:
                    starting.create_task(node.start(members=len(self.nodes)))
        except BaseExceptionGroup as failures:
            await self._abandon()
            raise failures.exceptions[0] from None
        except asyncio.CancelledError:
            await self._abandon()
            raise
        self.started_in = time.perf_counter() - began

    async def stop(self, grace: float = 10.0) -> None:
        """Stop every node, at once; what has not ended after `grace` seconds is killed."""
        await asyncio.gather(*(node.stop(grace) for node in self.nodes))

    async def failed(self) -> BrokerFailedError:
        """Return when a node has ended that should not have, with what it said last."""
        ends = {asyncio.create_task(node.wait()): node for node in self.nodes}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
        return ends[done.pop()].failure("ended while it was needed")

    async def wipe(self) -> None:
        """Remove what klatch made in the data folder. Raises `DataFolderError` while a node runs."""
        await asyncio.to_thread(self._wipe)

    async def _abandon(self) -> None:
        await asyncio.gather(*(node.kill() for node in self.nodes))

    def _wipe(self) -> None:
        with locked(self.data / LOCK):
            self._refuse_running()
            wipe(self.data)

    def _refuse_running(self) -> None:
        found = Cluster.find(self.data)
        if found is not None and found.running:
            pids = ", ".join(str(node.pid) for node in found.nodes if node.pid is not None)
            raise DataFolderError(
                f"{self.data} is in use by a broker (pid {pids}) at {found.bootstrap}: use that "
                f"one, stop it (klatch kafka stop --data {self.data}), or name another folder."
            )

    def _settle(self) -> tuple[Node, ...]:
        with locked(self.data / LOCK):
            self._refuse_running()
            layout = settle_layout(self.data, self.options)
        ids = range(1, len(layout.ports) + 1)
        return tuple(Node(i, self.data, layout.cluster_id, layout.ports) for i in ids)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
