"""Admission: which requests of a tenant may run, decided in the order of the tenant's own log.

A request is admitted once (ids are remembered for 24 hours), before its deadline, and within the limits of all its
scopes (`quota.rules`, `quota.checks`); whatever is refused gets its `stream.end` here. Its estimated cost is reserved
on entry and replaced by the real one when its usage is settled, so a limit is never exceeded by more than estimates
were too low.

A request that does not say how long its reply may be is granted what its budgets (of days and months) have room for,
up to the estimate; the reply asks for more while it runs (`usage.running`) and is told how far it may go
(`stream.budget`). So a budget ends replies that run, and is used up before it refuses. What is granted after midnight
counts on the new day.

A reservation that nobody settles expires 15 minutes after its deadline (or its request, or its last `usage.running`),
and no later than the memory of its id: the slot is free again, whether or not the request still runs, and the estimate
stands as its cost until it is settled after all (`Ledger.overdue`). A settlement of what is not known is a repeat, or
came a day late, and changes nothing. A refused id stays refused.

Embeddings count like chat completions whose replies have no tokens; who asked for them, a door, is answered in
`chat.stream`.
"""

from __future__ import annotations  # rpds classes take type arguments in annotations only

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
from rpds import HashTrieMap

from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    EmbeddingAdmitted,
    EmbeddingRequested,
    QuotaLimitSet,
    RateLimits,
    Refusal,
    Reservation,
    Status,
    StreamBudget,
    StreamEnd,
    StreamError,
    TokenPrice,
    UsageRunning,
    UsageSettled,
)
from klatch_schemas.ids import Writer
from klatch_schemas.topics import ADMISSION_STATE, CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, Topic
from klatch_streams.estimate import Estimate, Estimated
from klatch_streams.kernel import Emit, Input
from klatch_streams.quota import checks, ledger
from klatch_streams.quota.calendar import Moment, moment
from klatch_streams.quota.changes import recorded
from klatch_streams.quota.checks import Counted
from klatch_streams.quota.counters import Correction, Counter, Counters, Need
from klatch_streams.quota.ledger import Held, Ledger
from klatch_streams.quota.rules import Asked, Rules, Scope, Settings, micros, model_of
from klatch_streams.seen import MEMORY_MS

WRITER: Final = Writer("admission")
HOLD_MS: Final = 15 * 60_000
EMBEDDING_PRIORITY: Final = 5
"""That of a chat request that names none."""
LEAST_GRANT: Final = 16
"""A reply is not begun for fewer tokens."""
_MINUTE_MS: Final = 60_000
_GIVEN_UP_AT_ALL: Final = "klatch failed on this request; the worker's log tells why"
_GIVEN_UP: Final = {"request_too_large": "the request leaves no room for what klatch adds to it: keep it smaller"}


