"""Scopes, bursts, months, money and credit: what an operator may set, and what follows.

Over 400 lines on purpose: one small tenant speaks for all of it.
"""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rpds import HashTrieMap

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    LimitRule,
    Limits,
    QuotaLimitSet,
    StreamBudget,
    TokenPrice,
    Usage,
    UsageRunning,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant
from klatch_streams.admission import HOLD_MS, Admission
from klatch_streams.estimate import Estimate
from klatch_streams.kernel import Emit, Input
from klatch_streams.quota import counters
from klatch_streams.quota.calendar import moment, until_next_month
from klatch_streams.quota.changes import KEPT
from klatch_streams.quota.counters import Counter, Counters, Need
from klatch_streams.quota.ledger import Ledger

ACME = Tenant("acme")
NOON = 1_800_014_400_000
"""2027-01-15, a UTC noon."""
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
ADMISSION = Admission(Estimate(completion=100))
DOLLAR = 1_000_000


class Tenants:
    """One tenant's ledger, and what came of what it was told."""

    def __init__(self, limits: Limits | None = None, *rules: LimitRule, **more: Any) -> None:
        self.state: Ledger = ADMISSION.initial(ACME)
        self.now = NOON
        self.number = 0
        self.set(limits or Limits(), *rules, **more)

    def set(self, limits: Limits, *rules: LimitRule, **more: Any) -> None:
        self.say(QuotaLimitSet(tenant=ACME, limits=limits, rules=rules, **more))

    def say(self, event: Event) -> Sequence[Emit]:
        self.state, effects = ADMISSION.decide(self.state, Input(event, self.now))
        return effects

    def asks(
        self, tokens: int | None = 84, person: str | None = None, use_case: str = "chat", **more: Any
    ) -> ChatAdmitted | ChatRefused:
        """A request of 16 prompt tokens and `tokens` of reply: None leaves them open."""
        self.number += 1
        body = {"model": "small"} if tokens is None else {"model": "small", "max_tokens": tokens}
        fields: dict[str, Any] = {"body": body, **more}
        asked = ChatRequested(
            request=RequestId(f"r{self.number}"),
            tenant=ACME,
            conversation=Conversation("c"),
            person=Person(person) if person else None,
            use_case=use_case,
            **fields,
        )
        event = self.say(asked)[-1].event
        assert isinstance(event, ChatAdmitted | ChatRefused)
        return event

    def refuses(self, **asked: Any) -> str | None:
        """The limit that refuses; None: it was admitted."""
        answer = self.asks(**asked)
        return answer.refusal.limit if isinstance(answer, ChatRefused) else None

    def settles(self, tokens: int, cost_micros: int = 0, request: str | None = None) -> None:
        named = RequestId(request or f"r{self.number}")
        usage = Usage(completion_tokens=tokens)
        self.say(UsageSettled(request=named, tenant=ACME, status="completed", usage=usage, cost_micros=cost_micros))

    def runs(self, granted: int, request: str | None = None) -> StreamBudget | None:
        """A running reply asks for more than `granted`."""
        named, talk = RequestId(request or f"r{self.number}"), Conversation("c")
        said = UsageRunning(request=named, tenant=ACME, conversation=talk, tokens=granted, granted=granted)
        told = [emit.event for emit in self.say(said)]
        assert len(told) < 2
        return told[0] if told and isinstance(told[0], StreamBudget) else None


# --- scopes


def test_each_person_has_a_limit_of_its_own_and_all_have_the_tenants() -> None:
    acme = Tenants(Limits(requests_per_minute=3), LimitRule(person="*", limits=Limits(requests_per_minute=2)))
    assert [acme.refuses(person="ann") for _ in range(3)] == [None, None, "requests_per_minute"]
    assert [acme.refuses(person="bob") for _ in range(2)] == [None, "requests_per_minute"]


def test_requests_that_name_nobody_count_as_one_person() -> None:
    acme = Tenants(None, LimitRule(person="*", limits=Limits(requests_per_minute=1)))
    assert [acme.refuses(), acme.refuses(), acme.refuses(person="ann")] == [None, "requests_per_minute", None]


