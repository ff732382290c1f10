"""The order in which views take the records of a partition."""

from hypothesis import given
from hypothesis import strategies as st

from klatch_workers.views.progress import Progress


@given(
    committed=st.integers(0, 5),
    arrivals=st.lists(st.integers(0, 20), max_size=60),
    log=st.sets(st.integers(0, 20)),
)
def test_whatever_arrives_records_are_taken_once_in_order_and_without_a_hole(
    committed: int, arrivals: list[int], log: set[int]
) -> None:
    progress, taken = Progress(committed), list[int]()
    for offset in arrivals:
        place = progress.place(offset)
        lost = any(progress.next <= held < offset for held in log)
        if place == "next" or (place == "early" and not lost):
            progress.take(offset)
            taken.append(offset)
    assert taken == sorted(set(taken))
    assert {held for held in log if committed <= held < progress.next} <= set(taken)


def test_the_first_record_is_the_one_at_the_committed_offset() -> None:
    assert Progress(7).place(7) == "next"
    assert Progress(7).place(6) == "repeated"
    assert Progress(7).place(8) == "early", "the one at 7 is missing, though nothing was taken yet"


def test_a_record_that_was_taken_is_repeated() -> None:
    progress = Progress(0)
    progress.take(0)
    assert [progress.place(offset) for offset in (0, 1, 2)] == ["repeated", "next", "early"]
