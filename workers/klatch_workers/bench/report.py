"""What a run of `klatch bench` found, as plain data: written as JSON, read back for the docs.

Times are in the unit that a field's name ends with. A part that was not measured is None; an empty mapping means that
the machine does not tell CPU times.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

KLATCH: Final = "klatch"
DIRECT: Final = "direct"
RELAY: Final = "relay"
BROKER: Final = "broker"
PEER: Final = "litellm"


class Quantiles(msgspec.Struct, frozen=True):
    """Of `n` values."""

    n: int
    p50: float
    p95: float
    p99: float


def quantiles(values: Iterable[float]) -> Quantiles:
    """Nearest-rank quantiles; of nothing they are not numbers, and are given as 0 with n 0."""
    ordered = sorted(values)
    if not ordered:
        return Quantiles(0, 0.0, 0.0, 0.0)
    p50, p95, p99 = (ordered[min(len(ordered), math.ceil(q * len(ordered))) - 1] for q in (0.50, 0.95, 0.99))
    return Quantiles(len(ordered), p50, p95, p99)


class Machine(msgspec.Struct, frozen=True):
    """Where and when."""

    date: str
    command: str
    commit: str
    cpus: int
    cpu: str
    python: str
    system: str
    load_before: float
    """Of one minute: how many processes wanted a CPU before we began."""
    load_after: float
    busy: bool
    """Whether others used the machine so much that the figures are doubtful."""


class FirstToken(msgspec.Struct, frozen=True):
    """Time to first token with so many requests at once, in milliseconds."""

    concurrent: int
    sides: dict[str, Quantiles]
    """By side: `direct`, `klatch`, and whoever else took part."""
    added: dict[str, Quantiles]
    """What a side adds to `direct`: idle, the quantiles of differences of neighbouring requests; else differences of
    the quantiles."""


class Side(msgspec.Struct, frozen=True):
    """How one side carried many paced streams."""

    streams: int
    asked_per_s: float
    """Chunks a second that the model server was asked for."""
    got_per_s: float
    gaps_ms: Quantiles
    """Between neighbouring chunks of a stream; those that came in one read have 0 between them."""
    cpu_us: dict[str, float]
    """CPU microseconds a chunk, by process; the broker among them."""
    total_cpu_us: float
    """The same over all processes of the side, without the broker."""


class Whole(msgspec.Struct, frozen=True):
    """Whole replies, many at once: requests, chunks and ends together."""

    concurrent: int
    replies_per_s: float
    chunks_per_reply: float
    cpu_ms: dict[str, float]
    """CPU milliseconds a reply, by process."""
    total_cpu_ms: float
    """Without the broker."""


class Throughput(msgspec.Struct, frozen=True):
    """How many chunks a second came through when the model server did not wait."""

    streams: int
    per_s: float
    cpu_us: dict[str, float]
    total_cpu_us: float
    busiest: str
    """The process that used most of a core."""
    busiest_cores: float


class Start(msgspec.Struct, frozen=True):
    """One `klatch up`."""

    data: str
    """`new` or `kept`."""
    ready_s: float
    first_token_s: float
    """From the same beginning."""
    stop_s: float


class Recovery(msgspec.Struct, frozen=True):
    """Generation was killed with SIGKILL while it spoke; seconds from the kill, by the log's readers."""

    streams: int
    noticed_s: float
    """When the group gave its partitions to the next process."""
    opened_s: float
    """The first opening of a next attempt."""
    first_token_s: float
    after_notice_s: float
    whole: int
    """How many of the streams were read complete, from one lineage of attempts."""


class Budget(msgspec.Struct, frozen=True):
    """A budget of the design beside what was measured."""

    what: str
    limit: str
    measured: str
    met: bool | None
    """None: not measured."""


class Report(msgspec.Struct, frozen=True):
    """Everything."""

    machine: Machine
    mode: str
    seconds: float
    hops_ms: Quantiles
    """Three bare hops on aiokafka, one message at a time."""
    path_ms: dict[str, Quantiles]
    """From the client's sending to each step of klatch's path to the first token, idle."""
    first_token: list[FirstToken]
    streams: dict[str, Side]
    replies: dict[str, Whole]
    throughput: dict[str, Throughput]
    idle_cpu_percent: dict[str, float]
    """Of one core, by process, while nothing happens."""
    rss_mb_start: dict[str, float]
    rss_mb_end: dict[str, float]
    admission_per_s: float
    starts: list[Start]
    recovery: Recovery | None
    budgets: list[Budget]
    flooded_ratio: float = 0.0
    """Wait for a first token beside a tenant that floods, of the wait alone, p99, the worst of the cases simulated."""
    admission_scoped_per_s: float = 0.0
    """The same with limits for each person and each model as well."""
    peer: str = ""
    """What the peer is and how it was set up; empty when none took part."""


def ratio(numerator: float, denominator: float) -> float:
    """0 where there is nothing to divide by."""
    return numerator / denominator if denominator else 0.0


def difference(side: Quantiles, base: Quantiles) -> Quantiles:
    """Quantile by quantile."""
    return Quantiles(side.n, side.p50 - base.p50, side.p95 - base.p95, side.p99 - base.p99)


def total(by_process: dict[str, float], names: Sequence[str]) -> float:
    """The sum over some processes."""
    return sum(by_process.get(name, 0.0) for name in names)
