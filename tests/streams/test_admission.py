"""What admission decides: every state of a request against every event."""

from collections.abc import Sequence
from typing import cast

import pytest

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    Limits,
    QuotaLimitSet,
    Status,
    StreamCancel,
    StreamEnd,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_STREAM
from klatch_streams.admission import HOLD_MS, Admission
from klatch_streams.kernel import Emit, Input, fold
from klatch_streams.quota.ledger import Ledger
from klatch_streams.seen import BUCKET, MEMORY_MS

ADMISSION = Admission()
NOON = 1_800_014_400_000
"""A UTC noon, on a whole minute."""
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
ACME = Tenant("acme")


def ask(request: str = "r1", *, tenant: Tenant = ACME, tokens: int = 100, deadline_ms: int | None = None) -> Event:
    """A request whose estimate is exactly `tokens`."""
    return ChatRequested(
        request=RequestId(request),
        tenant=tenant,
        conversation=Conversation("c1"),
        body={"model": "m", "max_tokens": tokens - 16},
        deadline_ms=deadline_ms,
    )


def settle(request: str = "r1", tokens: int = 30, status: Status = "completed", tenant: Tenant = ACME) -> Event:
    return UsageSettled(
        request=RequestId(request),
        tenant=tenant,
        status=status,
        usage=Usage(prompt_tokens=tokens),
    )


def limit(
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    tokens_per_day: int | None = None,
    concurrent_requests: int | None = None,
) -> Event:
    return QuotaLimitSet(
        tenant=ACME,
        limits=Limits(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            tokens_per_day=tokens_per_day,
            concurrent_requests=concurrent_requests,
        ),
    )


def at(time_ms: int, *events: Event) -> list[Input[Ledger]]:
    return [Input(event, time_ms) for event in events]


def run(*said: Input[Ledger]) -> tuple[Ledger, list[Emit]]:
    return fold(ADMISSION, ACME, said)


def after(said: Sequence[Input[Ledger]], *events: Event, ms: int) -> list[Emit]:
    """The effects of `events`, `ms` after noon, when `said` was before."""
    before, _ = run(*said)
    effects = list[Emit]()
    for one in at(NOON + ms, *events):
        before, more = ADMISSION.decide(before, one)
        effects += more
    return effects


def outcome(effects: Sequence[Emit]) -> str:
    """What became of the one request that `effects` speak of."""
    match [effect.event for effect in effects]:
        case []:
            return "nothing"
        case [ChatAdmitted()]:
            return "admitted"
        case [StreamEnd(status=status), ChatRefused()]:
            return status
        case other:
            raise AssertionError(f"unexpected effects: {other}")


STATES: dict[str, list[Input[Ledger]]] = {
    "fresh": [],
    "running": at(NOON, ask()),
    "settled": at(NOON, ask(), settle()),
    "rejected": at(NOON, limit(concurrent_requests=0), ask()) + at(NOON, limit()),
    "expired": at(NOON, ask(deadline_ms=NOON - 1)),
    "abandoned": at(NOON, ask()) + at(NOON + HOUR, limit()),
}
EVENTS: dict[str, Event] = {
    "the same request": ask(),
    "another request": ask("r2"),
    "its settlement": settle(),
    "another's settlement": settle("r2"),
    "a foreign event": StreamCancel(request=RequestId("r1"), tenant=ACME, conversation=Conversation("c1"), by="ann"),
}
TABLE = {(state, event): "nothing" for state in STATES for event in EVENTS} | {
    (state, "another request"): "admitted" for state in STATES
}
TABLE["fresh", "the same request"] = "admitted"


@pytest.mark.parametrize(("state", "event"), TABLE)
def test_every_state_answers_every_event(state: str, event: str) -> None:
    assert outcome(after(STATES[state], EVENTS[event], ms=2 * HOUR)) == TABLE[state, event]


def test_an_admitted_request_carries_its_reservation_and_the_time_of_its_record() -> None:
    _, [effect] = run(*at(NOON + 7, ask(tokens=250)))
    assert (effect.topic, effect.key) == (CHAT_ADMITTED, "c1")
    assert isinstance(effect.event, ChatAdmitted)
    assert effect.event.request == ask(tokens=250)
    assert effect.event.requested_ms == NOON + 7
    assert effect.event.reservation.tokens == 250
    assert effect.event.reservation.expires_ms == NOON + HOLD_MS + MINUTE


def test_a_refusal_ends_the_stream_and_is_told_to_the_stages() -> None:
    end, refused = after(at(NOON, limit(tokens_per_minute=150), ask("r0")), ask(tokens=51), ms=0)
    assert (end.topic, end.key, refused.topic, refused.key) == (CHAT_STREAM, "c1", CHAT_ADMITTED, "c1")


