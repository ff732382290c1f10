"""Latencies as a histogram of fixed buckets: small, mergeable, and a source of quantiles.

The buckets never change with the data, so histograms of minutes, partitions and processes add up. A quantile is
exact to its bucket: at most a factor of two off, mostly a third.
"""

import bisect
import itertools

import msgspec

BOUNDS_MS = (
    *(5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 400, 500, 750),
    *(1_000, 1_500, 2_000, 3_000, 5_000, 7_500, 10_000, 15_000, 20_000, 30_000),
    *(60_000, 120_000, 300_000, 600_000),
)
"""Inclusive upper bounds; a last bucket without a bound follows."""

_BUCKETS = len(BOUNDS_MS) + 1


class Histogram(msgspec.Struct, frozen=True, omit_defaults=True):
    """How many latencies fell into each bucket."""

    counts: tuple[int, ...] = ()
    """One a bucket, without the zeros at the end."""
    sum_ms: int = 0

    @classmethod
    def of(cls, latency_ms: int) -> "Histogram":
        """The histogram of one latency."""
        bucket = bisect.bisect_left(BOUNDS_MS, latency_ms)
        return cls((0,) * bucket + (1,), latency_ms)

    @property
    def count(self) -> int:
        """How many latencies it holds."""
        return sum(self.counts)

    def merge(self, other: "Histogram") -> "Histogram":
        """Both together."""
        pairs = itertools.zip_longest(self.counts, other.counts, fillvalue=0)
        return Histogram(tuple(one + two for one, two in pairs), self.sum_ms + other.sum_ms)

    def cumulative(self) -> list[int]:
        """How many latencies are at most each bound; the last number counts all."""
        return list(itertools.accumulate(self.counts + (0,) * (_BUCKETS - len(self.counts))))

    def quantile(self, share: float) -> float | None:
        """The latency that `share` (0 to 1) of all do not exceed, in milliseconds; None without any.

        Linear inside its bucket, as Prometheus' histogram_quantile; past the last bound, that bound.
        """
        cumulative = self.cumulative()
        rank = share * cumulative[-1]
        if cumulative[-1] == 0:
            return None
        bucket = next(at for at, upto in enumerate(cumulative) if upto >= rank and upto > 0)
        if bucket == len(BOUNDS_MS):
            return float(BOUNDS_MS[-1])
        low = BOUNDS_MS[bucket - 1] if bucket else 0
        below = cumulative[bucket - 1] if bucket else 0
        inside = (rank - below) / (cumulative[bucket] - below)
        return low + (BOUNDS_MS[bucket] - low) * inside