def test_a_rule_that_names_somebody_replaces_the_one_for_each() -> None:
    each = LimitRule(person="*", limits=Limits(requests_per_minute=1))
    acme = Tenants(None, each, LimitRule(person="ann", limits=Limits(requests_per_minute=2)))
    assert [acme.refuses(person="ann") for _ in range(3)] == [None, None, "requests_per_minute"]
    assert [acme.refuses(person="bob") for _ in range(2)] == [None, "requests_per_minute"]


@pytest.mark.parametrize(
    ("rule", "counts", "free"),
    [
        ({"use_case": "chat"}, {}, {"use_case": "search"}),
        ({"model": "small"}, {"person": "ann"}, {"body": {"model": "large", "max_tokens": 1}}),
        ({"use_case": "*", "person": "ann"}, {"person": "ann"}, {"person": "ann", "use_case": "search"}),
        ({"use_case": "chat", "person": "*", "model": "small"}, {"person": "ann"}, {"person": "bob"}),
    ],
)
def test_a_rule_counts_what_matches_all_that_it_names(rule: Any, counts: Any, free: Any) -> None:
    acme = Tenants(None, LimitRule(**rule, limits=Limits(requests_per_minute=1)))
    assert [acme.refuses(**counts), acme.refuses(**counts), acme.refuses(**free)] == [None, "requests_per_minute", None]


def test_a_refusal_names_what_is_limited_and_not_whom() -> None:
    acme = Tenants(None, LimitRule(use_case="chat", person="*", limits=Limits(tokens_per_day=50)))
    refused = acme.asks(person="ann")
    assert isinstance(refused, ChatRefused)
    assert refused.refusal.scope == "use_case+person"
    assert "for this use case and person" in refused.refusal.message
    assert "ann" not in refused.refusal.message


def test_settling_frees_what_was_reserved_in_every_scope() -> None:
    acme = Tenants(None, LimitRule(person="*", limits=Limits(tokens_per_day=150, concurrent_requests=1)))
    assert acme.refuses(person="ann") is None
    assert acme.refuses(person="ann") is not None
    acme.settles(50, request="r1")
    assert acme.refuses(person="ann") is None


def test_a_reservation_that_expires_frees_its_slot_in_every_scope() -> None:
    acme = Tenants(None, LimitRule(person="*", limits=Limits(concurrent_requests=1)))
    assert acme.refuses(person="ann") is None
    acme.now += HOLD_MS - 1
    assert acme.refuses(person="ann") == "concurrent_requests"
    acme.now += MINUTE
    assert acme.refuses(person="ann") is None


# --- bursts


def test_a_burst_is_paid_back_within_the_hour() -> None:
    acme = Tenants(Limits(requests_per_minute=2, burst_requests=3))
    assert [acme.refuses() for _ in range(6)] == [None] * 5 + ["requests_per_minute"]
    admitted = 5
    for _ in range(59):
        acme.now += MINUTE + SECOND
        admitted += sum(acme.refuses() is None for _ in range(6))
    assert admitted == 120
    refused = acme.asks()
    assert isinstance(refused, ChatRefused)
    assert refused.refusal.retry_after_ms is not None
    acme.now += refused.refusal.retry_after_ms
    assert acme.refuses() is None


