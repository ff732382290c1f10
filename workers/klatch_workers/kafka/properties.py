"""What a node is told: Kafka's settings for a small cluster on loopback, and the JVM's arguments.

Everything here can be overridden by `Options.properties`, by Kafka's own names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
_LOGGING = Path(__file__).with_name("log4j2.properties")


@dataclass(frozen=True, slots=True)
class Ports:
    """Where one node listens."""

    client: int
    controller: int


@dataclass(frozen=True, slots=True)
class Options:
    """How a cluster is run. The defaults start quickly and small."""

    nodes: int = 1  # 1, or 3: replication 3 with two in-sync replicas, so that one may fail
    port: int | None = None  # of the first node; the next ones follow it. None: free ports
    keep_ports: bool = False  # insist on the ports of the last start, instead of preferring them
    fast_start: bool = True  # half of the JIT: 0.5 s sooner up; False for benchmarks
    heap: str = "256m"
    properties: Mapping[str, str] = field(default_factory=dict[str, str])
    start_timeout: float = 60.0  # seconds
    leash: bool = True  # False: the broker outlives us

    def __post_init__(self) -> None:
        if self.nodes not in {1, 3}:
            raise ValueError(f"a cluster has 1 or 3 nodes, not {self.nodes}")


def server_properties(node: int, ports: Sequence[Ports], logs: Path, extra: Mapping[str, str]) -> str:
    """The text of node `node`'s (from 1) server.properties."""
    own = ports[node - 1]
    replicas = str(len(ports))
    in_sync = str(1 if len(ports) == 1 else 2)
    settings = {
        "process.roles": "broker,controller",
        "node.id": str(node),
        "controller.quorum.voters": ",".join(
            f"{number}@{HOST}:{each.controller}" for number, each in enumerate(ports, 1)
        ),
        "listeners": f"PLAINTEXT://{HOST}:{own.client},CONTROLLER://{HOST}:{own.controller}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{own.client}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": str(logs),
        # A topic that nobody declared is a mistake that must be seen.
        "auto.create.topics.enable": "false",
        "default.replication.factor": replicas,
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": replicas,
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": in_sync,
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": in_sync,
        "share.coordinator.state.topic.num.partitions": "4",
        # Nobody else is about to join: the default waits 3 s for more members.
        "group.initial.rebalance.delay.ms": "0",
        # Tests want a dead member noticed sooner than Kafka's floor of 6 s allows.
        "group.min.session.timeout.ms": "1000",
        # The cleaner allocates this at start: the default is 128 MB, half of our heap.
        "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
    }
    if len(ports) == 1:
        # A node that was killed may register again only when its old session has ended, and nobody
        # else is there to take over: 6 s from a crash to an answer instead of the 13 of Kafka's 9 s.
        settings["broker.session.timeout.ms"] = "3000"
        settings["broker.heartbeat.interval.ms"] = "500"
    settings.update(extra)
    # A backslash escapes in this format, and a path may hold one.
    return "".join(f"{key}={value.replace(chr(92), chr(92) * 2)}\n" for key, value in settings.items())


@dataclass(frozen=True, slots=True)
class Program:
    """The Java command that every node of a cluster shares."""

    java: Path
    major: int
    jars: Path
    options: Options

    def broker(self, config: Path, log: Path) -> list[str]:
        return [*self._java(log), *self._tuning(), "kafka.Kafka", str(config)]

    def formatter(self, config: Path, log: Path, cluster_id: str) -> list[str]:
        # One id in 64 begins with a dash: as an argument of its own it would be taken for an option.
        tool = ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(config)]
        return [*self._java(log), "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", *tool]

    def _java(self, log: Path) -> list[str]:
        return [
            str(self.java),
            "-cp",
            f"{self.jars}/*",
            f"-Dlog4j2.configurationFile={_LOGGING}",
            f"-Dklatch.kafka.log={log}",
            "-Djava.awt.headless=true",
            *(_QUIET if self.major >= 24 else ()),
        ]

    def _tuning(self) -> list[str]:
        common = [f"-Xmx{self.options.heap}", "-XX:+ExitOnOutOfMemoryError"]
        if self.options.fast_start:
            return [*common, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        return [*common, "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20"]


# Newer Java warns of what Kafka's libraries (zstd, snappy, lz4) still do.
_QUIET = ("--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow")
