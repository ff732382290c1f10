"""Everything that a benchmark needs, started on free ports in a folder of its own and stopped again.

One Kafka node with the whole JIT, the scripted model server, the bare relays, and klatch as `klatch up` runs it. Kafka
is ours here, because a cluster for users starts with half of the JIT.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from os import environ
from pathlib import Path

from klatch_workers.bench import peer as peers
from klatch_workers.bench import relay
from klatch_workers.bench.client import Target
from klatch_workers.bench.report import BROKER, DIRECT, KLATCH, PEER, RELAY
from klatch_workers.kafka import Cluster, Options
from klatch_workers.settings import PREFIX, read_settings
from klatch_workers.up.children import Child
from klatch_workers.up.everything import STAGES, Everything, Wanted, everything

Say = Callable[[str], None]
"""Told in a few words what goes on."""

MODEL = "fake"


@dataclass(slots=True)
class Rig:
    """What runs."""

    folder: Path
    cluster: Cluster
    upstream: Child
    klatch: Everything
    front: Child
    back: Child
    peer: peers.Peer | None = None

    @property
    def targets(self) -> dict[str, Target]:
        """The sides that answer over HTTP."""
        sides = {
            DIRECT: Target(DIRECT, str(self.upstream.facts["url"])),
            KLATCH: Target(KLATCH, f"{self.klatch.children['http'].facts['url']}/v1", self.klatch.keys.api),
            RELAY: Target(RELAY, str(self.front.facts["url"])),
        }
        return {**sides, PEER: self.peer.target} if self.peer else sides

    def pids(self) -> dict[str, int]:
        """All processes by name."""
        return {
            BROKER: self.cluster.nodes[0].pid or 0,
            "upstream": self.upstream.pid,
            "front": self.front.pid,
            "back": self.back.pid,
            **{name: self.klatch.children[name].pid for name in STAGES},
            **({PEER: self.peer.pid} if self.peer else {}),
        }

    def processes(self, side: str) -> Sequence[str]:
        """The processes that a side consists of, without the broker and the model server."""
        return {KLATCH: STAGES, RELAY: ("front", "back"), PEER: (PEER,)}.get(side, ())


@asynccontextmanager
async def rig(
    folder: Path, say: Say, *, profile: Sequence[str] = (), peer_cache: Path | None = None
) -> AsyncGenerator[Rig, None]:
    """Start everything; with `peer_cache`, LiteLLM's proxy as well, from there. Raises ChildFailed, KafkaChildError,
    LogError, PeerFailed."""
    async with AsyncExitStack() as running:
        say("starting Kafka, the model server and the bare relays")
        upstream = await running.enter_async_context(model_server(folder))
        cluster = await running.enter_async_context(Cluster(folder / "kafka", Options(fast_start=False)))
        await relay.create_topics(cluster.bootstrap)
        relays = [
            _relay(folder, "front", cluster.bootstrap),
            _relay(folder, "back", cluster.bootstrap, "--model-url", str(upstream.facts["url"])),
            *(
                _relay(folder, "hop", cluster.bootstrap, "--source", source, "--target", target)
                for source, target in zip(relay.HOPS, relay.HOPS[1:], strict=False)
            ),
        ]
        for child in relays:
            await child.start()
            running.push_async_callback(child.stop, 3.0)
        say("starting klatch")
        settings = read_settings(
            kafka=cluster.bootstrap,
            data=folder / "klatch",
            http="127.0.0.1:0",
            model_url=str(upstream.facts["url"]),
            # What streams may still do when a benchmark stops interests nobody.
            drain_s=1.0,
        )
        klatch = await running.enter_async_context(
            everything(settings, Wanted(kafka=cluster.bootstrap), lambda _event, _facts: None)
        )
        for stage in profile:
            await _profile(klatch, stage, folder)
        peer = None
        if peer_cache:
            say("installing and starting LiteLLM's proxy")
            peer = await peers.litellm(folder, peer_cache, MODEL, str(upstream.facts["url"]))
            await running.enter_async_context(peer.running())
        yield Rig(folder, cluster, upstream, klatch, relays[0], relays[1], peer)


@asynccontextmanager
async def model_server(folder: Path) -> AsyncGenerator[Child, None]:
    """The scripted model server as a process of its own; `facts["url"]` is where."""
    upstream = _child(folder, "upstream", "klatch_agents.testing.upstream", "--json")
    await upstream.start()
    try:
        yield upstream
    finally:
        await upstream.stop(3.0)


def _relay(folder: Path, what: str, bootstrap: str, *arguments: str) -> Child:
    return _child(folder, what, "klatch_workers.bench.relay", what, "--bootstrap", bootstrap, *arguments)


def _child(folder: Path, name: str, module: str, *arguments: str) -> Child:
    ours = {key: value for key, value in environ.items() if not key.startswith(PREFIX)}
    return Child(name, module, arguments, ours, folder / f"{name}.log")


async def _profile(klatch: Everything, stage: str, folder: Path) -> None:
    """Run a stage again, under the profiler."""
    plain = klatch.children[stage]
    await plain.stop(5.0)
    profiled = Child(
        stage,
        "klatch_workers.bench.profiled",
        (str(profile_file(folder, stage)), *plain.arguments),
        plain.environment,
        plain.log_file,
        begin=plain.begin,
    )
    await profiled.start()
    klatch.children[stage] = profiled


def profile_file(folder: Path, stage: str) -> Path:
    """Where a profiled stage writes what it saw."""
    return folder / f"{stage}.profile.json"