@given(st.lists(st.tuples(st.sampled_from([0, 1, 30_000, 61_000, 10 * MINUTE]), st.integers(0, 40)), max_size=80))
def test_no_minute_holds_more_than_the_burst_and_no_hour_more_than_the_limit(asked: list[tuple[int, int]]) -> None:
    acme, facts = Tenants(Limits(tokens_per_minute=40, burst_tokens=60)), list[tuple[int, int]]()
    for step, tokens in asked:
        acme.now += step
        if acme.refuses(tokens=tokens) is None:
            acme.settles(tokens // 2)
            facts.append((acme.now, tokens // 2))
        assert sum(one for at, one in facts if at > acme.now - MINUTE) <= 100
        assert sum(one for at, one in facts if at > acme.now - HOUR) <= 60 * 40


# --- months, money


def test_a_month_ends_with_its_last_day() -> None:
    acme = Tenants(Limits(tokens_per_month=150))
    assert acme.refuses() is None
    acme.settles(100)
    refused = acme.asks()
    assert isinstance(refused, ChatRefused)
    assert refused.refusal.retry_after_ms == 16 * DAY + 12 * HOUR
    acme.now += refused.refusal.retry_after_ms - 1
    assert acme.refuses() == "tokens_per_month"
    acme.now += 1
    assert acme.refuses() is None


@pytest.mark.parametrize(
    "limits", [Limits(tokens_per_day=250), Limits(tokens_per_month=250), Limits(cost_micros_per_day=250)]
)
def test_a_budget_that_running_requests_fill_is_worth_another_try_soon_and_one_that_is_spent_is_not(
    limits: Limits,
) -> None:
    price = TokenPrice(prompt=1_000_000, completion=1_000_000)
    acme = Tenants(limits, LimitRule(person="*", limits=limits), prices={"small": price})
    assert [acme.refuses(person="ann"), acme.refuses(person="ann")] == [None, None]
    full = acme.asks(person="ann")
    assert isinstance(full, ChatRefused)
    assert (full.refusal.retry_after_ms, full.refusal.message[-18:]) == (SECOND, ": try again in 1 s")
    acme.settles(100, 100, "r1")
    acme.settles(100, 100, "r2")
    spent = acme.asks(person="ann")
    assert isinstance(spent, ChatRefused)
    assert spent.refusal.retry_after_ms is not None
    assert spent.refusal.retry_after_ms >= 12 * HOUR


def test_what_a_running_reply_was_granted_may_come_back_too_until_its_reservation_expires() -> None:
    acme = Tenants(Limits(tokens_per_day=200))
    assert acme.refuses(tokens=None) is None
    assert acme.runs(100)
    refused = acme.asks()
    assert isinstance(refused, ChatRefused)
    assert refused.refusal.retry_after_ms == SECOND
    acme.now += HOLD_MS + MINUTE
    refused = acme.asks()
    assert isinstance(refused, ChatRefused)
    assert refused.refusal.retry_after_ms == 12 * HOUR - HOLD_MS - MINUTE
    # Who asks for more lives, and is settled some time.
    acme.runs(184, "r1")
    refused = acme.asks()
    assert isinstance(refused, ChatRefused)
    assert refused.refusal.retry_after_ms == SECOND


def test_what_was_reserved_yesterday_is_no_part_of_a_budget_of_today() -> None:
    acme = Tenants(Limits(tokens_per_day=200))
    acme.now += 12 * HOUR - MINUTE
    assert acme.refuses() is None, "it runs over midnight"
    acme.now += 2 * MINUTE
    assert acme.refuses() is None
    acme.settles(200, 0, "r2")
    refused = acme.asks()
    assert isinstance(refused, ChatRefused)
    assert refused.refusal.retry_after_ms == 24 * HOUR - MINUTE


@given(st.integers(0, 2_932_896 * DAY - 40 * DAY))
def test_months_are_those_of_the_calendar(ms: int) -> None:
    day = date(1970, 1, 1) + timedelta(days=ms // DAY)
    assert moment(ms).month == (day.year - 1970) * 12 + day.month - 1
    following = date(day.year + day.month // 12, day.month % 12 + 1, 1)
    assert until_next_month(ms) == (following - date(1970, 1, 1)).days * DAY - ms


def test_any_time_has_a_month() -> None:
    assert moment((1 << 63) - 1).month > moment(NOON).month
    assert moment(0).month == 0


def test_money_is_reserved_at_the_highest_price_and_settled_at_the_real_one() -> None:
    prices = {"small": TokenPrice(prompt=DOLLAR, completion=2 * DOLLAR)}
    acme = Tenants(Limits(cost_micros_per_day=300), prices=prices)
    admitted = acme.asks()
    assert isinstance(admitted, ChatAdmitted)
    assert admitted.reservation.cost_micros == 16 + 2 * 84
    assert acme.refuses() == "cost_micros_per_day"
    acme.settles(100, cost_micros=116, request="r1")
    assert acme.refuses() is None


@pytest.mark.parametrize(
    ("prices", "cost"),
    [
        ({"small": 1, "*": 2, "large": 3}, 84),
        ({"*": 2, "large": 3}, 168),
        ({"large": 3, "medium": 1}, 252),
        ({}, 0),
    ],
)
def test_a_model_without_a_price_costs_what_each_does_or_else_the_dearest(prices: dict[str, int], cost: int) -> None:
    acme = Tenants(prices={model: TokenPrice(completion=price * DOLLAR) for model, price in prices.items()})
    admitted = acme.asks()
    assert isinstance(admitted, ChatAdmitted)
    assert admitted.reservation.cost_micros == cost


def test_what_costs_nothing_is_never_refused_for_money() -> None:
    acme = Tenants(Limits(cost_micros_per_day=10))
    assert acme.refuses() is None
    acme.settles(100, cost_micros=50)
    assert acme.refuses() is None
    acme.set(Limits(cost_micros_per_day=10), prices={"small": TokenPrice(completion=DOLLAR)})
    assert acme.refuses() == "cost_micros_per_day"


# --- credit


def test_an_open_reply_is_granted_what_the_budget_has_room_for() -> None:
    acme = Tenants(Limits(tokens_per_day=90))
    admitted = acme.asks(tokens=None)
    assert isinstance(admitted, ChatAdmitted)
    assert (admitted.reservation.granted, admitted.reservation.limit) == (74, "tokens_per_day")
    assert acme.refuses(tokens=None) == "tokens_per_day"


@pytest.mark.parametrize("asked", [{"tokens": 50}, {"tokens": None, "limits": Limits(tokens_per_minute=500)}])
def test_a_reply_that_is_bounded_or_has_no_budget_need_not_ask(asked: dict[str, Any]) -> None:
    acme = Tenants(asked.get("limits", Limits(tokens_per_day=500)))
    admitted = acme.asks(tokens=asked["tokens"])
    assert isinstance(admitted, ChatAdmitted)
    assert admitted.reservation.granted is None
    assert acme.runs(0) is None


def test_a_running_reply_gets_more_until_the_budget_is_spent() -> None:
    acme = Tenants(Limits(tokens_per_day=290))
    assert acme.refuses(tokens=None) is None
    told = [acme.runs(100), acme.runs(200), acme.runs(274)]
    assert [(one.granted, one.limit) for one in told if one] == [
        (200, None),
        (274, "tokens_per_day"),
        (274, "tokens_per_day"),
    ]
    assert acme.state.used.day_tokens == 290


def test_what_is_granted_after_midnight_counts_on_the_new_day() -> None:
    acme = Tenants(Limits(tokens_per_day=290))
    acme.now += 12 * HOUR - 2
    assert acme.refuses(tokens=None) is None
    acme.now += 1
    assert acme.runs(100)
    assert acme.state.used.day_tokens == 216
    acme.now += 1
    told = [acme.runs(200), acme.runs(300), acme.runs(400)]
    assert [(one.granted, one.limit) for one in told if one] == [
        (300, None),
        (400, None),
        (490, "tokens_per_day"),
    ]
    assert (acme.state.used.day_tokens, acme.state.used.month_tokens) == (290, 506)
    assert acme.refuses() == "tokens_per_day"


def test_what_a_reply_did_not_use_is_taken_back_from_the_days_it_counted_on_the_latest_first() -> None:
    def after_midnight(real: int) -> tuple[int, int]:
        acme = Tenants(Limits(tokens_per_day=1_000), LimitRule(person="*", limits=Limits(tokens_per_month=10_000)))
        acme.now += 12 * HOUR - 1
        assert acme.refuses(tokens=None, person="ann") is None
        acme.now += 1
        assert acme.runs(100)
        acme.settles(real)
        return acme.state.used.day_tokens, acme.state.used.month_tokens

    assert [after_midnight(real) for real in (216, 200, 50, 300)] == [(100, 216), (84, 200), (0, 50), (184, 300)]


def test_what_is_granted_in_a_new_month_counts_in_it() -> None:
    acme = Tenants(Limits(tokens_per_month=250))
    acme.now += 16 * DAY + 12 * HOUR - 1
    assert acme.refuses(tokens=None) is None
    acme.now += 1
    assert acme.runs(100)
    assert acme.state.used.month_tokens == 100
    acme.settles(150)
    assert acme.state.used.month_tokens == 34


def test_a_reply_that_asks_twice_is_told_the_same() -> None:
    acme = Tenants(Limits(tokens_per_day=1_000))
    assert acme.refuses(tokens=None) is None
    first = acme.runs(100)
    before = acme.state
    assert first
    again = acme.runs(100)
    assert again
    assert again.granted == first.granted
    assert acme.state == before


def test_money_bounds_a_reply_as_tokens_do_and_the_tightest_of_all_scopes_counts() -> None:
    each = LimitRule(person="*", limits=Limits(cost_micros_per_month=151))
    acme = Tenants(Limits(tokens_per_day=1_000), each, prices={"*": TokenPrice(completion=2 * DOLLAR)})
    admitted = acme.asks(tokens=None, person="ann")
    assert isinstance(admitted, ChatAdmitted)
    assert (admitted.reservation.granted, admitted.reservation.limit) == (75, "cost_micros_per_month")
    assert acme.refuses(tokens=None, person="bob") is None


def test_a_reply_that_goes_on_asking_keeps_its_reservation() -> None:
    acme = Tenants(Limits(tokens_per_day=10_000, concurrent_requests=1))
    assert acme.refuses(tokens=None) is None
    for number in range(1, 5):
        acme.now += HOLD_MS - MINUTE
        assert acme.runs(100 * number, request="r1")
        assert acme.refuses() == "concurrent_requests"


def test_a_reply_that_asks_later_than_its_reservation_lasted_is_granted_more_and_holds_a_slot_again() -> None:
    acme = Tenants(Limits(tokens_per_day=10_000, concurrent_requests=1), LimitRule(person="*", limits=Limits()))
    assert acme.refuses(tokens=None, person="ann") is None
    acme.now += HOLD_MS + 2 * MINUTE
    told = [acme.runs(100), acme.runs(100)]
    assert [(one.granted, one.limit) for one in told if one] == [(200, None), (200, None)]
    assert (acme.state.used.running, set(acme.state.held), len(acme.state.overdue)) == (1, {"r1"}, 0)
    assert acme.refuses() == "concurrent_requests"
    acme.settles(150, request="r1")
    assert (acme.state.used.running, acme.state.used.day_tokens) == (0, 150)


def test_a_question_that_is_heard_again_late_is_told_the_same_and_holds_the_slot_again() -> None:
    acme = Tenants(Limits(tokens_per_day=10_000, concurrent_requests=1))
    assert acme.refuses(tokens=None) is None
    assert acme.runs(100)
    acme.now += HOLD_MS + 2 * MINUTE
    again = acme.runs(100)
    assert again
    assert (again.granted, again.limit, acme.state.used.running) == (200, None, 1)
    assert acme.refuses() == "concurrent_requests"


# --- what is passed on


def test_weight_and_the_best_priority_travel_with_the_request() -> None:
    acme = Tenants(weight=2.5, priority=3)
    bold, modest = acme.asks(priority=0), acme.asks(priority=7)
    assert isinstance(bold, ChatAdmitted)
    assert isinstance(modest, ChatAdmitted)
    assert (bold.weight, bold.request.priority, modest.request.priority) == (2.5, 3, 7)


def test_a_client_is_told_the_limits_with_the_least_left() -> None:
    each = LimitRule(person="*", limits=Limits(tokens_per_minute=400))
    acme = Tenants(Limits(requests_per_minute=60, tokens_per_day=1_000, concurrent_requests=80), each)
    acme.asks(person="ann")
    admitted = acme.asks(person="ann")
    assert isinstance(admitted, ChatAdmitted)
    assert admitted.rate_limits
    requests, tokens = admitted.rate_limits.requests, admitted.rate_limits.tokens
    assert requests
    assert tokens
    assert (requests.name, requests.limit, requests.remaining, requests.reset_ms) == (
        "requests_per_minute",
        60,
        58,
        61_000,
    )
    assert (tokens.name, tokens.limit, tokens.remaining) == ("tokens_per_minute", 400, 200)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("requests", Limits(requests_per_minute=1, burst_requests=99)),
        ("tokens", Limits(tokens_per_minute=100, burst_tokens=9_900)),
    ],
)
def test_a_client_is_told_of_the_hour_where_that_has_less_left_than_the_minute(kind: str, limits: Limits) -> None:
    acme = Tenants(limits)
    assert [acme.refuses() for _ in range(59)] == [None] * 59
    last = acme.asks()
    assert isinstance(last, ChatAdmitted)
    assert last.rate_limits
    told = getattr(last.rate_limits, kind)
    hour = 60 * getattr(limits, f"{kind}_per_minute")
    assert (told.name, told.limit, told.remaining, told.reset_ms) == (f"{kind}_per_minute", hour, 0, HOUR + MINUTE)
    assert acme.refuses() == f"{kind}_per_minute"


def test_a_tenant_without_limits_is_told_of_none() -> None:
    admitted = Tenants().asks()
    assert isinstance(admitted, ChatAdmitted)
    assert admitted.rate_limits is None


# --- what is kept


def test_the_ledger_remembers_who_changed_what() -> None:
    acme = Tenants()
    acme.now += 5
    acme.set(Limits(tokens_per_day=9), LimitRule(person="*", limits=Limits(tokens_per_day=1)), by="ann", weight=2)
    acme.set(Limits(tokens_per_day=9), LimitRule(person="*", limits=Limits(tokens_per_day=1)), by="bob", weight=2)
    acme.set(Limits(), by="bob", weight=2)
    assert [(change.at_ms, change.by, change.what) for change in acme.state.changes] == [
        (NOON + 5, "ann", ("weight: 1.0 -> 2.0", "tokens_per_day: none -> 9", "person=* tokens_per_day: none -> 1")),
        (NOON + 5, "bob", ("tokens_per_day: 9 -> none", "person=* tokens_per_day: 1 -> none")),
    ]


def test_the_memory_of_changes_is_bounded() -> None:
    acme = Tenants()
    for number in range(2 * KEPT):
        rules = [LimitRule(person=f"{p}", limits=Limits(tokens_per_day=number)) for p in range(100)]
        acme.set(Limits(), *rules)
    assert len(acme.state.changes) == KEPT
    assert max(len(change.what) for change in acme.state.changes) == 21


def test_people_who_come_once_are_forgotten() -> None:
    acme = Tenants(None, LimitRule(person="*", limits=Limits(requests_per_minute=1)))
    for number in range(600):
        assert acme.refuses(person=f"p{number}", tokens=0) is None
        acme.settles(0)
    assert acme.state.counters.count == 600
    for _ in range(2 * counters.SHARDS):
        acme.now += SECOND
        acme.settles(0)
    assert (acme.state.counters.count, len(acme.state.counters.shards)) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.booleans()), max_size=120))
