"""Latencies as fixed buckets: what is merged, and how wrong a quantile may be."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_workers.views.histogram import BOUNDS_MS, Histogram

latencies = st.lists(st.integers(0, 700_000), max_size=50)


def histogram(values: list[int]) -> Histogram:
    merged = Histogram()
    for value in values:
        merged = merged.merge(Histogram.of(value))
    return merged


@given(latencies, latencies)
def test_two_histograms_merge_into_that_of_all_their_latencies(one: list[int], two: list[int]) -> None:
    assert histogram(one).merge(histogram(two)) == histogram(one + two)


@given(latencies)
def test_the_order_of_latencies_does_not_matter(values: list[int]) -> None:
    assert histogram(values) == histogram(values[::-1])


@given(latencies)
def test_it_counts_and_sums_every_latency(values: list[int]) -> None:
    made = histogram(values)
    assert (made.count, made.sum_ms, made.cumulative()[-1]) == (len(values), sum(values), len(values))


@given(latencies, st.sampled_from([0.01, 0.5, 0.95, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[int], share: float) -> None:
    found = histogram(values).quantile(share)
    if not values:
        assert found is None
        return
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    bounds = (0, *BOUNDS_MS, math.inf)
    low, high = next((low, high) for low, high in itertools.pairwise(bounds) if true <= high)
    assert found is not None
    assert low <= found <= high


@pytest.mark.parametrize(
    ("latency", "bucket"),
    [(0, 0), (5, 0), (6, 1), (1_000, BOUNDS_MS.index(1_000)), (600_000, 26), (600_001, 27)],
)
def test_a_bound_belongs_to_its_own_bucket(latency: int, bucket: int) -> None:
    assert Histogram.of(latency).cumulative().index(1) == bucket
