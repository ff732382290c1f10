"""`klatch bench`: measure klatch on this machine, beside baselines of the same run.

It needs nothing that runs already: Kafka, a scripted model server and klatch are started on free ports in a temporary
folder, and stopped. It ends with 0 whatever the figures are; a busy machine is named, not refused.
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from klatch_workers.logs import configure_logs
from klatch_workers.settings import read_settings, what_is_wrong
from klatch_workers.up.everything import STAGES

T = TypeVar("T")


@click.command()
@click.option("--quick", is_flag=True, help="About two minutes instead of about five: fewer turns, rougher figures.")
@click.option(
    "--peer",
    type=click.Choice(["litellm"]),
    help="Also run another proxy as a side: LiteLLM's, installed into an environment of its own in klatch's cache. "
    "Eight to nine minutes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON report to a file.")
@click.option(
    "--doc",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also write the tables into a page, between its two marks.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: show the JSON report of an earlier run.",
)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Work in this folder, and keep it.")
@click.option(
    "--profile",
    "stages",
    multiple=True,
    type=click.Choice(STAGES),
    help="Measure nothing: show where this stage's CPU time goes under load.",
)
def bench(  # noqa: PLR0913, PLR0917 - click hands over every option
    quick: bool,
    peer: str | None,
    as_json: bool,
    out: Path | None,
    doc: Path | None,
    source: Path | None,
    keep: Path | None,
    stages: tuple[str, ...],
) -> None:
    """Measure klatch on this machine against baselines in the same run.

    Time to first token, CPU a chunk, throughput, memory, start and recovery, beside calling the same model server
    directly and beside bare relays through the same Kafka.
    """
    from klatch_workers.bench import machine, render
    from klatch_workers.bench.load import Paced
    from klatch_workers.bench.profile import profile
    from klatch_workers.bench.report import Report
    from klatch_workers.bench.run import FULL, QUICK, measure
    from klatch_workers.kafka.places import Places

    configure_logs("warning")
    if source:
        report = msgspec.json.decode(source.read_bytes(), type=Report)
    else:
        try:
            read_settings()  # those of what it starts, minutes later
        except ValueError as error:
            raise click.UsageError(what_is_wrong(error)) from error
        if machine.is_busy(machine.load()):
            click.echo(f"The load average is {machine.load():.1f}: take ratios, not figures, from this run.", err=True)
        with _folder(keep) as folder:
            if stages:
                load = Paced(64, 50.0, 5.0 if quick else 15.0)
                click.echo(_run(profile(folder, stages, load, _say)))
                return
            cache = Places.from_environ().cache / "bench" if peer else None
            report = _run(measure(folder, QUICK if quick else FULL, _say, cache))
    raw = msgspec.json.format(msgspec.json.encode(report))
    if out:
        out.write_bytes(raw + b"\n")
    if doc:
        render.write_into(doc, report)
    click.echo(raw.decode() if as_json else render.text(report))


def _say(what: str) -> None:
    click.echo(f"  {what} …", err=True)


@contextlib.contextmanager
def _folder(keep: Path | None) -> Generator[Path]:
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="klatch-bench-") as folder:
            yield Path(folder)


def _run(work: Coroutine[None, None, T]) -> T:
    from klatch_streams.log import LogError
    from klatch_workers.bench.client import ReplyFailed
    from klatch_workers.bench.peer import PeerFailed
    from klatch_workers.kafka import KafkaChildError
    from klatch_workers.up.children import ChildFailed

    try:
        return asyncio.run(work)
    except (ChildFailed, KafkaChildError, LogError, PeerFailed, ReplyFailed, OSError, TimeoutError) as error:
        click.echo(f"klatch bench: {str(error) or type(error).__name__}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