def test_people_beyond_the_most_share_counters_that_never_count_too_little(said: list[tuple[int, int, bool]]) -> None:
    now, real = moment(NOON), dict[str, int]()
    kept = Counters(HashTrieMap(), 0, 5)
    for person, tokens, sweeps in said:
        key = f"p{person}"
        kept = kept.put(key, kept.get(key, now).add(now, Need(tokens)))
        real[key] = real.get(key, 0) + tokens
        if sweeps:
            kept = kept.sweep(person, now)
        assert all(kept.get(one, now).day_tokens >= used for one, used in real.items())
        assert kept.count <= 5 + counters.SHARED
        assert kept.count == sum(map(len, kept.shards.values()))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=40))
def test_two_subjects_of_a_request_that_share_a_counter_are_counted_and_freed_twice(
    said: list[tuple[int, int, int, bool]],
) -> None:
    rules = [LimitRule(person="*", limits=Limits()), LimitRule(model="*", limits=Limits())]
    acme, owed, used = Tenants(None, *rules), dict[str, int](), dict[str, int]()
    acme.state = msgspec.structs.replace(acme.state, counters=Counters(HashTrieMap(), 0, 0))
    with pytest.MonkeyPatch.context() as few:
        few.setattr(counters, "SHARED", 2)
        for person, model, tokens, settles in said:
            names = {"person": f"p{person}", "body": {"model": f"m{model}", "max_tokens": tokens}}
            assert acme.refuses(**names) is None
            for name in (f"p{person}", f"m{model}"):
                used[name] = used.get(name, 0) + 16 + tokens
            if settles:
                acme.settles(16 + tokens)
        for number in range(1, len(said) + 1):
            held = acme.state.held.get(f"r{number}")
            owed |= {f"r{number}": held.tokens} if held else {}
        held_in = [one for shard in acme.state.counters.shards.values() for one in shard.values()]
        assert sum(one.running for one in held_in) == 2 * len(owed)
        assert sum(one.day_tokens for one in held_in) == sum(used.values())
        for request, tokens in owed.items():
            acme.settles(tokens, request=request)
        held_in = [one for shard in acme.state.counters.shards.values() for one in shard.values()]
        assert all(one.running == 0 for one in held_in)


