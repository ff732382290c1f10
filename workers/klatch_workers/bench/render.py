"""A report as text: a plain table for the terminal, and the same as Markdown between two marks of a page.

What is written between the marks is replaced as a whole; what a person wrote around them stays.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from klatch_workers.bench.report import BROKER, DIRECT, Quantiles, Report, ratio

BEGIN: Final = "<!-- klatch bench: begin (written by `klatch bench --doc`, do not edit) -->"
END: Final = "<!-- klatch bench: end -->"

Row = Sequence[str]
Table = tuple[str, Row, list[Row]]
"""Title, head, rows."""


class NoMarks(ValueError):
    """The page has no place for the figures."""


def text(report: Report) -> str:
    """For a terminal."""
    return "\n".join([*_facts(report), *(line for table in tables(report) for line in _plain(table))])


def markdown(report: Report) -> str:
    """For a page."""
    facts = [f"- {fact}" for fact in _facts(report)]
    return "\n".join([*facts, *(line for table in tables(report) for line in _marked(table))])


def write_into(page: Path, report: Report) -> None:
    """Replace what stands between the marks. Raises NoMarks, OSError."""
    old = page.read_text(encoding="utf-8")
    before, began, rest = old.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (began and ended):
        raise NoMarks(f"{page} has no place for the figures: put these two lines into it:\n{BEGIN}\n{END}")
    page.write_text(f"{before}{BEGIN}\n\n{markdown(report)}\n{END}{after}", encoding="utf-8")


def _facts(report: Report) -> list[str]:
    here = report.machine
    busy = ". Others used the machine: take the ratios, not the figures" if here.busy else ""
    return [
        f"{here.command} ({report.mode}, {report.seconds:.0f} s), {here.date}, commit {here.commit or 'unknown'}",
        f"{here.cpus} CPUs ({here.cpu}), Python {here.python}, {here.system}",
        *([f"beside {report.peer}"] if report.peer else []),
        f"load average {here.load_before:.2f} before, {here.load_after:.2f} after{busy}",
    ]


# --- tables


def tables(report: Report) -> list[Table]:
    """All figures, in the order a reader wants them."""
    return [
        _budgets(report),
        _first_token(report),
        _path(report),
        _streams(report),
        _replies(report),
        _throughput(report),
        _processes(report),
        *_starts(report),
        *_recovery(report),
    ]


def _budgets(report: Report) -> Table:
    said = {True: "yes", False: "NO", None: "-"}
    rows: list[Row] = [(one.what, one.limit, one.measured, said[one.met]) for one in report.budgets]
    return "Budgets", ("what", "budget", "measured", "met"), rows


def _first_token(report: Report) -> Table:
    rows: list[Row] = [("three bare hops", "1", *_three(report.hops_ms))]
    for found in report.first_token:
        at = str(found.concurrent)
        rows += [(name, at, *_three(side)) for name, side in found.sides.items()]
        rows += [(f"{name}, added to {DIRECT}", at, *_three(side)) for name, side in found.added.items()]
    return "Time to first token, ms", ("side", "at once", "p50", "p95", "p99", "n"), rows


def _path(report: Report) -> Table:
    rows: list[Row] = [(step, *_three(found)) for step, found in report.path_ms.items()]
    return "The path to the first token, idle, ms after the request", ("step", "p50", "p95", "p99", "n"), rows


def _three(found: Quantiles) -> Row:
    return (f"{found.p50:.1f}", f"{found.p95:.1f}", f"{found.p99:.1f}", str(found.n))


def _streams(report: Report) -> Table:
    rows: list[Row] = [
        (
            name,
            f"{side.got_per_s:,.0f} of {side.asked_per_s:,.0f}",
            f"{side.gaps_ms.p50:.1f} / {side.gaps_ms.p95:.1f} / {side.gaps_ms.p99:.1f}",
            *_cpu(side.cpu_us, side.total_cpu_us),
        )
        for name, side in report.streams.items()
    ]
    many = next(iter(report.streams.values())).streams
    head = ("side", "chunks/s", "gap ms, p50/p95/p99", "CPU µs a chunk", "by process", "broker")
    return f"{many} paced streams", head, rows


def _replies(report: Report) -> Table:
    rows: list[Row] = [
        (
            name,
            f"{side.replies_per_s:.1f}",
            f"{side.chunks_per_reply:.0f}",
            *_cpu(side.cpu_ms, side.total_cpu_ms, digits=1),
        )
        for name, side in report.replies.items()
    ]
    many = next(iter(report.replies.values())).concurrent
    head = ("side", "replies/s", "chunks", "CPU ms a reply", "by process", "broker")
    return f"Whole replies, {many} at once", head, rows


def _throughput(report: Report) -> Table:
    direct = report.throughput[DIRECT].per_s
    rows: list[Row] = [
        (
            name,
            f"{side.per_s:,.0f}",
            f"{ratio(side.per_s, direct):.2f}",
            *_cpu(side.cpu_us, side.total_cpu_us),
            f"{side.busiest} {side.busiest_cores:.2f}",
        )
        for name, side in report.throughput.items()
    ]
    head = ("side", "chunks/s", "of direct", "CPU µs a chunk", "by process", "broker", "busiest, cores")
    return f"As many as there can be, {report.throughput[DIRECT].streams} streams", head, rows


def _cpu(by_process: Mapping[str, float], total: float, digits: int = 0) -> Row:
    if not by_process:
        return ("", "", "")
    parts = ", ".join(f"{name} {used:.{digits}f}" for name, used in by_process.items() if name != BROKER)
    return (f"{total:.{digits}f}", parts, f"{by_process.get(BROKER, 0.0):.{digits}f}")


def _processes(report: Report) -> Table:
    rows: list[Row] = [
        (
            name,
            f"{start:.0f}",
            f"{report.rss_mb_end.get(name, 0.0):.0f}",
            f"{report.idle_cpu_percent.get(name, 0.0):.1f}",
        )
        for name, start in report.rss_mb_start.items()
    ]
    return "Processes", ("process", "RSS MB, start", "after the load", "CPU % idle"), rows


def _starts(report: Report) -> Iterable[Table]:
    rows: list[Row] = [
        (start.data, f"{start.ready_s:.1f}", f"{start.first_token_s:.1f}", f"{start.stop_s:.1f}")
        for start in report.starts
    ]
    if rows:
        yield "`klatch up`, s", ("data folder", "ready", "first token", "stop"), rows


def _recovery(report: Report) -> Iterable[Table]:
    if found := report.recovery:
        rows: list[Row] = [
            ("the group gives the partitions to the next process", f"{found.noticed_s:.2f}"),
            ("the next attempt is opened", f"{found.opened_s:.2f}"),
            ("first new token", f"{found.first_token_s:.2f}"),
            ("streams read complete", f"{found.whole} of {found.streams}"),
        ]
        yield "Generation killed with SIGKILL, s after the kill", ("what", "s"), rows


# --- layout


def _plain(table: Table) -> list[str]:
    title, head, rows = table
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return ["", title, *(f"  {line}".rstrip() for line in lines)]


def _marked(table: Table) -> list[str]:
    title, head, rows = table
    return ["", f"### {title}", "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
