"""The judge of limits finds decisions that the log does not bear out, and limits that were exceeded."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    LimitRule,
    Limits,
    QuotaLimitSet,
    TokenPrice,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant
from klatch_streams.admission import Admission
from klatch_streams.kernel import Input
from klatch_workers.torture.evidence import Entry, Evidence
from klatch_workers.torture.limits import broken_limits, exceeded, redecided

ACME = Tenant("acme")
NOON = 1_800_014_400_000


def asked(number: int, person: Person | None = None) -> ChatRequested:
    return ChatRequested(
        request=RequestId(f"r{number}"),
        tenant=ACME,
        conversation=Conversation("c"),
        person=person,
        body={"model": "m", "max_tokens": 84},
    )


def settled(number: int, tokens: int) -> UsageSettled:
    usage = Usage(completion_tokens=tokens)
    return UsageSettled(
        request=RequestId(f"r{number}"), tenant=ACME, status="completed", usage=usage, cost_micros=10 * tokens
    )


def entry(topic: str, offset: int, said: Event) -> Entry:
    return Entry(topic, 0, offset, NOON + offset, f"e{offset}", said)


def setting(limits: Limits, *rules: LimitRule) -> QuotaLimitSet:
    """All of a tenant's quotas, with a price."""
    return QuotaLimitSet(tenant=ACME, limits=limits, rules=rules, prices={"m": TokenPrice(completion=10_000_000)})


def run(limits: Limits, *said: Event, rules: Sequence[LimitRule] = ()) -> Evidence:
    """What an honest admission leaves behind."""
    events = [setting(limits, *rules), *said]
    requests = [entry("chat.requests", at, event) for at, event in enumerate(events)]
    admission, state, admitted = Admission(), Admission().initial(ACME), list[Entry]()
    for one in requests:
        assert isinstance(one.said, Event)
        state, effects = admission.decide(state, Input(one.said, one.timestamp_ms))
        decided = [effect.event for effect in effects if isinstance(effect.event, ChatAdmitted | ChatRefused)]
        admitted += [entry("chat.admitted", one.offset, event) for event in decided]
    return Evidence(asked={}, acknowledged=(), requests=requests, admitted=admitted)


def whats(evidence: Evidence) -> Sequence[str]:
    return [violation.what for violation in broken_limits(evidence)]


STORY = (asked(1), asked(2), asked(2), settled(1, 20), asked(3), asked(4))


@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(tokens_per_day=220),
        Limits(tokens_per_minute=150, burst_tokens=80),
        Limits(concurrent_requests=2),
        Limits(requests_per_minute=1, burst_requests=1),
        Limits(tokens_per_month=220),
        Limits(cost_micros_per_day=1_100, cost_micros_per_month=2_000),
    ],
)
def test_an_honest_run_broke_no_limit_and_repeats_are_nothing(limits: Limits) -> None:
    honest = run(limits, *STORY)
    assert whats(honest) == []
    assert whats(replace(honest, admitted=[*honest.admitted, *honest.admitted])) == []


@pytest.mark.parametrize(
    ("limits", "over"),
    [
        (Limits(tokens_per_day=220), "tokens_per_day is 320 of 220"),
        (Limits(tokens_per_minute=150, burst_tokens=70), "tokens_per_minute is 250 of 150"),
        (Limits(concurrent_requests=2), "concurrent_requests is 3 of 2"),
        (Limits(requests_per_minute=2, burst_requests=1), "requests_per_minute is 3 of 2"),
        (Limits(tokens_per_month=220), "tokens_per_month is 320 of 220"),
        (Limits(cost_micros_per_day=1_100), "cost_micros_per_day is 1880 of 1100"),
        (Limits(cost_micros_per_month=1_100), "cost_micros_per_month is 1880 of 1100"),
    ],
)
def test_a_run_that_forgot_its_limits_is_found_by_both_checks(limits: Limits, over: str) -> None:
    careless = run(Limits(), *STORY)
    strict = entry("chat.requests", 0, setting(limits))
    lied = replace(careless, requests=[strict, *careless.requests[1:]])
    assert any(over in violation.what for violation in exceeded(lied))
    assert any("admitted, where its tenant's log says refused by" in one.what for one in redecided(lied))


def test_what_is_settled_after_its_reservation_has_expired_counts_all_the_same() -> None:
    careless = run(Limits(), asked(1), settled(1, 300), asked(2))
    hour = [one if one.offset < 2 else one._replace(timestamp_ms=NOON + 3_600_000) for one in careless.requests]
    lied = replace(careless, requests=[entry("chat.requests", 0, setting(Limits(tokens_per_day=399))), *hour[1:]])
    assert [one.what for one in exceeded(lied)] == ["admitted though tokens_per_day is 400 of 399"]


ANN, BOB = Person("ann"), Person("bob")
EACH = LimitRule(person="*", limits=Limits(concurrent_requests=1))
BOBS = LimitRule(person=BOB, limits=Limits(concurrent_requests=2))


def test_limits_of_people_are_kept_for_each_and_a_rule_that_names_one_replaces_that_for_all() -> None:
    story = (asked(1, ANN), asked(2, BOB), asked(3, BOB), asked(4, BOB), asked(5, ANN), settled(1, 9), asked(6, ANN))
    honest = run(Limits(), *story, rules=(BOBS, EACH))
    assert len([one for one in honest.admitted if isinstance(one.said, ChatAdmitted)]) == 4
    assert whats(honest) == []
    careless = run(Limits(), *story)
    lied = replace(
        careless, requests=[entry("chat.requests", 0, setting(Limits(), BOBS, EACH)), *careless.requests[1:]]
    )
    assert [one.what for one in exceeded(lied)] == [
        "admitted though concurrent_requests is 3 of 2 of person bob",
        "admitted though concurrent_requests is 2 of 1 of person ann",
        "admitted though concurrent_requests is 2 of 1 of person ann",
    ]


def test_a_limit_counts_as_it_is_set_at_each_place_of_the_log() -> None:
    wide, narrow = setting(Limits(concurrent_requests=3)), setting(Limits(concurrent_requests=1))
    honest = run(Limits(concurrent_requests=1), asked(1), wide, asked(2), asked(3), narrow, asked(4))
    assert [type(one.said) for one in honest.admitted] == [ChatAdmitted, ChatAdmitted, ChatAdmitted, ChatRefused]
    assert whats(honest) == []
    forgetful = replace(honest, requests=[one for one in honest.requests if one.said != wide])
    assert {one.request for one in exceeded(forgetful)} == {"r2", "r3"}


def test_a_refusal_that_nothing_called_for_is_found() -> None:
    strict, free = run(Limits(concurrent_requests=1), asked(1), asked(2)), run(Limits(), asked(1), asked(2))
    lied = replace(free, admitted=strict.admitted)
    assert whats(lied) == ["refused by concurrent_requests, where its tenant's log says admitted"]


def test_a_decision_about_nothing_is_found() -> None:
    honest = run(Limits(), asked(1))
    assert whats(replace(honest, requests=honest.requests[:1])) == ["admitted, where its tenant's log says nothing"]


def test_a_system_that_keeps_no_decisions_is_not_asked_for_them() -> None:
    honest = run(Limits(), asked(1))
    assert whats(replace(honest, requests=(), bare=True)) == []
