"""A dead letter holds the record as it was, and says why without quoting it."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas.documents import ASYNCAPI, ROOT
from klatch_schemas.events import Limits, QuotaLimitSet
from klatch_schemas.ids import Tenant
from klatch_schemas.records import Draft, Headers, Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, Namespace
from klatch_streams.dead_headers import OURS, origin_of, times_redriven
from klatch_streams.dead_letters import DeadLetter, bury, cut, dead_letter, describe
from klatch_streams.kernel import Emit, drafts_of
from klatch_streams.memory_log import MemoryLog
from klatch_streams.redriving import receipt, redriven

HERE = Namespace.named("t")
RECORD = Record(Partition("t.in", 3), 41, 1_234, b"key", b"\x00garbage", (("tenant", b"acme"), ("twice", b"1")))


@given(
    key=st.none() | st.binary(max_size=20),
    value=st.none() | st.binary(max_size=50),
    headers=st.lists(st.tuples(st.text(max_size=8), st.none() | st.binary(max_size=8)), max_size=5),
    reason=st.text(max_size=300),
    error=st.text(max_size=3_000),
)
def test_key_value_and_headers_are_untouched_and_ours_are_bounded(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]], reason: str, error: str
) -> None:
    record = RECORD._replace(key=key, value=value, headers=tuple(headers))
    letter = dead_letter(record, HERE, "admission", DeadLetter(reason, error))
    assert (letter.key, letter.value, letter.topic) == (key, value, "t.dead.letters")
    assert list(letter.headers)[: len(headers)] == headers
    ours = dict(list(letter.headers)[len(headers) :])
    assert ours["dead-topic"] == b"t.in"
    assert (ours["dead-partition"], ours["dead-offset"], ours["dead-first-seen"]) == (b"3", b"41", b"1234")
    assert (ours["dead-stage"], ours["dead-redriven"]) == (b"admission", b"0")
    assert (ours["dead-attempts"], ours["dead-origin"]) == (b"1", b"t.in/3/41")
    assert sum(len(value or b"") for value in ours.values()) < 2_000
    assert dead_letter(record, HERE, "admission", DeadLetter(reason, error)) == letter


def read_back(letter: Draft, offset: int = 5) -> Record:
    """A letter as it is read from `dead.letters`."""
    return Record(Partition(letter.topic, 0), offset, 9_999, letter.key, letter.value, tuple(letter.headers))


def test_a_redriven_record_is_the_original_and_dies_again_with_its_history() -> None:
    first = read_back(dead_letter(RECORD, HERE, "admission", DeadLetter("old", attempts=3)))
    back = redriven(first, first.value)
    assert (back.topic, back.key, back.value, back.partition) == ("t.in", b"key", RECORD.value, None)
    assert tuple(back.headers)[: len(RECORD.headers)] == RECORD.headers
    again = Record(Partition("t.in", 1), 90, 5_000, back.key, back.value, tuple(back.headers))
    headers = dead_letter(again, HERE, "screening", DeadLetter("new")).headers
    ours = dict(headers)
    assert len(ours) == len(headers)
    assert ours["dead-reason"] == b"new"
    assert (ours["dead-first-seen"], ours["dead-redriven"], ours["dead-attempts"]) == (b"1234", b"1", b"4")
    assert (ours["dead-origin"], ours["dead-offset"]) == (b"t.in/3/41", b"90")


def test_a_record_without_a_key_goes_back_to_its_partition() -> None:
    letter = read_back(dead_letter(RECORD._replace(key=None), HERE, "admission", DeadLetter("unreadable")))
    assert redriven(letter, letter.value).partition == 3


def test_a_receipt_names_its_letter_and_holds_nothing_of_it() -> None:
    letter = read_back(dead_letter(RECORD, HERE, "admission", DeadLetter("unreadable")))
    note = receipt(letter)
    assert (note.topic, note.partition, note.value) == ("t.dead.letters", 0, None)
    assert dict(note.headers) == {"dead-receipt": b"5", "dead-origin": b"t.in/3/41", "dead-redriven": b"1"}


def test_effects_of_a_redriven_record_carry_its_history_and_others_nothing() -> None:
    event = QuotaLimitSet(tenant=Tenant("acme"), limits=Limits())
    for count, carried in ((b"2", {"dead-first-seen": b"7", "dead-redriven": b"2"}), (b"0", {})):
        record = RECORD._replace(headers=(("dead-first-seen", b"7"), ("dead-redriven", count)))
        [draft] = drafts_of([Emit(CHAT_REQUESTS, "acme", event)], record, HERE)
        assert {name: value for name, value in draft.headers if name.startswith("dead-")} == carried


@pytest.mark.parametrize("said", [b"", b"x", b"-1", b"9" * 40, "٣".encode()])
def test_what_producers_write_into_our_headers_is_no_number_and_no_place(said: bytes) -> None:
    record = RECORD._replace(headers=tuple((name, said) for name in OURS))
    assert (times_redriven(record), origin_of(record)) == (0, "t.in/3/41")
    assert sum(len(value or b"") for _, value in dead_letter(record, HERE, "s", DeadLetter("r")).headers) < 100


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


@pytest.mark.parametrize(
    ("key", "headers"),
    [(b"k" * 999_900, ()), (b"k", (("other", b"x" * 999_900),)), (b"k" * 500_000, (("o" * 499_900, None),))],
    ids=["key", "header", "both"],
)
async def test_a_record_whose_key_or_headers_leave_no_room_is_buried_as_well(key: bytes, headers: Headers) -> None:
    log = MemoryLog({"t.dead.letters": 1}, max_record_bytes=1_000_000)
    await bury(log, [dead_letter(RECORD._replace(key=key, headers=headers), HERE, "s", DeadLetter("unreadable"))])
    [letter] = log.records("t.dead.letters")
    assert (letter.key, letter.value) == (key[:65_536], RECORD.value)
    assert (letter.header("dead-offset"), letter.header("dead-reason")) == (b"41", b"unreadable")


def test_a_letter_that_is_cut_keeps_the_records_headers_that_there_is_room_for() -> None:
    letter = cut(dead_letter(RECORD._replace(value=b"x" * 100_000), HERE, "s", DeadLetter("too-large")))
    assert tuple(letter.headers)[:2] == RECORD.headers


def documented(message: str) -> tuple[set[str], set[str]]:
    """The headers that the AsyncAPI document names for a message of `dead.letters`, and those it requires."""
    messages = json.loads((ROOT / ASYNCAPI).read_text(encoding="utf-8"))["channels"]["dead.letters"]["messages"]
    headers: Mapping[str, list[str]] = messages[message]["headers"]
    return set(headers["properties"]), set(headers["required"])


def test_the_documents_name_the_headers_that_letters_and_receipts_have() -> None:
    whole = dead_letter(RECORD._replace(headers=()), HERE, "s", DeadLetter("r"))
    named, required = documented("dead.letter")
    assert {name for name, _ in whole.headers} == required
    assert {name for name, _ in cut(whole).headers} == named
    written = {name for name, _ in receipt(read_back(whole)).headers}
    assert documented("dead.receipt") == (written, written)
    assert named | written == OURS
