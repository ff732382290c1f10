"""`klatch kafka`: a Kafka of one or three nodes on this machine, without Docker, that stays when we go.

Exit codes: 0 done (also when there was nothing to do), 1 failed, 2 misused, 3 `status` found no
running cluster. With `--json` each command prints one object; progress goes to stderr.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

import click

from klatch_workers.kafka import Cluster, Fetched, KafkaChildError, Options
from klatch_workers.settings import read_settings, what_is_wrong

P = ParamSpec("P")

_NOT_RUNNING = 3


@click.group()
def kafka() -> None:
    """Start, stop and wipe an Apache Kafka on this machine."""


class Voice:
    """Says things to a person, or as one JSON object to a program."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, text: str, **fields: object) -> None:
        click.echo(json.dumps(fields) if self.as_json else text)

    def progress(self, fetched: Fetched) -> None:
        """One line that is rewritten on a terminal, else one line in ten jars."""
        line = f"fetching Kafka: {fetched.jars} of {fetched.total} jars, {fetched.bytes / 1e6:.1f} MB"
        if sys.stderr.isatty():
            click.echo(f"\r{line}", nl=fetched.jars == fetched.total, err=True)
        elif fetched.jars % 10 == 0 and fetched.jars != self._last:
            self._last = fetched.jars
            click.echo(line, err=True)

    _last = 0


def _klatch_ups() -> Path:
    try:
        return read_settings().data / "kafka"
    except ValueError as error:
        raise click.UsageError(what_is_wrong(error)) from error


def _command(
    body: Callable[Concatenate[Voice, Path, P], Coroutine[None, None, int]],
) -> Callable[Concatenate[bool, Path, P], None]:
    """The options and the errors that every command here has; `body` returns the exit code."""

    @kafka.command(name=body.__name__, help=body.__doc__)
    @click.option(
        "--data",
        type=click.Path(file_okay=False, path_type=Path),
        default=_klatch_ups,
        help="Its data folder.  [default: kafka in KLATCH_DATA, which is the one of `klatch up`]",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @wraps(body)
    def command(as_json: bool, data: Path, *args: P.args, **kwargs: P.kwargs) -> None:
        voice = Voice(as_json)
        try:
            sys.exit(asyncio.run(body(voice, data, *args, **kwargs)))
        except KafkaChildError as error:
            if as_json:
                voice.say("", error=type(error).__name__, message=str(error))
                sys.exit(1)
            raise click.ClickException(str(error)) from error

    return command


def _describe(cluster: Cluster) -> dict[str, object]:
    return {
        "running": cluster.running,
        "bootstrap": cluster.bootstrap,
        "data": str(cluster.data),
        "nodes": [{"id": n.id, "port": n.port, "pid": n.pid, "log": str(n.log)} for n in cluster.nodes],
    }


@_command
@click.option("--nodes", type=click.Choice(["1", "3"]), help="[default: 1, or what the data has]")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the first node; the next follow.")
@click.option("--foreground", is_flag=True, help="Stay, and end the cluster when this command ends.")
@click.option("--heap", default="256m", show_default=True, help="Of each node's JVM.")
async def start(voice: Voice, data: Path, nodes: str | None, port: int | None, foreground: bool, heap: str) -> int:
    """Start a cluster, the first time in a new data folder, and print its bootstrap address."""
    found = Cluster.find(data)
    if found is not None and all(node.pid is not None for node in found.nodes):
        voice.say(f"already running at {found.bootstrap}", already=True, **_describe(found))
        return 0
    count = int(nodes) if nodes else len(found.nodes) if found else 1
    options = Options(nodes=count, port=port, keep_ports=True, heap=heap, leash=foreground)
    cluster = Cluster(data, options, progress=voice.progress)
    if foreground:
        return await _stay(voice, cluster)
    await cluster.start()
    _say_started(voice, cluster)
    return 0


def _say_started(voice: Voice, cluster: Cluster) -> None:
    fields = {"already": False, "seconds": round(cluster.started_in, 2), **_describe(cluster)}
    voice.say(f"Kafka answers at {cluster.bootstrap} after {cluster.started_in:.1f} s", **fields)


async def _stay(voice: Voice, cluster: Cluster) -> int:
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with cluster:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked_to_end.set)
        _say_started(voice, cluster)
        end = asyncio.create_task(asked_to_end.wait())
        failure = asyncio.create_task(cluster.failed())
        await asyncio.wait({end, failure}, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
        failure.cancel()
    return 0


@_command
@click.option("--grace", default=15.0, show_default=True, help="Seconds until a node is killed.")
async def stop(voice: Voice, data: Path, grace: float) -> int:
    """Stop the cluster of the data folder, whoever started it."""
    cluster = Cluster.find(data)
    if cluster is None or not cluster.running:
        voice.say("not running", stopped=False)
        return 0
    await cluster.stop(grace)
    voice.say("stopped", stopped=True)
    return 0


@_command
async def status(voice: Voice, data: Path) -> int:
    """Say whether the cluster of the data folder runs, and where."""
    cluster = Cluster.find(data)
    if cluster is None:
        voice.say(f"there is no cluster in {data}", running=False, nodes=[])
        return _NOT_RUNNING
    lines = [cluster.bootstrap if cluster.running else "not running"]
    lines += [f"node {n.id}: port {n.port}, " + (f"pid {n.pid}" if n.pid else "not running") for n in cluster.nodes]
    voice.say("\n".join(lines), **_describe(cluster))
    return 0 if cluster.running else _NOT_RUNNING


@_command
@click.option("--yes", is_flag=True, help="Do not ask.")
async def wipe(voice: Voice, data: Path, yes: bool) -> int:
    """Remove the data of a stopped cluster for good."""
    cluster = Cluster.find(data)
    if cluster is None:
        voice.say("nothing to wipe", wiped=False)
        return 0
    if not yes and voice.as_json:
        raise click.UsageError("--json cannot ask: add --yes")
    if not yes:
        click.confirm(f"Remove all topics and records in {cluster.data}?", abort=True)
    await cluster.wipe()
    voice.say("wiped", wiped=True)
    return 0
