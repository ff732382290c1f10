"""`klatch topics`: create klatch's topics, describe them, and check them against the table.

Exit codes: 0 done and in order, 1 something differs (or failed), 2 misused, 3 Kafka cannot be reached.
"""

import json
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from klatch_schemas.topics import Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.topic_admin import Described, Partitions, check_topics, create_topics, describe_topics
from klatch_workers.cli.context import Context, log_options, perform
from klatch_workers.http.request_ids import MAX_PARTITIONS

_STARTUP_S = 3.0


@dataclass(frozen=True, slots=True)
class Target:
    """Whose topics, where."""

    kafka: KafkaOptions
    namespace: Namespace
    as_json: bool


@click.group()
def topics() -> None:
    """Create, describe and check klatch's topics."""


def _command(body: Callable[..., Coroutine[Any, Any, int]]) -> Callable[..., None]:
    """The options and errors of every command here; `body` returns the exit code."""

    @topics.command(name=body.__name__, help=body.__doc__)
    @log_options
    @wraps(body)
    def command(kafka: str | None, namespace: str | None, data: Path | None, as_json: bool, **rest: Any) -> None:
        async def work() -> int:
            context = Context.read(kafka=kafka, namespace=namespace, data=data)
            options = KafkaOptions(context.bootstrap, startup_s=_STARTUP_S)
            return await body(Target(options, context.namespace, as_json), **rest)

        perform(work, as_json=as_json)

    return command


def _nameable(_: click.Context, __: click.Parameter, count: int | None) -> int | None:
    if count is not None and count > MAX_PARTITIONS:
        raise click.BadParameter(
            f"no door serves more than {MAX_PARTITIONS:,} partitions: a request's id names its own in 12 bits"
        )
    return count


_partitions = click.option(
    "--partitions",
    type=click.IntRange(1),
    callback=_nameable,
    help="Partitions of topics keyed by conversation, person or tenant; fixed once they are created.",
)


@_command
@_partitions
@click.option("--replication", type=click.IntRange(1, 10), default=1, show_default=True, help="Copies of each.")
async def create(target: Target, partitions: int | None, replication: int) -> int:
    """Create the topics that are missing (8 partitions if nothing is said); change none that exists."""
    wanted = Partitions(partitions, partitions) if partitions else None
    made = await create_topics(target.kafka, target.namespace, wanted, replication=replication)
    problems = await check_topics(target.kafka, target.namespace, wanted)
    if target.as_json:
        click.echo(json.dumps({"created": made, "problems": [asdict(problem) for problem in problems]}))
    else:
        click.echo("\n".join(f"created {name}" for name in made) or "all topics exist")
        for problem in problems:
            click.echo(problem.says, err=True)
    return 1 if problems else 0


@_command
async def describe(target: Target) -> int:
    """Show the topics as they are on the cluster."""
    described = await describe_topics(target.kafka, target.namespace)
    if target.as_json:
        click.echo(json.dumps({"topics": [_facts(found) for found in described]}))
    else:
        for found in described:
            size = "missing" if found.partitions is None else f"{found.partitions}x{found.replication}"
            settings = " ".join(f"{key}={found.config.get(key)}" for key in found.topic.config if found.config)
            click.echo(f"{found.name:<28} {found.topic.partitioning:<13} {size:<9} {settings}".rstrip())
    return 0


@_command
@_partitions
async def check(target: Target, partitions: int | None) -> int:
    """Say what differs from klatch's topic table, and how to change it."""
    wanted = Partitions(partitions, partitions) if partitions else None
    problems = await check_topics(target.kafka, target.namespace, wanted)
    if target.as_json:
        click.echo(json.dumps({"ok": not problems, "problems": [asdict(problem) for problem in problems]}))
    else:
        click.echo("\n".join(problem.says for problem in problems) or "all topics are as they should be")
    return 1 if problems else 0


def _facts(found: Described) -> dict[str, object]:
    config = {key: found.config.get(key) for key in found.topic.config} if found.config else {}
    return {
        "topic": found.name,
        "partitioning": found.topic.partitioning,
        "partitions": found.partitions,
        "replication": found.replication,
        "config": config,
    }
