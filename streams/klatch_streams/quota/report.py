"""Where a tenant stands: every limit of every scope that is counted, and what is used of it."""

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from klatch_streams.quota.calendar import moment
from klatch_streams.quota.counters import Counter
from klatch_streams.quota.ledger import Ledger
from klatch_streams.quota.rules import Scope, names_in
from klatch_streams.windows import SLOTS

_BURSTS: Final = {"requests_per_minute": "burst_requests", "tokens_per_minute": "burst_tokens"}
_DIMENSIONS: Final = ("use_case", "person", "model")


class Standing(msgspec.Struct, frozen=True):
    """One limit of one scope."""

    scope: Mapping[str, str]
    """Dimension to value; empty for the whole tenant."""
    limit: str
    """As in `Limits`; or `requests_per_hour`, `tokens_per_hour`, which a burst is paid back in."""
    most: int
    """With the burst that is allowed."""
    used: int

    @property
    def left(self) -> int:
        """What remains; 0 when estimates were too low."""
        return max(0, self.most - self.used)


def standings(ledger: Ledger) -> Iterator[Standing]:
    """The whole tenant's limits, then those of its other scopes that have used anything."""
    now = moment(ledger.clock_ms)
    yield from _of(ledger.rules.scope_of(""), {}, ledger.used.at(now))
    for shard in ledger.counters.shards.values():
        for key, counter in shard.items():
            if key.startswith("~"):
                continue  # whose it is cannot be told
            yield from _of(ledger.rules.scope_of(key), _named(key), counter.at(now))


def used(counter: Counter) -> dict[str, int]:
    """What a counter, one of `at`, holds against each limit."""
    return {
        "requests_per_minute": counter.requests.total,
        "tokens_per_minute": counter.tokens.total,
        "tokens_per_day": counter.day_tokens,
        "tokens_per_month": counter.month_tokens,
        "cost_micros_per_day": counter.day_micros,
        "cost_micros_per_month": counter.month_micros,
        "concurrent_requests": counter.running,
    }


def _of(scope: Scope, names: Mapping[str, str], counter: Counter) -> Iterator[Standing]:
    limits = scope.limits.model_dump(exclude_none=True)
    for name, amount in used(counter).items():
        if name in limits:
            yield Standing(names, name, limits[name] + limits.get(_BURSTS.get(name, ""), 0), amount)
    hours = (("requests", counter.hour_requests), ("tokens", counter.hour_tokens))
    for kind, hour in hours:
        if hour and (most := limits.get(f"{kind}_per_minute")) is not None:
            yield Standing(names, f"{kind}_per_hour", SLOTS * most, hour.total)


def _named(key: str) -> dict[str, str]:
    named = zip(_DIMENSIONS, names_in(key), strict=True)
    return {dimension: name for dimension, name in named if name is not None}