def test_an_hours_burst_is_not_forgotten_where_a_month_ends() -> None:
    each = LimitRule(person="*", limits=Limits(tokens_per_minute=100, burst_tokens=6_000))
    acme = Tenants(None, each)
    acme.now += 16 * DAY + 12 * HOUR - 5 * MINUTE
    assert acme.refuses(person="ann", tokens=5_884) is None
    acme.settles(5_900)
    assert acme.refuses(person="ann", tokens=200) == "tokens_per_minute"
    acme.now += 6 * MINUTE
    for _ in range(2 * counters.SHARDS):
        acme.now += SECOND
        acme.settles(0, request="none")
    assert acme.refuses(person="ann", tokens=5_000) == "tokens_per_minute"


def test_of_two_limits_that_are_used_up_clients_are_told_the_one_that_lasts() -> None:
    acme = Tenants(Limits(requests_per_minute=1, concurrent_requests=1))
    told = acme.asks()
    assert isinstance(told, ChatAdmitted)
    assert told.rate_limits
    assert told.rate_limits.requests
    assert told.rate_limits.requests.name == "requests_per_minute"


def test_an_hour_that_begins_on_a_busy_tenant_is_corrected_like_its_minute() -> None:
    acme = Tenants(Limits(tokens_per_minute=1_000))
    assert acme.refuses(tokens=10) is None
    acme.set(Limits(tokens_per_minute=1_000, burst_tokens=59_000))
    assert acme.refuses(tokens=55_000) is None
    acme.settles(10)
    acme.now += 2 * MINUTE
    assert acme.refuses(tokens=55_000) is None


