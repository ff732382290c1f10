"""`klatch redrive`: shows dead letters, and writes their records back to where they came from.

Without `--yes` nothing is written. Exit codes: 0 done (also when there was nothing to do), 1 a letter could not be
redriven, 2 misused, 3 Kafka cannot be reached.
"""

import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import click

from klatch_schemas.topics import Namespace
from klatch_streams.log import Log, LogError
from klatch_workers.cli.context import (
    FAILED,
    UNREACHABLE,
    Command,
    CommandFailed,
    Context,
    kafka_options,
    opened_log,
    perform,
    say_json,
    shared_options,
)
from klatch_workers.redrive.answers import answers
from klatch_workers.redrive.letters import Progress, Wanted, read_letters
from klatch_workers.redrive.perform import redrive as write_back
from klatch_workers.redrive.plan import MAX_REDRIVES, Judgement, Policy, State, judge

_UNITS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_COLORS: Final[dict[State, str]] = {"ready": "cyan", "redriven": "green", "answered": "green", "failed": "red"}


class Time(click.ParamType):
    """A time as milliseconds since the epoch."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`90s`, `30m`, `2h` or `7d` ago, or ISO 8601; without a zone it is this machine's."""
        if isinstance(value, int):
            return value
        if ago := re.fullmatch(r"(\d{1,9})([smhd])", value):
            return time.time_ns() // 1_000_000 - int(ago[1]) * _UNITS[ago[2]]
        try:
            return int(datetime.fromisoformat(value).astimezone().timestamp() * 1000)
        except ValueError:
            self.fail(f"{value!r} is no time: say 30m, 2h or 7d (ago), or 2026-11-24T10:00", param, ctx)


def _filter(name: str, what: str) -> Callable[[Command], Command]:
    return click.option(f"--{name}", f"{name}s", multiple=True, metavar=name.upper(), help=what)


