"""`klatch top`: what happened in the last minutes, by tenant and model, live.

On a terminal the table refreshes in place until Ctrl-C; `--once` prints one snapshot, and `--json` prints each row as
an object a line. Exit codes: 0 done, 1 the views worker refused, 2 misused, 3 it cannot be reached.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from klatch_workers.cli.context import UNREACHABLE, CommandFailed, Context, ServerAddress, perform

_TIMEOUT_S = 10.0
_CLEAR_DOWN, _HOME, _HIDE_CURSOR, _SHOW_CURSOR, _CLEAR_LINE = "\x1b[J", "\x1b[H", "\x1b[?25l", "\x1b[?25h", "\x1b[K"

Snapshot = dict[str, Any]


@click.command()
@click.option("--views-url", metavar="URL", help="Where the views worker listens.  [default: as `klatch up` wrote it]")
@click.option("--internal-key", metavar="KEY", help="Better set KLATCH_INTERNAL_KEY: others see options.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Klatch's data folder.")
@click.option("--tenant", help="Only this tenant.")
@click.option("--minutes", type=click.IntRange(1, 1440), default=5, show_default=True, help="How far back.")
@click.option("--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Seconds to refresh.")
@click.option("--once", is_flag=True, help="One snapshot.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row, a line each.")
def top(  # noqa: PLR0913 - a command has the parameters that it has
    *,
    views_url: str | None,
    internal_key: str | None,
    data: Path | None,
    tenant: str | None,
    minutes: int,
    interval: float,
    once: bool,
    as_json: bool,
) -> None:
    """Show requests, tokens, refusals, blocks and latency by tenant and model."""
    query = {"minutes": str(minutes), **({"tenant": tenant} if tenant else {})}
    # Into a pipe, a table that redraws itself makes no sense; lines of JSON do.
    pause = None if once or not (as_json or sys.stdout.isatty()) else interval

    async def work() -> int:
        source = Context.read(views_url=views_url, internal_key=internal_key, data=data).views()
        await _watch(source, query, pause, as_json)
        return 0

    perform(work, as_json=as_json, interrupted=0)


async def _watch(source: ServerAddress, query: dict[str, str], pause: float | None, as_json: bool) -> None:
    import aiohttp

    in_place = pause is not None and not as_json
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {source.key}"}, timeout=timeout) as session:
        if in_place:
            click.echo(_HIDE_CURSOR + _HOME + _CLEAR_DOWN, nl=False)
        try:
            while True:
                snapshot = await _ask(session, source.url, query)
                _show(snapshot, query["minutes"], as_json=as_json, in_place=in_place)
                if pause is None:
                    return
                await asyncio.sleep(pause)
        finally:
            if in_place:
                click.echo(_SHOW_CURSOR)


async def _ask(session: Any, url: str, query: dict[str, str]) -> Snapshot:
    import aiohttp

    hint = "start `klatch up` or `klatch worker views`, or say where it is with --views-url"
    try:
        async with session.get(f"{url}/v1/views/usage", params=query) as answer:
            said = await answer.json()
            if answer.ok:
                return dict(said)
            message = said["error"]["message"]
    except (aiohttp.ContentTypeError, ValueError, KeyError, TypeError) as error:
        raise CommandFailed(f"what answers at {url} is not klatch's views worker; {hint}") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise CommandFailed(f"the views worker does not answer at {url} ({reason}); {hint}", UNREACHABLE) from error
    raise CommandFailed(f"the views worker at {url} refused: {message}")


def _show(snapshot: Snapshot, minutes: str, *, as_json: bool, in_place: bool) -> None:
    if as_json:
        span = {name: snapshot[name] for name in ("from_ms", "until_ms", "complete")}
        click.echo("".join(json.dumps({**span, **row}) + "\n" for row in snapshot["rows"]), nl=False)
        return
    lines = list(table(snapshot, minutes))
    if not in_place:
        click.echo("\n".join(lines))
        return
    size = shutil.get_terminal_size()
    # Longer lines would wrap, and a longer screen scroll: both break redrawing in place.
    seen = [line[: size.columns] + _CLEAR_LINE for line in lines[: size.lines - 1]]
    click.echo(_HOME + "\n".join(seen) + _CLEAR_DOWN, nl=False)


_HEADINGS = (
    *("TENANT", "MODEL", "REQS", "DONE", "CANC", "FAIL", "EXPD", "REFUSED", "BLOCKED", "REDACTED"),
    *("TOKENS IN", "OUT", "FIRST p50", "p95", "TOTAL p50", "p95"),
)


def table(snapshot: Snapshot, minutes: str) -> Iterator[str]:
    """The lines of the table."""
    yield "klatch: this minute" if minutes == "1" else f"klatch: last {minutes} minutes"
    if not snapshot["complete"]:
        yield "other views workers count the rest: ask each of them"
    yield ""
    rows = [_cells(row) for row in snapshot["rows"]]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    yield _line(_HEADINGS, widths)
    for row in rows:
        yield _line(row, widths)
    if not rows:
        yield "nothing yet"


def _cells(row: Snapshot) -> tuple[str, ...]:
    counts = (row[name] for name in ("requests", "completed", "cancelled", "failed", "expired", "rejected"))
    verdicts = row["verdicts"]
    # Verdicts know no model: they stand in a row of their own, beside the blocked requests of each model.
    blocked = verdicts.get("block", 0) or row["blocked"]
    tokens = (_short(row["prompt_tokens"]), _short(row["completion_tokens"]))
    times = (row["first_token_ms"], row["total_ms"])
    latencies = (_duration(time[share]) for time in times for share in ("p50", "p95"))
    names = (row["tenant"], row["model"] or "(any)")
    return (*names, *map(_short, counts), _short(blocked), _short(verdicts.get("redact", 0)), *tokens, *latencies)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*names, *numbers]).rstrip()


def _short(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _duration(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"
