"""A cluster's data folder: what it is, which ports it had, whether it may be used. Touches no process.

DATA/cluster.json             cluster id, Kafka's version, ports of every node
DATA/node-N/server.properties written anew at every start
DATA/node-N/data/             Kafka's log.dirs, formatted once
DATA/node-N/kafka.log         the broker's log; console.log what the JVM itself said
DATA/node-N/kafka.pid         the broker's process, valid only if its command line says so too
"""

import base64
import json
import random
import shutil
import socket
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from klatch_workers.kafka.errors import DataFolderError
from klatch_workers.kafka.jars import KAFKA_VERSION
from klatch_workers.kafka.properties import HOST, Options, Ports

_RECORD = "cluster.json"
LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Layout:
    """What `cluster.json` says."""

    cluster_id: str
    ports: tuple[Ports, ...]


def read_layout(data: Path) -> Layout | None:
    """None for a folder that is not there, or empty. Raises `DataFolderError`."""
    try:
        record = json.loads((data / _RECORD).read_bytes())
        return Layout(record["cluster_id"], tuple(Ports(**ports) for ports in record["ports"]))
    except FileNotFoundError:
        if data.is_dir() and any(each.name != LOCK for each in data.iterdir()):
            raise DataFolderError(f"{data} is not empty and holds no Kafka of klatch's. Name another folder.") from None
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataFolderError(
            f"{data / _RECORD} cannot be read ({error}). Put it back from a copy, or name another folder."
        ) from error


def settle_layout(data: Path, options: Options) -> Layout:
    """Decide on id and ports and write them down. Raises `DataFolderError`."""
    old = read_layout(data)
    if old is not None and len(old.ports) != options.nodes:
        raise DataFolderError(
            f"{data} holds a cluster with {len(old.ports)} node(s), {options.nodes} asked for. Start "
            f"it with --nodes {len(old.ports)}, name another folder, or wipe this one."
        )
    layout = Layout(old.cluster_id if old else _new_id(), _ports(old, options))
    data.mkdir(parents=True, exist_ok=True)
    record = {
        "cluster_id": layout.cluster_id,
        "kafka": KAFKA_VERSION,
        "ports": [asdict(ports) for ports in layout.ports],
    }
    fresh = data / f"{_RECORD}.new"
    fresh.write_text(json.dumps(record, indent=1))
    fresh.replace(data / _RECORD)
    return layout


def wipe(data: Path) -> None:
    """Remove what klatch made in `data`, nothing else; the folder too, if that leaves it empty."""
    for node in data.glob("node-[0-9]*"):
        shutil.rmtree(node)
    # Last: without this record the rest would be taken for somebody else's.
    for name in (f"{_RECORD}.new", _RECORD, LOCK):
        (data / name).unlink(missing_ok=True)
    if not any(data.iterdir()):
        data.rmdir()


def _new_id() -> str:
    """Kafka's kind of cluster id: a random uuid in 22 characters of URL-safe base 64."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()


def is_formatted(log_dir: Path, node: int, cluster_id: str) -> bool:
    """Raises `DataFolderError` when it was formatted as part of another cluster."""
    try:
        lines = (log_dir / "meta.properties").read_text().splitlines()
    except FileNotFoundError:
        return False
    meta = dict(line.split("=", 1) for line in lines if "=" in line)
    if (meta.get("cluster.id"), meta.get("node.id")) != (cluster_id, str(node)):
        raise DataFolderError(
            f"{log_dir} belongs to node {meta.get('node.id')} of cluster {meta.get('cluster.id')}, "
            f"not to node {node} of {cluster_id}. Folders were mixed: put the right one back, or "
            "name another data folder."
        )
    return True


def _ports(old: Layout | None, options: Options) -> tuple[Ports, ...]:
    if options.port is not None:
        clients = range(options.port, options.port + options.nodes)
        controllers = _old_controllers(old) or free_ports(options.nodes, clients)
        return tuple(Ports(*pair) for pair in zip(clients, controllers, strict=True))
    if old is not None and (options.keep_ports or _all_free(old)):
        return old.ports
    free = free_ports(2 * options.nodes)
    return tuple(Ports(*pair) for pair in zip(free[::2], free[1::2], strict=True))


def _old_controllers(old: Layout | None) -> list[int]:
    controllers = [each.controller for each in old.ports] if old else []
    return controllers if all(map(is_free, controllers)) else []


def _all_free(old: Layout) -> bool:
    return all(is_free(each.client) and is_free(each.controller) for each in old.ports)


# Below the ranges that Linux (32768-) and macOS (49152-) take for outgoing connections: a node that
# is restarted must not find its port in the hands of somebody's client.
_CANDIDATES = range(20_000, 32_000)


def free_ports(count: int, taken: Collection[int] = (), among: range = _CANDIDATES) -> list[int]:
    """So many that differ and were free a moment ago. Raises DataFolderError."""
    chosen: list[int] = []
    for port in random.sample(among, len(among)):
        if port not in taken and is_free(port):
            chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise DataFolderError(f"there are no {count} free ports between {among.start} and {among.stop} on {HOST}")


def is_free(port: int) -> bool:
    with socket.socket() as trial:
        # As Java binds: what lingers in TIME_WAIT from the last start is no obstacle.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError:
            return False
        return True