class Admission:
    """The decider; one `Ledger` a tenant."""

    name: str = "admission"
    input: Topic = CHAT_REQUESTS
    state: Topic = ADMISSION_STATE

    def __init__(self, estimate: Estimate | None = None) -> None:
        self._estimate = estimate or Estimate()

    def initial(self, key: str) -> Ledger:
        """The ledger of a tenant that was never heard of: no limits, nothing used."""
        return Ledger(key)

    def dump(self, state: Ledger) -> dict[str, object]:
        """See `quota.ledger`."""
        return ledger.dump(state)

    def load(self, key: str, parts: dict[str, object]) -> Ledger:
        """What `dump` wrote, as a ledger again."""
        return ledger.load(key, parts)

    def decide(self, state: Ledger, said: Input[Ledger]) -> tuple[Ledger, Sequence[Emit]]:
        """The next ledger, and what follows."""
        match said.event:
            case ChatRequested() | EmbeddingRequested() | UsageSettled() | UsageRunning() | QuotaLimitSet() if (
                said.event.tenant != state.tenant
            ):
                # Under another tenant's key it has no place in this order: owners move it to its own (`Addresses`).
                return state, ()
            case ChatRequested() | EmbeddingRequested():
                return self._request(advanced(state, said.timestamp_ms), said.event, said.timestamp_ms)
            case UsageSettled():
                return _settle(advanced(state, said.timestamp_ms), said.event), ()
            case UsageRunning():
                return _grant(advanced(state, said.timestamp_ms), said.event, self._estimate.completion)
            case QuotaLimitSet():
                return _set(advanced(state, said.timestamp_ms), said.event), ()
            case _:
                return state, ()

    def give_up(self, state: Ledger, said: Input[Ledger], code: str) -> tuple[Ledger, Sequence[Emit]]:
        """A request on which `decide` failed, or whose admission the log cannot hold, ends; its id stays used."""
        match said.event:
            case ChatRequested() | EmbeddingRequested() as asked if (
                asked.tenant == state.tenant and asked.request not in state.seen
            ):
                now_ms = max(state.clock_ms, said.timestamp_ms)
                known = msgspec.structs.replace(state, clock_ms=now_ms, seen=state.seen.insert(now_ms, asked.request))
                error = StreamError(code=code, message=_GIVEN_UP.get(code, _GIVEN_UP_AT_ALL))
                end = StreamEnd(
                    request=asked.request,
                    tenant=asked.tenant,
                    conversation=asked.conversation,
                    writer=WRITER,
                    status="failed",
                    error=error,
                )
                return known, [Emit(CHAT_STREAM, asked.conversation, end)]
            case _:
                return state, ()

    def _request(self, state: Ledger, asked: Asked, requested_ms: int) -> tuple[Ledger, Sequence[Emit]]:
        if asked.request in state.seen:
            return state, ()
        seen = state.seen.insert(state.clock_ms, asked.request)
        known = msgspec.structs.replace(state, seen=seen)
        if asked.deadline_ms is not None and asked.deadline_ms < state.clock_ms:
            late = Refusal(code="deadline_exceeded", message="the deadline had passed when the request was read")
            return known, _refused(asked, "expired", late)
        now = moment(state.clock_ms)
        counted = _counted(state, state.rules.scopes(asked), now)
        plan = _plan(counted, self._estimated(asked), state.rules.price_of(model_of(asked)))
        if refusal := checks.refusal(counted, plan.need, now):
            return known, _refused(asked, "rejected", refusal, checks.rate_limits(counted, now))
        held = Held(
            tokens=plan.need.tokens,
            entered_ms=state.clock_ms,
            expires_ms=_expiry(state.clock_ms, state.clock_ms, asked.deadline_ms),
            bucket=seen.newest,
            micros=plan.need.micros,
            granted=plan.granted,
            price=plan.price.completion,
            scopes=tuple(scope.key for scope, _ in counted),
        )
        state, counted = _entered(_held(known, asked.request, held), counted, plan.need, now)
        terms = _Terms(plan.limit, checks.rate_limits(counted, now))
        return state, [_admitted(state.rules.settings, asked, requested_ms, held, terms)]

    def _estimated(self, asked: Asked) -> Estimated:
        if isinstance(asked, EmbeddingRequested):
            return Estimated(asked.tokens, 0, bounded=True)
        return self._estimate.of(asked.body)


# --- time ---------------------------------------------------------------------------------------------------------


def advanced(state: Ledger, timestamp_ms: int) -> Ledger:
    """The ledger at a record's time: old ids forgotten, reservations expired, a few counters looked through."""
    now = max(state.clock_ms, timestamp_ms)
    swept, counters = state.swept, state.counters
    if now // 1_000 != state.clock_ms // 1_000 and counters.count:
        swept, counters = swept + 1, counters.sweep(swept, moment(now))
    seen = state.seen.forget(now)
    overdue = (
        state.overdue if seen is state.seen else _without(state.overdue, state.seen.buckets[state.seen.oldest].ids)
    )
    state = msgspec.structs.replace(state, clock_ms=now, seen=seen, overdue=overdue, swept=swept, counters=counters)
    return _expire(state) if state.held and now >= state.next_expiry_ms else state


def _without(overdue: HashTrieMap[str, Held], ids: Sequence[str]) -> HashTrieMap[str, Held]:
    if overdue:
        for one in ids:
            overdue = overdue.discard(one)
    return overdue


