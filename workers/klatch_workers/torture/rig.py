"""What is tortured: Kafka, the stages as processes of their own, and a model server that writes another text each time.

Each stage of the system under torture is a pool of children on leashes. A child that dies is started again at once,
as a supervisor would do; the model server and the clients live in this process, which nobody kills.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import MODELS, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.ledger import publish
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.kafka import Cluster, Options
from klatch_workers.settings import PREFIX
from klatch_workers.tenants import write_tenants
from klatch_workers.torture.load import script
from klatch_workers.torture.system import Place, System
from klatch_workers.torture.tenants import PRICED, PRICED_RATE, PRICED_TOKENS, TENANTS, configured, priced_route
from klatch_workers.up.children import Child, ChildFailed
from klatch_workers.up.everything import PARTITIONS, free_address

_DRAIN_S: Final = 3.0
REMEMBERS_S: Final = 480.0
"""Twice what a client is patient for: a door reads the log over this time for every key, and the load has many."""
_AGAIN_S: Final = 0.5
START_S: Final = 120.0
"""A worker may have to wait for a broker that is being tortured too."""
_BROKER_S: Final = 180.0
"""Three nodes come back at once, beside everything that waits for them."""
_CALLS: Final = 1_000_000
_INSTANCE: Final = f"{PREFIX}INSTANCE"

Say = Callable[[str], None]
"""Told in a few words what goes on."""


@dataclass(slots=True)
class Rig:
    """What runs."""

    system: System
    folder: Path
    cluster: Cluster
    upstream: Upstream
    door: str
    keys: Mapping[Tenant, str]
    partitions: int
    """Of every topic that is keyed by conversation, and of those keyed by tenant."""
    static: bool
    """Whether each worker has a name of its own that stays: Kafka's static membership."""
    namespace: Namespace = Namespace()
    pools: dict[str, list[Child]] = field(init=False)
    _numbers: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self.pools = {stage: [] for stage in self.system.stages}

    def pids(self) -> list[tuple[str, int]]:
        """Every worker that runs: its stage and its pid."""
        return [(stage, child.pid) for stage, pool in self.pools.items() for child in pool if child.pid]

    async def add(self, stage: str, *, again_for_s: float = 0.0, twin_of: Child | None = None) -> Child:
        """Start one more worker of a stage; returns when it serves.

        `twin_of` another it has the same name in their group, if they have any. One that ends before it serves, such
        as without a broker, is started again for `again_for_s`: supervisors do. Raises ChildFailed.
        """
        name = f"{stage}-{next(self._numbers)}"
        command = self.system.worker(stage, self._place(name))
        child = Child(
            name=name,
            module=command.module,
            arguments=command.arguments,
            environment={**_others_environment(), **command.settings, **_name_in_group(twin_of)},
            log_file=self.folder / f"{name}.log",
            patience_s=START_S,
        )
        until = asyncio.get_running_loop().time() + again_for_s
        while True:
            try:
                await child.start()
            except ChildFailed:
                if asyncio.get_running_loop().time() > until:
                    raise
                await asyncio.sleep(_AGAIN_S)
            else:
                self.pools[stage].append(child)
                return child

    async def retire(self, stage: str, child: Child) -> None:
        """Stop one worker in good order, if it still works."""
        if child in self.pools[stage]:
            self.pools[stage].remove(child)
            await child.stop(_DRAIN_S + 7.0)

    async def stop(self) -> None:
        """Stop all workers: the door first, so that its clients are told."""
        for stage in reversed(self.system.stages):
            await asyncio.gather(*(self.retire(stage, child) for child in list(self.pools[stage])))

    def _place(self, name: str) -> Place:
        return Place(
            name,
            self.cluster.bootstrap,
            self.upstream.url,
            self.door,
            self.folder,
            self.partitions,
            _DRAIN_S,
            REMEMBERS_S,
            self.static,
        )


def _name_in_group(child: Child | None) -> dict[str, str]:
    name = child.environment.get(_INSTANCE) if child else None
    return {_INSTANCE: name} if name else {}


def _others_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


@asynccontextmanager
async def rig(
    folder: Path, nodes: int, say: Say, *, system: System, partitions: int = PARTITIONS, static: bool = False
) -> AsyncGenerator[Rig, None]:
    """Start everything, one worker a stage, and stop it again. Raises ChildFailed, KafkaChildError, LogError."""
    async with AsyncExitStack() as running:
        options = Options(nodes=nodes, start_timeout=_BROKER_S)
        say(f"starting Kafka with {nodes} node{'s' if nodes > 1 else ''}")
        cluster = await running.enter_async_context(Cluster(folder / "kafka", options))
        upstream = await running.enter_async_context(Upstream(keep=_CALLS))
        keys = {tenant: f"key-of-{tenant}-{os.urandom(8).hex()}" for tenant in TENANTS}
        await _furnish(cluster, nodes, partitions, keys)
        started = Rig(system, folder, cluster, upstream, f"http://{free_address()}", keys, partitions, static)
        running.push_async_callback(started.stop)
        say("starting the stages")
        async with asyncio.TaskGroup() as starting:
            for stage in system.stages:
                starting.create_task(started.add(stage))
        yield started


async def _furnish(cluster: Cluster, nodes: int, partitions: int, keys: Mapping[Tenant, str]) -> None:
    namespace = Namespace()
    await create_topics(cluster.bootstrap, namespace, Partitions(partitions, partitions), replication=nodes)
    log = await KafkaLog.open(KafkaOptions(cluster.bootstrap))
    try:
        # First what has a price: tenants get the prices that stand.
        route = priced_route(script(PRICED_TOKENS, PRICED_RATE))
        await publish(log, MODELS, PRICED, route, namespace)
        tenants = [configured(tenant, key) for tenant, key in keys.items()]
        await write_tenants(log, namespace, tenants, by="klatch torture")
    finally:
        await log.close()
