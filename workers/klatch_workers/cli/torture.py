"""`klatch torture`: klatch on a Kafka of its own under load and seeded faults, and what became of its promises.

Progress goes to stderr, the report to stdout; with `--json` its last line is one object. Exit codes: 0 nothing was
found, 1 a promise was broken, 2 misused.
"""

import asyncio
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from klatch_workers.torture.report import Report
    from klatch_workers.torture.run import Orders
    from klatch_workers.torture.schedule import Fault
    from klatch_workers.torture.system import System


@click.command()
@click.option("--nodes", type=click.Choice(["1", "3"]), default="1", show_default=True, help="Of the Kafka cluster.")
@click.option("--minutes", type=click.FloatRange(0.1, 24 * 60), default=2.0, show_default=True, help="Of load.")
@click.option("--seed", type=int, default=1, show_default=True, help="Makes the load and the faults.")
@click.option(
    "--requests-per-second", type=click.FloatRange(0.1, 1000), default=8.0, show_default=True, help="On average."
)
@click.option(
    "--schedule",
    "schedule_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Strike as this file says, not as the seed does.",
)
@click.option(
    "--system",
    "name",
    type=click.Choice(["klatch", "faststream", "faust"]),
    default="klatch",
    show_default=True,
    help="What is tortured: klatch, or for comparison a minimal worker on another framework.",
)
@click.option("--plain", is_flag=True, help="Ask only what any worker can answer; so a comparison always does.")
@click.option("--static", is_flag=True, help="Make workers static members of their groups: quick to come back.")
@click.option("--keep", is_flag=True, help="Keep Kafka's data and the logs of all workers.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def torture(  # noqa: PLR0913 - a command has the parameters that it has
    *,
    nodes: str,
    minutes: float,
    seed: int,
    requests_per_second: float,
    schedule_file: Path | None,
    name: str,
    plain: bool,
    static: bool,
    keep: bool,
    as_json: bool,
) -> None:
    """Kill, stop, restart and scale klatch's processes under load, then recount everything.

    Starts a Kafka of its own on this machine, all stages, and a model server that writes another text at every call.
    Believes only what it reads back from the log, and what its clients saw.
    """
    from klatch_workers.logs import configure_logs
    from klatch_workers.torture.run import Orders
    from klatch_workers.torture.schedule import from_json, schedule, to_json

    configure_logs("error")
    # Its own connections meet every fault, too: what they come to is counted in the report.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    # Of the model server, whose callers are killed while it writes.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    try:
        given = from_json(schedule_file.read_text()) if schedule_file else None
    except ValueError as error:
        raise click.UsageError(f"{schedule_file}: {error}") from error
    system = _system(name)
    plain = plain or system.bare
    faults = schedule(seed, minutes, int(nodes), plain=plain) if given is None else _possible(given, system)
    folder = Path(tempfile.mkdtemp(prefix="klatch-torture-"))
    (folder / "schedule.json").write_text(to_json(faults))
    orders = Orders(
        seed=seed,
        minutes=minutes,
        faults=faults,
        nodes=int(nodes),
        requests_per_second=requests_per_second,
        static=static,
        system=system,
        plain=plain,
    )
    _say(f"seed {seed}: {len(faults)} faults, in {folder / 'schedule.json'}")
    report = _run(folder, orders)
    _tell(report, orders, as_json=as_json)
    if keep or not report.passed:
        _say(f"kept: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(0 if report.passed else 1)


def _possible(faults: "Sequence[Fault]", system: "System") -> "Sequence[Fault]":
    return [fault for fault in faults if fault.target in {"", *system.stages}] if system.bare else faults


def _system(name: str) -> "System":
    from klatch_workers.torture.baselines.system import BASELINES
    from klatch_workers.torture.system import Klatch

    for baseline in BASELINES:
        if baseline.name == name:
            if not baseline.installed:
                raise click.ClickException(
                    f"{name} is not installed, and klatch does not need it. To compare, add it:\n"
                    f"    uv run --group baselines --extra local klatch torture --system {name}\n"
                    f"    pip install '{baseline.requirement}'"
                )
            return baseline
    return Klatch()


def _run(folder: Path, orders: "Orders") -> "Report":
    from klatch_workers.kafka import KafkaChildError
    from klatch_workers.torture.run import torture as run
    from klatch_workers.up.children import ChildFailed

    try:
        return asyncio.run(run(folder, orders, _say))
    except* (KafkaChildError, ChildFailed) as errors:
        raise click.ClickException(f"{_first(errors)}\n(see {folder})") from errors


def _first(errors: BaseExceptionGroup[Exception]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _tell(report: "Report", orders: "Orders", *, as_json: bool) -> None:
    for violation in report.violations:
        _say(f"{violation.kind}: {violation.request}: {violation.what} [{', '.join(violation.positions)}]")
    for what, recovery in report.recoveries.items():
        _say(f"recovered from {what} within {recovery.seconds:.1f} s: {recovery.request}")
    facts = {
        "system": orders.system.name,
        "seed": orders.seed,
        "nodes": orders.nodes,
        "minutes": orders.minutes,
        **report.facts(),
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:>18}  {value}")


def _say(what: str) -> None:
    click.echo(what, err=True)
