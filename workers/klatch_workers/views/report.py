"""What views say: JSON for `klatch top` and people, Prometheus' text format for scrapers.

The JSON counts the last minutes, from the tables. The metrics are counters of this process since it started, which
is what Prometheus expects: it knows a restart by a counter that fell, and adds up the processes itself.
"""

from collections.abc import Iterable, Iterator, Mapping

from klatch_workers.views.aggregate import Group, Tally
from klatch_workers.views.histogram import BOUNDS_MS, Histogram

JsonRow = dict[str, object]

_STATUSES = ("completed", "cancelled", "failed", "blocked", "expired", "rejected")


def rows_of(tallies: Mapping[Group, Tally]) -> list[JsonRow]:
    """One JSON object a group, by tenant and model."""
    return [_row(group, tallies[group]) for group in sorted(tallies)]


def _row(group: Group, tally: Tally) -> JsonRow:
    return {
        **group._asdict(),
        "requests": tally.requests,
        **{status: tally.ended.get(status, 0) for status in _STATUSES},
        "served": dict(tally.served),
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "cost_micros": tally.cost_micros,
        "estimated": tally.estimated,
        "refusals": dict(tally.refusals),
        "verdicts": dict(tally.verdicts),
        "blocks": dict(tally.blocks),
        "redactions": dict(tally.redactions),
        "first_token_ms": _latency(tally.first_token),
        "total_ms": _latency(tally.total),
    }


def _latency(histogram: Histogram) -> JsonRow:
    quantiles = {"p50": histogram.quantile(0.5), "p95": histogram.quantile(0.95)}
    rounded = {name: None if value is None else round(value, 1) for name, value in quantiles.items()}
    return {"count": histogram.count, **rounded}


def exposition(tallies: Mapping[Group, Tally], skipped: int) -> str:
    """The metrics in Prometheus' text format 0.0.4."""
    groups = sorted(tallies.items())
    lines = [
        *_counter("requests", "Requests as published", _numbers(groups, "requests")),
        *_counter("ended", "Requests that ended, by status", _counts(groups, "ended", "status")),
        *_counter("refusals", "Requests that admission refused, by limit", _counts(groups, "refusals", "limit")),
        *_counter("verdicts", "Verdicts of trust, by decision", _counts(groups, "verdicts", "decision")),
        *_counter("blocks", "Verdicts that block, by category", _counts(groups, "blocks", "category")),
        *_counter("redactions", "Verdicts that redact, by category", _counts(groups, "redactions", "category")),
        *_counter("served", "Requests, by the deployment that served them", _counts(groups, "served", "deployment")),
        *_counter("prompt_tokens", "Tokens of prompts", _numbers(groups, "prompt_tokens")),
        *_counter("completion_tokens", "Tokens of completions", _numbers(groups, "completion_tokens")),
        *_counter("cost_micros", "Cost in millionths of a US dollar", _numbers(groups, "cost_micros")),
        *_histogram("first_token_seconds", "From request to first token", groups, "first_token"),
        *_histogram("reply_seconds", "From request to end", groups, "total"),
        *_counter("views_skipped", "Records that views could not read", [("", skipped)]),
    ]
    return "\n".join(lines) + "\n"


_Groups = Iterable[tuple[Group, Tally]]
_Samples = Iterable[tuple[str, int]]


def _counter(name: str, about: str, samples: _Samples) -> Iterator[str]:
    yield f"# HELP klatch_{name}_total {about}."
    yield f"# TYPE klatch_{name}_total counter"
    for labels, value in samples:
        yield f"klatch_{name}_total{labels} {value}"


def _numbers(groups: _Groups, field: str) -> _Samples:
    return [(_labels(group), getattr(tally, field)) for group, tally in groups]


def _counts(groups: _Groups, field: str, label: str) -> _Samples:
    return [
        (_labels(group, **{label: name}), value)
        for group, tally in groups
        for name, value in sorted(getattr(tally, field).items())
    ]


def _histogram(name: str, about: str, groups: _Groups, field: str) -> Iterator[str]:
    yield f"# HELP klatch_{name} {about}."
    yield f"# TYPE klatch_{name} histogram"
    bounds = [*(f"{bound / 1000:g}" for bound in BOUNDS_MS), "+Inf"]
    for group, tally in groups:
        histogram: Histogram = getattr(tally, field)
        if not histogram.counts:
            continue
        for bound, upto in zip(bounds, histogram.cumulative(), strict=True):
            yield f"klatch_{name}_bucket{_labels(group, le=bound)} {upto}"
        yield f"klatch_{name}_sum{_labels(group)} {histogram.sum_ms / 1000:.3f}"
        yield f"klatch_{name}_count{_labels(group)} {histogram.count}"


def _labels(group: Group, **more: str) -> str:
    pairs = {**group._asdict(), **more}
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