LIMITS: dict[str, tuple[Event, int | None]] = {
    "requests_per_minute": (limit(requests_per_minute=1), 61 * SECOND),
    "tokens_per_minute": (limit(tokens_per_minute=199), 61 * SECOND),
    # What is reserved for a request that runs may come back any moment; what is settled stays.
    "tokens_per_day": (limit(tokens_per_day=199), SECOND),
    "concurrent_requests": (limit(concurrent_requests=1), SECOND),
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_refuses_with_its_name_and_when_to_try_again(name: str) -> None:
    setting, wait = LIMITS[name]
    end, refused = after(at(NOON, setting, ask("r1")), ask("r2"), ms=0)
    assert isinstance(end.event, StreamEnd)
    assert isinstance(refused.event, ChatRefused)
    error = end.event.error
    assert error is not None
    assert (end.event.status, end.event.attempt, end.event.writer) == ("rejected", 0, "admission")
    assert (error.code, error.limit, error.retry_after_ms) == ("rate_limit_exceeded", name, wait)
    refusal = refused.event.refusal
    assert (refusal.code, refusal.limit, refusal.retry_after_ms) == (error.code, error.limit, error.retry_after_ms)
    assert refusal.message == error.message


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute", "tokens_per_day"])
def test_a_request_that_waited_as_told_is_admitted_and_not_a_millisecond_earlier(name: str) -> None:
    setting, wait = LIMITS[name]
    wait = 12 * HOUR if name == "tokens_per_day" else wait
    assert wait is not None
    before = at(NOON, setting, ask("r1"), settle("r1", 100))
    assert outcome(after(before, ask("r2"), ms=wait - 1)) == "rejected"
    assert outcome(after(before, ask("r2"), ms=wait)) == "admitted"


@pytest.mark.parametrize("name", ["tokens_per_minute", "tokens_per_day"])
def test_a_request_that_can_never_fit_is_told_so(name: str) -> None:
    setting, _ = LIMITS[name]
    end, _ = after(at(NOON, setting), ask(tokens=200), ms=0)
    assert isinstance(end.event, StreamEnd)
    assert end.event.error is not None
    assert end.event.error.retry_after_ms is None
    assert "make it smaller" in end.event.error.message


def test_of_several_limits_the_one_that_lasts_longest_is_named() -> None:
    both = limit(requests_per_minute=1, tokens_per_day=199, concurrent_requests=1)
    end, _ = after(at(NOON, both, ask("r1"), settle("r1", 100)), ask("r2"), ms=0)
    assert isinstance(end.event, StreamEnd)
    assert end.event.error is not None
    assert end.event.error.limit == "tokens_per_day"


def test_a_request_after_its_deadline_ends_expired() -> None:
    end, refused = after([], ask(deadline_ms=NOON + 9), ms=10)
    assert isinstance(end.event, StreamEnd)
    assert isinstance(refused.event, ChatRefused)
    assert end.event.error is not None
    assert (end.event.status, end.event.error.code) == ("expired", "deadline_exceeded")
    assert refused.event.refusal.code == "deadline_exceeded"
    assert outcome(after([], ask(deadline_ms=NOON + 10), ms=10)) == "admitted"


def test_settling_frees_the_slot_and_what_was_reserved_too_much() -> None:
    before = at(NOON, limit(tokens_per_minute=130, tokens_per_day=130, concurrent_requests=1), ask(tokens=100))
    assert outcome(after(before, ask("r2"), ms=1)) == "rejected"
    assert outcome(after(before, settle(tokens=30), ask("r2"), ms=1)) == "admitted"
    assert outcome(after(before, settle(tokens=31), ask("r2"), ms=1)) == "rejected"


def test_a_settlement_counts_once_however_often_it_comes() -> None:
    once, _ = run(*at(NOON, ask(), settle(tokens=400)))
    thrice, _ = run(*at(NOON, ask(), settle(tokens=400), settle(tokens=500), settle(tokens=400)))
    assert once == thrice
    assert (once.used.tokens.total, once.used.day_tokens) == (400, 400)


def test_a_reservation_that_nobody_settles_frees_its_slot_and_its_estimate_stands() -> None:
    before = at(NOON, limit(concurrent_requests=1), ask(tokens=100))
    assert outcome(after(before, ask("r2"), ms=HOLD_MS - 1)) == "rejected"
    assert outcome(after(before, ask("r2"), ms=HOLD_MS)) == "admitted"
    state, _ = run(*before, *at(NOON + HOUR, ask("r2", tokens=50)))
    assert (set(state.held), state.used.day_tokens, state.used.running) == ({"r2"}, 150, 1)


@pytest.mark.parametrize("tokens", [1, 30_000])
def test_a_request_that_ran_longer_than_its_reservation_is_settled_all_the_same_and_once(tokens: int) -> None:
    late = at(NOON + HOUR, settle(tokens=tokens), settle(tokens=tokens), settle(tokens=7))
    state, _ = run(*at(NOON, ask(tokens=100)), *late)
    assert (state.used.day_tokens, state.used.running, len(state.overdue)) == (tokens, 0, 0)


def test_what_may_still_be_settled_is_in_the_snapshot_and_is_forgotten_with_its_id() -> None:
    state, _ = run(*at(NOON, ask(tokens=100)), *at(NOON + HOUR, ask("r2")))
    restored = ADMISSION.load(ACME, cast("dict[str, object]", codec.loads(codec.dumps(ADMISSION.dump(state)))))
    assert set(restored.overdue) == {"r1"}
    late, _ = ADMISSION.decide(restored, Input(settle(tokens=1), NOON + HOUR))
    assert late.used.day_tokens == state.used.day_tokens - 99
    for ms in (MEMORY_MS + HOUR + 1, MEMORY_MS + HOUR + 2):
        state, _ = ADMISSION.decide(state, Input(settle("r1", tokens=300), NOON + ms))
    assert (len(state.overdue), len(state.seen.ids), state.used.day_tokens) == (0, 0, 0)


def test_a_reservation_that_expires_when_its_id_is_forgotten_is_forgotten_too() -> None:
    state, _ = run(*at(NOON, ask()), *at(NOON + 2 * DAY, ask("r2")))
    assert (set(state.held), len(state.overdue)) == ({"r2"}, 0)


def test_a_reservation_outlives_its_deadline_but_never_the_memory_of_its_id() -> None:
    hour, _ = run(*at(NOON, ask(deadline_ms=NOON + HOUR)))
    year, _ = run(*at(NOON, ask(deadline_ms=NOON + 365 * DAY)))
    assert hour.held["r1"].expires_ms == NOON + HOUR + HOLD_MS
    assert year.held["r1"].expires_ms == NOON + MEMORY_MS


def test_yesterdays_tokens_do_not_count_today_and_settling_them_changes_nothing_today() -> None:
    before = at(NOON, limit(tokens_per_day=100), ask(tokens=100, deadline_ms=NOON + 13 * HOUR))
    state, effects = run(*before, *at(NOON + 12 * HOUR, ask("r2"), settle(tokens=1), ask("r3", tokens=17)))
    assert [type(effect.event) for effect in effects] == [ChatAdmitted, ChatAdmitted, StreamEnd, ChatRefused]
    assert state.used.day_tokens == 100


def test_a_request_id_is_remembered_for_a_day_and_then_forgotten() -> None:
    before = at(NOON, *(ask(f"r{number}") for number in range(BUCKET)))
    assert outcome(after(before, ask("r0"), ms=MEMORY_MS)) == "nothing"
    assert outcome(after(before, ask("r0"), ms=MEMORY_MS + 1)) == "admitted"


def test_a_record_of_another_tenant_changes_nothing() -> None:
    for event in (ask(tenant=Tenant("other")), settle(tenant=Tenant("other"))):
        assert run(*at(NOON, event)) == (ADMISSION.initial(ACME), [])


def test_a_slot_that_expires_before_an_older_one_is_freed_in_time() -> None:
    before = at(NOON, limit(concurrent_requests=2), ask("r1", deadline_ms=NOON + HOUR), ask("r2"))
    assert outcome(after(before, ask("r3"), ms=HOLD_MS - 1)) == "rejected"
    assert outcome(after(before, ask("r3"), ms=HOLD_MS)) == "admitted"


def test_a_clock_that_steps_back_does_not_turn_decisions_back() -> None:
    before = at(NOON, limit(requests_per_minute=1), ask("r1"))
    assert outcome(after(before, ask("r2"), ms=-DAY)) == "rejected"


def test_only_the_newest_ids_are_written_again() -> None:
    state, _ = run(*at(NOON, *(ask(f"r{number}") for number in range(2 * BUCKET)), settle("r0")))
    before = ADMISSION.dump(state)
    after_one, _ = ADMISSION.decide(state, Input(ask("late"), NOON + 1))
    written = {name for name, part in ADMISSION.dump(after_one).items() if part != before.get(name)}
    assert written == {"head", "ids/2", "held/2"}
