"""`klatch torture`: klatch on a Kafka of its own under load and seeded faults, and what became of its promises.

Progress goes to stderr, the report to stdout; with `--json` its last line is one object. Exit codes: 0 nothing was
found (of planted bugs: all were), 1 a promise was broken (a planted bug was missed), 2 misused, 3 the run could not be
made: of planted bugs any one of them, and none of the others was missed.
"""

import asyncio
import json
import logging
import shutil
import tempfile
import traceback
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from klatch_workers.torture.campaign import Shrunk, Verdict
    from klatch_workers.torture.mutants import Mutant
    from klatch_workers.torture.report import Report
    from klatch_workers.torture.run import Orders
    from klatch_workers.torture.schedule import Fault
    from klatch_workers.torture.system import System

T = TypeVar("T")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_RUN = "run.json"


class NotRun(click.ClickException):
    """The run could not be made, which says nothing about klatch's promises."""

    exit_code = 3


@click.command()
@click.option("--nodes", type=click.Choice(["1", "3"]), default="1", show_default=True, help="Of the Kafka cluster.")
@click.option("--minutes", type=click.FloatRange(0.1, 24 * 60), default=2.0, show_default=True, help="Of load.")
@click.option("--seed", type=int, default=1, show_default=True, help="Makes the load and the faults.")
@click.option(
    "--requests-per-second", type=click.FloatRange(0.1, 1000), default=8.0, show_default=True, help="On average."
)
@click.option("--schedule", "schedule_file", type=_FILE, help="Strike as this file says, not as the seed does.")
@click.option("--replay", type=_FILE, help="Run a saved run again; nothing else of a run can be said then.")
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
@click.option("--shrink", type=click.IntRange(1), metavar="N", help="If it fails, look for fewer faults in N runs.")
@click.option(
    "--mutants",
    metavar="all|list|NAME,…",
    help="Plant known bugs instead, one run each, and tell whether each was found; or list them. Only --schedule and "
    "--shrink say something about their runs.",
)
@click.option(
    "--unplanted", is_flag=True, help="With --mutants: the same load and faults without the bug; nothing may be found."
)
@click.option("--keep", is_flag=True, help="Keep Kafka's data and the logs of all workers.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def torture(
    *,
    shrink: int | None,
    mutants: str | None,
    unplanted: bool,
    keep: bool,
    as_json: bool,
    **run: Any,
) -> None:
    """Kill, stop, restart and scale klatch's processes under load, then recount everything.

    Starts a Kafka of its own on this machine, all stages, and a model server that writes another text at every call.
    Believes only what it reads back from the log, and what its clients saw.
    """
    from klatch_workers.logs import configure_logs

    configure_logs("error")
    # Its own connections meet every fault, too: what they come to is counted in the report.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    # Of the model server, whose callers are killed while it writes.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if mutants is not None:
        raise SystemExit(_plant(mutants, run["schedule_file"], shrink, unplanted=unplanted, as_json=as_json))
    if unplanted:
        raise click.UsageError("--unplanted goes with --mutants")
    raise SystemExit(_torture(_orders(**run), shrink, keep=keep, as_json=as_json))


def _orders(  # noqa: PLR0913 - a run has the parameters that it has
    *,
    nodes: str,
    minutes: float,
    seed: int,
    requests_per_second: float,
    schedule_file: Path | None,
    replay: Path | None,
    name: str,
    plain: bool,
    static: bool,
) -> "Orders":
    from klatch_workers.torture import saved
    from klatch_workers.torture.run import Orders
    from klatch_workers.torture.schedule import schedule

    try:
        if replay:
            return replace(saved.from_json(replay.read_text()), system=_system(name))
        given = saved.faults_in(schedule_file.read_text()) if schedule_file else None
    except ValueError as error:
        raise click.UsageError(f"{replay or schedule_file}: {error}") from error
    system = _system(name)
    plain = plain or system.bare
    return Orders(
        seed=seed,
        minutes=minutes,
        faults=schedule(seed, minutes, int(nodes), plain=plain) if given is None else _possible(given, system),
        nodes=int(nodes),
        requests_per_second=requests_per_second,
        static=static,
        system=system,
        plain=plain,
    )


def _possible(faults: "Sequence[Fault]", system: "System") -> "Sequence[Fault]":
    return [fault for fault in faults if fault.target in {"", *system.stages}] if system.bare else faults


def _system(name: str) -> "System":
    from klatch_workers.torture.baselines.system import BASELINES
    from klatch_workers.torture.system import Klatch

    for baseline in BASELINES:
        if baseline.name == name:
            if not baseline.installed:
                raise NotRun(
                    f"{name} is not installed, and klatch does not need it. To compare, add it:\n"
                    f"    uv run --group baselines --extra local klatch torture --system {name}\n"
                    f"    pip install '{baseline.requirement}'"
                )
            return baseline
    return Klatch()