def _expire(state: Ledger) -> Ledger:
    # Expiries fall on whole minutes, so the reservations are walked through at most once a minute.
    for request, one in state.held.items():
        if one.expires_ms <= state.clock_ms:
            state = _release(state, request, one, Need(0))
            if request in state.seen:
                state = msgspec.structs.replace(state, overdue=state.overdue.insert(request, one))
    return msgspec.structs.replace(state, next_expiry_ms=ledger.next_expiry(state.held.values()))


def _expiry(now_ms: int, entered_ms: int, deadline_ms: int | None) -> int:
    due = max(now_ms, deadline_ms or 0) + HOLD_MS
    whole_minute = -(-due // _MINUTE_MS) * _MINUTE_MS
    # The id must be remembered as long as its reservation, or a repeat would be admitted beside it.
    return min(whole_minute, (entered_ms + MEMORY_MS) // _MINUTE_MS * _MINUTE_MS)


# --- limits -------------------------------------------------------------------------------------------------------


def _set(state: Ledger, said: QuotaLimitSet) -> Ledger:
    old, new = state.rules.settings, Settings.of(said)
    changes = recorded(state.changes, state.clock_ms, said.by, old, new)
    return state if old == new else msgspec.structs.replace(state, rules=Rules(new), changes=changes)


def _counted(state: Ledger, scopes: Sequence[Scope], now: Moment) -> list[Counted]:
    return [Counted(scope, _counter(state.used, state.counters, scope, now)) for scope in scopes]


def _counter(used: Counter, counters: Counters, scope: Scope, now: Moment) -> Counter:
    counter = counters.get(scope.key, now) if scope.key else used.at(now)
    limits = scope.limits
    return counter.bursting(now, limits.burst_requests is not None, limits.burst_tokens is not None)


def _entered(state: Ledger, counted: Sequence[Counted], need: Need, now: Moment) -> tuple[Ledger, list[Counted]]:
    """With a request counted in each of its scopes, of which two may share a counter."""
    used, counters, after = state.used, state.counters, list[Counted]()
    for scope, looked_at in counted:
        unchanged = counters is state.counters or not scope.key
        counter = (looked_at if unchanged else _counter(used, counters, scope, now)).add(now, need)
        after.append(Counted(scope, counter))
        if scope.key:
            counters = counters.put(scope.key, counter)
        else:
            used = counter
    return msgspec.structs.replace(state, used=used, counters=counters), after


class _Plan(NamedTuple):
    """What to reserve."""

    need: Need
    price: TokenPrice
    granted: int | None = None
    limit: str | None = None


def _plan(counted: Sequence[Counted], estimated: Estimated, price: TokenPrice) -> _Plan:
    prompt, completion = estimated.prompt, estimated.completion
    room = None if estimated.bounded else checks.room(counted, Need(prompt, micros(price, prompt, 0)), price)
    if room is None:
        return _Plan(Need(prompt + completion, micros(price, prompt, completion)), price)
    granted = min(completion, max(room.tokens, LEAST_GRANT))
    return _Plan(Need(prompt + granted, micros(price, prompt, granted)), price, granted, room.limit)


def _refused(asked: Asked, status: Status, refusal: Refusal, rates: RateLimits | None = None) -> list[Emit]:
    said = asked.model if isinstance(asked, EmbeddingRequested) else str(asked.body.get("model") or "")
    end = StreamEnd(
        request=asked.request,
        tenant=asked.tenant,
        conversation=asked.conversation,
        writer=WRITER,
        status=status,
        model=said,
        error=StreamError(
            code=refusal.code,
            message=refusal.message,
            retry_after_ms=refusal.retry_after_ms,
            limit=refusal.limit,
        ),
        rate_limits=rates,
    )
    refused = ChatRefused(
        request=asked.request,
        tenant=asked.tenant,
        conversation=asked.conversation,
        use_case=asked.use_case,
        model=said,
        refusal=refusal,
    )
    return [Emit(CHAT_STREAM, asked.conversation, end), Emit(CHAT_ADMITTED, asked.conversation, refused)]


# --- reservations -------------------------------------------------------------------------------------------------


class _Terms(NamedTuple):
    """What else an admitted request is told."""

    limit: str | None
    rates: RateLimits | None


def _admitted(settings: Settings, asked: Asked, requested_ms: int, held: Held, terms: _Terms) -> Emit:
    if isinstance(asked, EmbeddingRequested):
        told = EmbeddingAdmitted(
            request=asked.request,
            tenant=asked.tenant,
            conversation=asked.conversation,
            weight=settings.weight,
            priority=max(EMBEDDING_PRIORITY, settings.priority),
            rate_limits=terms.rates,
        )
        return Emit(CHAT_STREAM, asked.conversation, told)
    if asked.priority < settings.priority:
        asked = asked.model_copy(update={"priority": settings.priority})
    reservation = Reservation(
        tokens=held.tokens,
        expires_ms=held.expires_ms,
        cost_micros=held.micros,
        granted=held.granted,
        limit=terms.limit,
    )
    admitted = ChatAdmitted(
        request=asked,
        requested_ms=requested_ms,
        reservation=reservation,
        weight=settings.weight,
        rate_limits=terms.rates,
    )
    return Emit(CHAT_ADMITTED, asked.conversation, admitted)


def _held(state: Ledger, request: str, held: Held) -> Ledger:
    expiry = min(state.next_expiry_ms, held.expires_ms) if state.held else held.expires_ms
    return msgspec.structs.replace(state, held=state.held.insert(request, held), next_expiry_ms=expiry)


def _settle(state: Ledger, settled: UsageSettled) -> Ledger:
    held = state.held.get(settled.request)
    late = None if held else state.overdue.get(settled.request)
    known = held or late
    if known is None:
        return state
    more = Need(settled.usage.total_tokens - known.tokens, settled.cost_micros - known.micros)
    if late is None:
        return _release(state, settled.request, known, more)
    state = msgspec.structs.replace(state, overdue=state.overdue.discard(settled.request))
    return _corrected(state, late, late.corrected(more, moment(state.clock_ms))[1])


def _release(state: Ledger, request: str, held: Held, more: Need) -> Ledger:
    state = msgspec.structs.replace(state, held=state.held.discard(request))
    return _corrected(state, held, held.released(more, moment(state.clock_ms)))


def _corrected(state: Ledger, held: Held, by: Correction) -> Ledger:
    now, used, counters = moment(state.clock_ms), state.used, state.counters
    for key in held.scopes:
        if key:
            counters = counters.put(key, counters.get(key, now).correct(by))
        else:
            used = used.at(now).correct(by)
    return msgspec.structs.replace(state, used=used, counters=counters)


def _grant(state: Ledger, said: UsageRunning, step: int) -> tuple[Ledger, Sequence[Emit]]:
    """More for a reply that has nearly used what it was granted; asked twice, it is told the same."""
    state = _revived(state, said.request)
    held = state.held.get(said.request)
    if held is None or held.granted is None:
        return state, ()
    granted, limit = held.granted, None
    if said.granted >= granted:
        now, price = moment(state.clock_ms), TokenPrice(completion=held.price)
        counted = _counted(state, [state.rules.scope_of(key) for key in held.scopes], now)
        room = checks.room(counted, Need(0), price)
        wanted = step + max(0, said.tokens - granted)
        more = wanted if room is None else min(wanted, room.tokens)
        limit = room.limit if room and more < wanted else None
        granted += more
        grant = Need(more, micros(price, 0, more))
        kept, added = held.grown(grant, now)
        kept = msgspec.structs.replace(kept, granted=granted, expires_ms=_expiry_of_running(state, held))
        state = _corrected(_held(state, said.request, kept), held, added)
    told = StreamBudget(
        request=said.request,
        tenant=said.tenant,
        conversation=said.conversation,
        granted=granted,
        limit=limit,
    )
    return state, [Emit(CHAT_STREAM, said.conversation, told)]


def _revived(state: Ledger, request: str) -> Ledger:
    """With the reservation of a reply that asks for more in force again, if it had expired: who asks lives."""
    late = state.overdue.get(request)
    if late is None or late.granted is None:
        return state
    again = msgspec.structs.replace(late, expires_ms=_expiry_of_running(state, late))
    state = msgspec.structs.replace(_held(state, request, again), overdue=state.overdue.discard(request))
    return _corrected(state, again, again.revived(moment(state.clock_ms)))


def _expiry_of_running(state: Ledger, held: Held) -> int:
    return max(held.expires_ms, _expiry(state.clock_ms, held.entered_ms, None))
