"""Laws of admission, checked on random histories against a reference that keeps every fact and forgets nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    Limits,
    QuotaLimitSet,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.topics import DAY_MS
from klatch_streams.admission import Admission
from klatch_streams.kernel import Emit, Input
from klatch_streams.quota.ledger import Ledger
from klatch_streams.seen import BUCKET, HOUR_MS, MEMORY_MS, Seen
from klatch_streams.windows import SLOT_MS, Window

ADMISSION = Admission()
START = 1_800_014_400_000
ACME = Tenant("acme")
MINUTE = 60_000

_steps = st.sampled_from([0, 0, 1, 999, 1_000, 20_000, 59_999, 60_000, 61_000, 15 * MINUTE, DAY_MS // 2, DAY_MS + 1])
_requests = st.integers(0, 12).map(lambda number: RequestId(f"r{number}"))
_amounts = st.integers(0, 60)
_most = st.none() | st.integers(0, 150)


def _ask(request: RequestId, tokens: int, deadline_ms: int | None) -> ChatRequested:
    return ChatRequested(
        request=request,
        tenant=ACME,
        conversation=Conversation("c"),
        body={"model": "m", "max_tokens": tokens},
        deadline_ms=deadline_ms,
    )


def _settle(request: RequestId, tokens: int) -> UsageSettled:
    return UsageSettled(request=request, tenant=ACME, status="completed", usage=Usage(completion_tokens=tokens))


_asks = st.builds(_ask, _requests, _amounts, st.none() | st.integers(START, START + 3 * DAY_MS))
_settles = st.builds(_settle, _requests, _amounts)
_limits = st.builds(
    lambda *most: QuotaLimitSet(
        tenant=ACME,
        limits=Limits(
            requests_per_minute=most[0],
            tokens_per_minute=most[1],
            tokens_per_day=most[2],
            concurrent_requests=most[3],
        ),
    ),
    st.none() | st.integers(0, 4),
    _most,
    _most,
    st.none() | st.integers(0, 4),
)


def _history(steps: Sequence[tuple[int, Event]]) -> list[Input[Ledger]]:
    now, said = START, list[Input[Ledger]]()
    for step, event in steps:
        now += step
        said.append(Input(event, now))
    return said


_histories = st.lists(st.tuples(_steps, _asks | _asks | _settles | _limits), max_size=60).map(_history)


def _run(state: Ledger, said: Sequence[Input[Ledger]]) -> tuple[Ledger, list[list[Emit]]]:
    effects = list[list[Emit]]()
    for one in said:
        state, more = ADMISSION.decide(state, one)
        effects.append(list(more))
    return state, effects


@dataclass
class Admitted:
    """A fact of the reference: when it entered, what it costs as far as is known, until when it holds its slot."""

    entered_ms: int
    tokens: int
    until_ms: int


@dataclass
class Reference:
    """All facts, no arithmetic that is kept up to date."""

    admitted: dict[str, Admitted] = field(default_factory=dict[str, Admitted])
    limits: Limits = Limits()

    def hear(self, one: Input[Ledger], effects: Sequence[Emit]) -> None:
        match one.event:
            case QuotaLimitSet(limits=limits):
                self.limits = limits
            case UsageSettled(request=request, usage=usage):
                fact = self.admitted.get(request)
                if fact and fact.until_ms > one.timestamp_ms:
                    fact.tokens, fact.until_ms = usage.total_tokens, one.timestamp_ms
            case _:
                for effect in effects:
                    if isinstance(effect.event, ChatAdmitted):
                        kept = effect.event.reservation
                        request = effect.event.request.request
                        self.admitted[request] = Admitted(one.timestamp_ms, kept.tokens, kept.expires_ms)

    def used(self, now_ms: int, window_ms: int) -> dict[str, int]:
        """What counts against each limit, with a minute that is `window_ms` long."""
        facts = self.admitted.values()
        minute = [fact for fact in facts if fact.entered_ms > now_ms - window_ms]
        day = [fact for fact in facts if fact.entered_ms // DAY_MS == now_ms // DAY_MS]
        return {
            "requests_per_minute": len(minute),
            "tokens_per_minute": sum(fact.tokens for fact in minute),
            "tokens_per_day": sum(fact.tokens for fact in day),
            "concurrent_requests": sum(fact.until_ms > now_ms for fact in facts),
        }

    def most(self, name: str) -> float:
        most = cast("int | None", getattr(self.limits, name))
        return float("inf") if most is None else most


@given(_histories)
def test_no_limit_is_ever_exceeded_by_what_is_admitted(history: list[Input[Ledger]]) -> None:
    state, reference = ADMISSION.initial(ACME), Reference()
    for one in history:
        state, effects = ADMISSION.decide(state, one)
        reference.hear(one, effects)
        if any(isinstance(effect.event, ChatAdmitted) for effect in effects):
            for name, used in reference.used(one.timestamp_ms, MINUTE).items():
                assert used <= reference.most(name), name


@given(_histories)
def test_what_is_refused_would_have_exceeded_the_limit_that_refused_it(history: list[Input[Ledger]]) -> None:
    state, reference = ADMISSION.initial(ACME), Reference()
    for one in history:
        state, effects = ADMISSION.decide(state, one)
        reference.hear(one, effects)
        for effect in effects:
            if isinstance(effect.event, ChatRefused) and (name := effect.event.refusal.limit):
                assert isinstance(one.event, ChatRequested)
                need = 1 if "requests" in name else 16 + cast("int", one.event.body["max_tokens"])
                # The window may hold what is up to one slot older than a minute.
                used = reference.used(one.timestamp_ms, MINUTE + SLOT_MS)[name]
                assert used + need > reference.most(name)


@given(_histories, st.data())
def test_what_was_heard_before_changes_nothing_when_it_is_heard_again(
    history: list[Input[Ledger]], data: st.DataObject
) -> None:
    # Within a day: an id that was forgotten may be used again, and is then a new request.
    history = _in_causal_order([one for one in history if one.timestamp_ms < START + MEMORY_MS])
    state, _ = _run(ADMISSION.initial(ACME), history)
    again = history[: data.draw(st.integers(0, len(history)))]
    # The limits in force are those said last: repeated older settings count until the newer ones are repeated too.
    settings = [one for one in history if isinstance(one.event, QuotaLimitSet)]
    repeated, effects = _run(state, [*again, *settings])
    assert not any(effects)
    # That an operator said it again is a fact, and the only difference.
    assert {**ADMISSION.dump(repeated), "changes": ()} == {**ADMISSION.dump(state), "changes": ()}


def _in_causal_order(history: list[Input[Ledger]]) -> list[Input[Ledger]]:
    """Without settlements of what nobody had asked for yet: usage follows a request that was admitted."""
    asked, kept = set[str](), list[Input[Ledger]]()
    for one in history:
        if isinstance(one.event, ChatRequested):
            asked.add(one.event.request)
        if not isinstance(one.event, UsageSettled) or one.event.request in asked:
            kept.append(one)
    return kept


@given(_histories, st.integers(0, 60))
def test_a_ledger_that_was_written_and_read_back_decides_the_same(history: list[Input[Ledger]], cut: int) -> None:
    whole, effects = _run(ADMISSION.initial(ACME), history)
    state, before = _run(ADMISSION.initial(ACME), history[:cut])
    parts = cast("dict[str, object]", codec.loads(codec.dumps(ADMISSION.dump(state))))
    restored, after = _run(ADMISSION.load(ACME, parts), history[cut:])
    assert before + after == effects
    assert ADMISSION.dump(restored) == ADMISSION.dump(whole)


@given(_histories)
def test_settling_what_was_admitted_leaves_only_what_was_really_used(history: list[Input[Ledger]]) -> None:
    state, _ = _run(ADMISSION.initial(ACME), history)
    now = state.clock_ms
    running = list(state.held.items())
    for request, _ in running:
        state, _ = ADMISSION.decide(state, Input(_settle(RequestId(request), 0), now))
    assert not state.held
    assert state.used.tokens.total >= 0
    assert state.used.day_tokens >= 0


def test_a_ledger_does_not_grow_with_the_length_of_its_history() -> None:
    state, step = ADMISSION.initial(ACME), MEMORY_MS // 1_000
    sizes = list[int]()
    for number in range(4_000):
        asked: Input[Ledger] = Input(_ask(RequestId(f"r{number}"), 10, None), START + number * step)
        state, _ = ADMISSION.decide(state, asked)
        sizes.append(
            len(state.seen.ids) + len(state.held) + len(state.used.requests.slots) + len(state.used.tokens.slots)
        )
        assert len(state.overdue) <= len(state.seen.ids)
    assert max(sizes[2_000:]) <= 1_000 + BUCKET + 20
    assert len(ADMISSION.dump(state)) <= 2 * (25 + 1_000 // BUCKET + 2) + 3, "a bucket an hour, at least"


def test_no_part_of_a_snapshot_grows_with_the_traffic() -> None:
    state = ADMISSION.initial(ACME)
    for number in range(4_000):
        asked: Input[Ledger] = Input(_ask(RequestId(f"{number:0128}"), 10, None), START + number)
        state, _ = ADMISSION.decide(state, asked)
    assert max(len(codec.dumps(part)) for part in ADMISSION.dump(state).values()) < 64_000


@given(st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 9)), min_size=1, max_size=40))
def test_a_window_counts_all_of_the_last_minute_and_at_most_a_second_more(added: list[tuple[int, int]]) -> None:
    window, now, facts = Window(), START, list[tuple[int, int]]()
    for step, amount in added:
        now += step
        window = window.at(now).add(now, amount)
        facts.append((now, amount))
    counts = sum(amount for at, amount in facts if at > now - MINUTE)
    at_most = sum(amount for at, amount in facts if at > now - MINUTE - SLOT_MS)
    assert counts <= window.total <= at_most
    assert window == Window.of(window.slots)


@given(st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 9)), min_size=1, max_size=40), st.integers(1, 9))
def test_a_window_has_room_when_it_said_it_would_and_no_sooner(added: list[tuple[int, int]], amount: int) -> None:
    window, now, limit = Window(), START, 12
    for step, one in added:
        now += step
        window = window.at(now).add(now, one)
    wait = window.wait_for(now, amount, limit)
    assert wait is not None
    assert window.at(now + wait).total + amount <= limit
    assert wait == 0 or window.at(now + wait - 1).total + amount > limit


@given(st.lists(st.integers(0, MEMORY_MS // 8), max_size=80))
def test_an_id_is_remembered_for_at_least_a_day(steps: list[int]) -> None:
    seen, now, times = Seen(), START, dict[str, int]()
    for number, step in enumerate(steps):
        now += step
        seen = seen.forget(now)
        assert all(one in seen for one, at in times.items() if now - at <= MEMORY_MS)
        seen = seen.insert(now, f"r{number}")
        times[f"r{number}"] = now


@pytest.mark.parametrize("hours", [1, 3, 10])
def test_an_id_is_forgotten_after_a_day_and_an_hour_however_seldom_others_come(hours: int) -> None:
    seen = Seen()
    for at in range(0, 24 * 14, hours):
        now = START + at * HOUR_MS
        seen = seen.forget(now)
        assert all(f"r{before}" not in seen for before in range(0, at - 25, hours))
        seen = seen.insert(now, f"r{at}")


@pytest.mark.parametrize("size", [0, 1, BUCKET - 1, BUCKET, BUCKET + 1])
def test_all_that_is_old_enough_is_forgotten_in_time(size: int) -> None:
    seen = Seen()
    for number in range(size):
        seen = seen.insert(START, f"r{number}")
    for _ in range(2):
        seen = seen.forget(START + MEMORY_MS + 1)
    assert (len(seen.ids), len(seen.buckets)) == (0, 0)
    assert seen == Seen.of({}), "whoever restores it numbers what follows alike"
    seen = seen.insert(START + MEMORY_MS + 1, "next")
    assert "next" in seen
    assert "next" not in seen.forget(START + 2 * MEMORY_MS + 2)
