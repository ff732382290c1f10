"""What events add to views, and the laws by which rows add up."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    EmbeddingRequested,
    Event,
    Limits,
    QuotaLimitSet,
    Refusal,
    Reservation,
    TrustVerdict,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_workers.views.aggregate import NAME_LENGTH, Group, Row, Tally, by_group, count, measure
from klatch_workers.views.histogram import Histogram
from klatch_workers.views.tables import decode_row, encode_row

ACME, R1, C1 = Tenant("acme"), RequestId("r-1"), Conversation("c-1")


def requested(model: Any = "m") -> ChatRequested:
    return ChatRequested(request=R1, tenant=ACME, conversation=C1, body={"model": model, "messages": []})


def settled(**said: Any) -> UsageSettled:
    said = {"status": "completed", "usage": Usage(prompt_tokens=7, completion_tokens=5), **said}
    return UsageSettled(request=R1, tenant=ACME, model="m", **said)


def refused(**said: Any) -> ChatRefused:
    said = {"code": "rate_limit_exceeded", "message": "", **said}
    return ChatRefused(request=R1, tenant=ACME, conversation=C1, model="m", refusal=Refusal(**said))


def verdict(**said: Any) -> TrustVerdict:
    return TrustVerdict(request=R1, tenant=ACME, conversation=C1, stage="input", policy="1", **said)


ADDS: list[tuple[str, Event, Group, Tally]] = [
    ("a request is one request", requested(), Group("acme", "m"), Tally(requests=1)),
    (
        "a request for embeddings is one request",
        EmbeddingRequested(request=R1, tenant=ACME, conversation=C1, model="m"),
        Group("acme", "m"),
        Tally(requests=1),
    ),
    ("a request may name no model", requested(None), Group("acme", ""), Tally(requests=1)),
    ("a model's name is cut", requested("x" * 999), Group("acme", "x" * NAME_LENGTH), Tally(requests=1)),
    ("a model's name is printable", requested("a\nb\x00c"), Group("acme", "abc"), Tally(requests=1)),
    (
        "a settlement ends a request, with its tokens and times",
        settled(first_token_ms=80, total_ms=900),
        Group("acme", "m"),
        Tally(
            ended={"completed": 1},
            prompt_tokens=7,
            completion_tokens=5,
            first_token=Histogram.of(80),
            total=Histogram.of(900),
        ),
    ),
    (
        "a settlement tells who served, and for how much",
        settled(deployment="east", cost_micros=40),
        Group("acme", "m"),
        Tally(
            ended={"completed": 1},
            served={"east": 1},
            prompt_tokens=7,
            completion_tokens=5,
            cost_micros=40,
            total=Histogram.of(0),
        ),
    ),
    (
        "a request without a token has no time to its first",
        settled(status="cancelled", usage=Usage(estimated=True), total_ms=3),
        Group("acme", "m"),
        Tally(ended={"cancelled": 1}, estimated=1, total=Histogram.of(3)),
    ),
    (
        "a refusal is counted by its limit",
        refused(limit="requests_per_minute"),
        Group("acme", "m"),
        Tally(ended={"rejected": 1}, refusals={"requests_per_minute": 1}),
    ),
    (
        "a refusal without a limit is counted by its code",
        refused(code="deadline_exceeded"),
        Group("acme", "m"),
        Tally(ended={"rejected": 1}, refusals={"deadline_exceeded": 1}),
    ),
    ("an allowing verdict", verdict(decision="allow"), Group("acme", ""), Tally(verdicts={"allow": 1})),
    (
        "a block is counted in each of its categories once",
        verdict(decision="block", categories=("injection", "size", "size")),
        Group("acme", ""),
        Tally(verdicts={"block": 1}, blocks={"injection": 1, "size": 1}),
    ),
    (
        "a redaction likewise",
        verdict(decision="redact", categories=("email",)),
        Group("acme", ""),
        Tally(verdicts={"redact": 1}, redactions={"email": 1}),
    ),
]


@pytest.mark.parametrize(("event", "group", "tally"), [pytest.param(*row[1:], id=row[0]) for row in ADDS])
def test_an_event_adds(event: Event, group: Group, tally: Tally) -> None:
    assert measure(event) == (group, tally)


@pytest.mark.parametrize(
    "event",
    [
        QuotaLimitSet(tenant=ACME, limits=Limits()),
        ChatAdmitted(request=requested(), requested_ms=1, reservation=Reservation(tokens=1, expires_ms=2)),
    ],
)
def test_other_events_add_nothing(event: Event) -> None:
    assert measure(event) is None


numbers = st.integers(0, 50)
counts = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 50))
histograms = st.lists(st.integers(0, 700_000), max_size=5).map(
    lambda values: by_histogram([Histogram.of(value) for value in values])
)
tallies = st.builds(
    Tally,
    requests=numbers,
    ended=counts,
    refusals=counts,
    verdicts=counts,
    blocks=counts,
    redactions=counts,
    served=counts,
    prompt_tokens=numbers,
    completion_tokens=numbers,
    cost_micros=numbers,
    estimated=numbers,
    first_token=histograms,
    total=histograms,
)


def by_histogram(several: list[Histogram]) -> Histogram:
    merged = Histogram()
    for one in several:
        merged = merged.merge(one)
    return merged


@given(tallies, tallies, tallies)
def test_merging_is_associative_and_commutative(one: Tally, two: Tally, three: Tally) -> None:
    assert one.merge(two).merge(three) == one.merge(two.merge(three))
    assert one.merge(two) == two.merge(one)


@given(tallies)
def test_an_empty_tally_adds_nothing(tally: Tally) -> None:
    assert tally.merge(Tally()) == tally == Tally().merge(tally)


def test_every_field_is_merged() -> None:
    ones: dict[str, Any] = {
        name: {"x": 1} if default == {} else Histogram.of(1) if isinstance(default, Histogram) else 1
        for name in Tally.__struct_fields__
        for default in [getattr(Tally(), name)]
    }
    doubled = Tally(**ones).merge(Tally(**ones))
    assert [name for name in ones if getattr(doubled, name) == ones[name]] == []


@given(st.lists(tallies, max_size=8), st.data())
def test_records_that_come_again_change_nothing(said: list[Tally], data: st.DataObject) -> None:
    # A killed process reads on from its last commit, however far back that is, and however often.
    delivered, upto = list[int](), 0
    while upto < len(said):
        again = data.draw(st.integers(0, upto))
        upto = data.draw(st.integers(upto + 1, len(said)))
        delivered += range(again, upto)
    row: Row | None = None
    for offset in delivered:
        row = count(row, offset, said[offset])
    once: Row | None = None
    for offset, tally in enumerate(said):
        once = count(once, offset, tally)
    assert row == once


@given(st.integers(0), tallies)
def test_a_row_survives_its_bytes(offset: int, tally: Tally) -> None:
    row = Row(offset, tally)
    assert decode_row(encode_row(row)) == row


groups = st.builds(Group, st.sampled_from(["a", "b"]), st.sampled_from(["m", ""]))


@given(st.lists(st.tuples(groups, tallies)).flatmap(lambda parts: st.tuples(st.just(parts), st.permutations(parts))))
def test_partitions_and_minutes_add_up_in_any_order(orders: tuple[list[tuple[Group, Tally]], ...]) -> None:
    one, other = map(by_group, orders)
    assert one == other