def test_only_the_shards_that_changed_are_written_again() -> None:
    acme = Tenants(None, LimitRule(person="*", limits=Limits(tokens_per_day=1_000)))
    for number in range(500):
        acme.asks(person=f"p{number}")
    before = ADMISSION.dump(acme.state)
    acme.asks(person="p7")
    written = {name for name, part in ADMISSION.dump(acme.state).items() if part is not before.get(name)}
    assert sum(name.startswith("used/") for name in written) == 1
    assert max(len(codec.dumps(part)) for part in before.values()) < 64_000


def test_a_ledger_of_the_first_format_is_read_on() -> None:
    second = NOON // SECOND
    parts: dict[str, object] = {
        "head": {
            "clock_ms": NOON,
            "limits": {"tokens_per_day": 200, "concurrent_requests": 2},
            "requests": [[second, 1]],
            "tokens": [[second, 100]],
            "day": NOON // DAY,
            "day_tokens": 100,
        },
        "ids/0": {"newest_ms": NOON, "ids": ["r1"]},
        "held/0": {"r1": [100, NOON, NOON + HOUR]},
    }
    acme = Tenants()
    acme.state = ADMISSION.load(ACME, parts)
    acme.number = 1
    assert acme.refuses() is None
    assert acme.refuses() == "tokens_per_day"
    acme.settles(0, request="r1")
    assert acme.state.used.day_tokens == 100
    assert acme.state.used.running == 1


def test_a_new_counter_counts_nothing() -> None:
    assert Counter().idle
    assert not Counter().add(moment(NOON), Need(1)).idle