def _torture(orders: "Orders", shrink: int | None, *, keep: bool, as_json: bool) -> int:
    from klatch_workers.torture import saved
    from klatch_workers.torture.run import torture as run

    folder = Path(tempfile.mkdtemp(prefix="klatch-torture-"))
    (folder / _RUN).write_text(saved.to_json(orders))
    _say(f"seed {orders.seed}: {len(orders.faults)} faults, in {folder / _RUN}")
    report = _run(run(folder, orders, _say), folder)
    _tell(report, orders, as_json=as_json)
    if report.passed:
        if keep:
            _say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return 0
    _say(f"kept: {folder}\nto run it again: klatch torture --replay {folder / _RUN}")
    if shrink and report.violations:
        _shrink(orders, report, shrink, folder)
    # Where nothing was accepted nothing could be broken either.
    return 1 if report.violations else NotRun.exit_code


def _shrink(orders: "Orders", report: "Report", most: int, folder: Path) -> None:
    from klatch_workers.torture.campaign import smallest_failing

    shrunk = _run(smallest_failing(orders, report, most, _say), folder)
    found = ", ".join(sorted({violation.kind for violation in report.violations}))
    path = folder / "shrunk.json"
    _save(shrunk, orders.faults, found, path)
    _say(
        f"to run them again: klatch torture --replay {path}\n"
        "to keep them as a test: say in `about` what they show, and copy the file into tests/broker/regressions"
    )


def _save(shrunk: "Shrunk", of: "Sequence[Fault]", found: str, path: Path) -> None:
    from klatch_workers.torture import saved

    left = len(shrunk.orders.faults)
    path.write_text(saved.to_json(shrunk.orders, f"{found}; {left} faults of {len(of)}"))
    _say(f"{left} of {len(of)} faults still fail, after {shrunk.runs} runs: {path}")


def _run(work: Coroutine[Any, Any, T], folder: Path) -> T:
    """Raises NotRun, if a part did not start, or the kit itself failed: then the traceback says where."""
    from klatch_streams.log import LogError
    from klatch_workers.kafka import KafkaChildError
    from klatch_workers.up.children import ChildFailed

    try:
        return asyncio.run(work)
    except Exception as error:
        # Whatever it is, it is no broken promise of klatch.
        failed = _first(error)
        if not isinstance(failed, KafkaChildError | ChildFailed | LogError):
            traceback.print_exception(error)
        raise NotRun(f"{type(failed).__name__}: {failed}\n(see {folder})") from error


def _first(error: Exception) -> Exception:
    return (
        _first(cast("ExceptionGroup[Exception]", error).exceptions[0]) if isinstance(error, ExceptionGroup) else error
    )


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


# --- planted bugs ----------------------------------------------------------------------------------------------------


def _plant(asked: str, schedule_file: Path | None, shrink: int | None, *, unplanted: bool, as_json: bool) -> int:
    from klatch_workers.torture import saved
    from klatch_workers.torture.campaign import Verdict
    from klatch_workers.torture.mutants import mutants

    known = {mutant.name: mutant for mutant in mutants()}
    if asked == "list":
        for mutant in known.values():
            click.echo(f"{mutant.name:>27}  {mutant.breaks}")
        return 0
    names = list(known) if asked == "all" else [name.strip() for name in asked.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"no such mutant: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name].unplanted() if unplanted else known[name] for name in names]
    if schedule_file:
        try:
            faults = saved.faults_in(schedule_file.read_text())
        except ValueError as error:
            raise click.UsageError(f"{schedule_file}: {error}") from error
        chosen = [replace(mutant, faults=faults) for mutant in chosen]
    verdicts, not_run = list[Verdict](), list[str]()
    for mutant in chosen:
        try:
            verdicts.append(_hunt(mutant, shrink or 0))
        except NotRun as error:
            # What the others came to is worth more than to end here.
            _say(f"{mutant.name} was not run: {error.message}")
            not_run.append(mutant.name)
    click.echo("\n".join([*map(_line, verdicts), *(f"{name:>27}  not run" for name in not_run)]))
    missed = [one.mutant.name for one in verdicts if not one.as_meant]
    if as_json:
        facts = [{"name": one.mutant.name, "counts": one.counts, "seconds": one.seconds} for one in verdicts]
        click.echo(json.dumps({"mutants": facts, "missed": missed, "not_run": not_run}))
    return 1 if missed else NotRun.exit_code if not_run else 0


def _hunt(mutant: "Mutant", shrink: int) -> "Verdict":
    from klatch_workers.torture.campaign import hunt
    from klatch_workers.torture.mutants import MutantLost

    _say(f"--- {mutant.name}: {mutant.breaks}")
    try:
        verdict = _run(hunt(mutant, _say, shrink), Path(tempfile.gettempdir()))
    except MutantLost as error:
        raise NotRun(str(error)) from error
    _say(_line(verdict))
    if verdict.shrunk:
        path = Path(tempfile.mkdtemp(prefix="klatch-torture-")) / f"{mutant.name}.json"
        _save(verdict.shrunk, mutant.faults, ", ".join(verdict.counts), path)
        _say(f"to run them again: klatch torture --mutants {mutant.name} --schedule {path}")
    return verdict


def _line(verdict: "Verdict") -> str:
    found = ", ".join(f"{kind} {number}" for kind, number in verdict.counts.items())
    if verdict.mutant.control:
        found = f"FOUND WITHOUT A BUG: {found}" if found else "nothing found"
    elif not found:
        found = "MISSED"
    return f"{verdict.mutant.name:>27}  {verdict.seconds:6.1f} s  {found}"


def _say(what: str) -> None:
    click.echo(what, err=True)
