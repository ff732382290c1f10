"""Heads are small, keep what they are given, and grow old with the log."""

import gc
import tracemalloc
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from klatch_workers.generation.heads import Aging, Head, Heads

OFFSETS = st.integers(min_value=0, max_value=2**63 - 1)


@given(st.dictionaries(st.text(), st.tuples(OFFSETS, OFFSETS)))
def test_what_was_put_is_found(given_heads: dict[str, tuple[int, int]]) -> None:
    heads = Heads()
    for key, (offset, applied) in given_heads.items():
        heads.put(key, Head(offset, applied))
    assert {key: heads.get(key) for key in given_heads} == given_heads
    assert len(heads) == len(given_heads)
    for key in given_heads:
        heads.forget(key)
    assert len(heads) == 0


def test_a_head_takes_less_than_200_bytes() -> None:
    gc.collect()
    tracemalloc.start()
    try:
        heads = Heads()
        for number in range(100_000):
            heads.put(f"acme/{UUID(int=number)}", Head(10_000_000 + number, 20_000_000 + number))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size / len(heads) < 200


def test_heads_age_as_the_log_moves_a_few_at_a_time() -> None:
    heads = Heads()
    for number in range(10):
        heads.put(f"c{number}", Head(number, 100 + number))
    aging = Aging(heads)
    assert aging.step(1_000, 10) == []
    aging.begin(8)
    assert [key for key, _ in aging.step(1_000, 4)] == ["c0", "c1", "c2", "c3"]
    # It goes on meanwhile, and is old no more.
    heads.put("c4", Head(20, 120))
    assert [key for key, _ in aging.step(1_000, 100)] == ["c5", "c6", "c7"]
    assert aging.step(1_000, 100) == []


def test_a_head_that_a_successor_may_need_is_kept_until_the_next_time() -> None:
    heads = Heads()
    heads.put("c", Head(1, 100))
    aging = Aging(heads)
    aging.begin(5)
    assert aging.step(100, 10) == []
    aging.begin(6)
    assert aging.step(101, 10) == [("c", Head(1, 100))]