@click.command()
@_filter("stage", "Only what this stage gave up, such as admission.")
@_filter("reason", "Only for this reason, such as unreadable.")
@_filter("topic", "Only from this topic, such as chat.requests.")
@_filter("tenant", "Only of this tenant.")
@_filter("key", "Only records with this key.")
@click.option("--since", type=Time(), default=0, help="Only letters from then on: 2h, 7d, or 2026-11-24T10:00.")
@click.option("--until", type=Time(), help="Only letters before then.")
@click.option("--limit", type=click.IntRange(1), help="Redrive so many at most, the oldest first.")
@click.option(
    "--max-redrives",
    type=click.IntRange(1),
    default=MAX_REDRIVES,
    show_default=True,
    help="Leave records that were redriven so often, and died again.",
)
@click.option("--again", is_flag=True, help="Redrive also what was redriven or answered already.")
@click.option("--yes", is_flag=True, help="Do it. Without it you are shown what would be done.")
@kafka_options
@shared_options
def redrive(
    since: int,
    until: int | None,
    limit: int | None,
    max_redrives: int,
    again: bool,
    yes: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Redrive dead letters: write their records back to where they came from, as they were.

    Filters of one kind widen (`--stage admission --stage generation`), those of different kinds narrow. A request that
    was answered is not answered again, however often it is redriven.
    """
    names = {name: rest.pop(name) for name in ("stages", "reasons", "topics", "tenants", "keys")}
    wanted = Wanted(**names, since_ms=since, until_ms=until)
    policy = Policy(max_redrives, again, limit)

    async def work() -> int:
        context = Context.read(**rest)
        async with opened_log(context) as log:
            return await run(log, context.namespace, wanted, policy, Voice(as_json=as_json), yes=yes)

    perform(work, as_json=as_json)


async def run(log: Log, namespace: Namespace, wanted: Wanted, policy: Policy, voice: "Voice", *, yes: bool) -> int:
    """Show or redrive the wanted letters; returns the exit code. Raises CommandFailed, LogError."""
    with voice.progress("Reading dead letters") as update:
        shelf = await read_letters(log, namespace, wanted, update)
    letters = list(shelf.latest())
    ended = await answers(log, namespace, {letter.asked: letter.first_seen_ms for letter in letters if letter.asked})
    plan = list(judge(letters, shelf, ended, policy))
    todo = [judged.letter for judged in plan if judged.state == "ready"]
    if not yes or not todo:
        voice.say(plan, dry_run=not yes)
        return 0
    done = [judged for judged in plan if judged.state != "ready"]
    with voice.progress("Redriving") as update:
        try:
            async for judged in write_back(log, todo):
                done.append(judged)
                update(Progress(len(done) - len(plan) + len(todo), len(todo)))
        except LogError as error:
            told = sum(judged.state == "redriven" for judged in done)
            raise CommandFailed(
                f"{error}; {told} of {len(todo)} letters were redriven. Run it again: what was written already "
                "is known by its ids",
                UNREACHABLE,
            ) from error
    voice.say(done, dry_run=False)
    return FAILED if any(judged.state == "failed" for judged in done) else 0


class Voice:
    """Says what becomes of letters: a table or JSON lines to stdout, progress to stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json

    @contextmanager
    def progress(self, label: str) -> Generator[Callable[[Progress], None]]:
        """A bar where somebody looks; gives the function that moves it on."""
        err = click.get_text_stream("stderr")
        with click.progressbar(length=1, label=label, file=err, hidden=not err.isatty()) as bar:

            def update(now: Progress) -> None:
                bar.length = max(now.of, 1)
                bar.update(now.read - bar.pos)

            yield update

    def say(self, plan: Sequence[Judgement], *, dry_run: bool) -> None:
        """Every letter, then the counts."""
        counts = dict[str, int]()
        for judged in plan:
            counts[judged.state] = counts.get(judged.state, 0) + 1
        if self._json:
            for judged in plan:
                say_json(_facts(judged))
            say_json({"letters": len(plan), **counts, "dry_run": dry_run})
            return
        for line in table(plan):
            click.echo(line)
        said = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no dead letters"
        hint = "; nothing was written: --yes redrives those that are ready" if dry_run and counts.get("ready") else ""
        click.echo(said + hint, err=True)


def _facts(judged: Judgement) -> dict[str, Any]:
    letter = judged.letter
    facts = asdict(letter)
    facts["letter"] = f"{letter.place.number}/{letter.offset}"
    facts["request"] = letter.asked.request if letter.asked else None
    for name in ("place", "offset", "asked"):
        del facts[name]
    return {"state": judged.state, "why": judged.why, **facts}


_HEADS: Final = ("LETTER", "DIED", "STAGE", "REASON", "FROM", "KEY", "TRIED", "REDRIVEN", "BYTES", "")


def table(plan: Sequence[Judgement]) -> Iterator[str]:
    """A line a letter, under a line of heads."""
    if not plan:
        return
    rows = [_HEADS, *(_cells(judged) for judged in plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    yield click.style(_line(_HEADS, widths), bold=True)
    for judged, row in zip(plan, rows[1:], strict=True):
        said = click.style(judged.state, fg=_COLORS.get(judged.state, "yellow"))
        why = judged.why or judged.letter.error
        yield f"{_line(row, widths)}  {said}{f': {why}' if why else ''}"


def _cells(judged: Judgement) -> tuple[str, ...]:
    letter = judged.letter
    died = datetime.fromtimestamp(letter.died_ms / 1000, UTC).astimezone()
    return (
        f"{letter.place.number}/{letter.offset}",
        died.strftime("%m-%d %H:%M:%S"),
        letter.stage,
        letter.reason,
        letter.source,
        _short(letter.key),
        str(letter.attempts),
        str(letter.redriven),
        f"{letter.size}{' (cut)' if letter.cut else ''}",
        "",
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _short(key: str | None) -> str:
    shown = "".join(char if char.isprintable() else "·" for char in key or "-")
    return shown if len(shown) <= 24 else f"{shown[:23]}…"
