"""A dead letter holds the record as it was, and says why without quoting it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import Namespace
from klatch_streams.dead_letters import DeadLetter, cut, dead_letter, describe

HERE = Namespace.named("t")
RECORD = Record(Partition("t.in", 3), 41, 1_234, b"key", b"\x00garbage", (("tenant", b"acme"), ("twice", b"1")))


@given(
    key=st.none() | st.binary(max_size=20),
    value=st.none() | st.binary(max_size=50),
    headers=st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=8)), max_size=5),
    reason=st.text(max_size=300),
    error=st.text(max_size=3_000),
)
def test_key_value_and_headers_are_untouched_and_ours_are_bounded(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]], reason: str, error: str
) -> None:
    record = RECORD._replace(key=key, value=value, headers=tuple(headers))
    letter = dead_letter(record, HERE, "admission", DeadLetter(reason, error))
    assert (letter.key, letter.value, letter.topic) == (key, value, "t.dead.letters")
    assert list(letter.headers)[: len(headers)] == headers
    ours = dict(list(letter.headers)[len(headers) :])
    assert ours["dead-topic"] == b"t.in"
    assert (ours["dead-partition"], ours["dead-offset"], ours["dead-first-seen"]) == (b"3", b"41", b"1234")
    assert (ours["dead-stage"], ours["dead-redriven"]) == (b"admission", b"0")
    assert sum(map(len, ours.values())) < 2_000
    assert dead_letter(record, HERE, "admission", DeadLetter(reason, error)) == letter


def test_a_redriven_record_that_dies_again_keeps_its_history() -> None:
    redriven = RECORD._replace(headers=(("dead-first-seen", b"7"), ("dead-redriven", b"2"), ("dead-reason", b"old")))
    headers = dead_letter(redriven, HERE, "screening", DeadLetter("new")).headers
    assert [value for name, value in headers if name == "dead-reason"] == [b"new"]
    assert [value for name, value in headers if name == "dead-first-seen"] == [b"7"]
    assert [value for name, value in headers if name == "dead-redriven"] == [b"2"]


def test_an_error_is_described_by_its_type_and_place_and_never_by_its_words() -> None:
    nothing = dict[str, int]()
    with pytest.raises(KeyError, match="secret") as caught:
        nothing["my secret message"]
    said = describe(caught.value)
    assert said.startswith("KeyError at test_dead_letters.py:")
    assert "secret" not in said


def test_a_letter_that_would_be_too_large_says_how_much_was_cut() -> None:
    letter = cut(dead_letter(RECORD._replace(value=b"x" * 100_000), HERE, "s", DeadLetter("too-large")))
    assert letter.value == b"x" * 65_536
    assert dict(letter.headers)["dead-cut"] == b"100000"
