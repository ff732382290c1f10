"""Admission: which requests of a tenant may run, decided in the order of the tenant's own log.

A request is admitted once (ids are remembered for 24 hours), before its deadline, and within the tenant's limits;
whatever is refused gets its `stream.end` here. Its estimated cost is reserved on entry and replaced by the real one
when its usage is settled, so a limit is never exceeded by more than estimates were too low.

What counts against a limit, all in record time:

    requests_per_minute   admitted requests of the sliding minute (`windows.Window`)
    tokens_per_minute     real tokens of settled requests and estimates of others, in the sliding minute they entered
    tokens_per_day        the same, on the UTC day they entered
    concurrent_requests   admitted requests that are neither settled nor expired

A reservation that nobody settles expires 15 minutes after its deadline (or its request), and no later than the
memory of its id: the slot is free again and the estimate stands as its cost. A settlement without a reservation is
a repeat, or came too late, and changes nothing. A refused id stays refused: its stream has ended.
"""

from __future__ import annotations  # rpds classes take type arguments in annotations only

from collections.abc import Iterator, Sequence
from typing import Final, cast

import msgspec
from rpds import HashTrieMap

from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Limits,
    QuotaLimitSet,
    Refusal,
    Reservation,
    Status,
    StreamEnd,
    StreamError,
    UsageSettled,
)
from klatch_schemas.ids import Writer
from klatch_schemas.topics import ADMISSION_STATE, CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, DAY_MS, Topic
from klatch_streams.estimate import Estimate
from klatch_streams.kernel import Emit, Input
from klatch_streams.seen import MEMORY_MS, Bucket, Seen
from klatch_streams.windows import Window

WRITER: Final = Writer("admission")
HOLD_MS: Final = 15 * 60_000
_MINUTE_MS: Final = 60_000
_SLOT_RETRY_MS: Final = 1_000
"""When a concurrent slot frees is unknown: a hint to try again soon."""


class Held(msgspec.Struct, frozen=True):
    """A reservation in force."""

    tokens: int
    entered_ms: int
    expires_ms: int
    bucket: int
    """Number of the bucket of `Seen` that the request's id is in: reservations are written with their like."""


class Ledger(msgspec.Struct, frozen=True):
    """What admission knows of one tenant."""

    tenant: str
    clock_ms: int = 0
    """The latest record time: a broker whose clock is behind does not turn it back."""
    limits: Limits = Limits()
    seen: Seen = Seen()
    held: HashTrieMap[str, Held] = HashTrieMap()
    next_expiry_ms: int = 0
    """No reservation expires before this."""
    requests: Window = Window()
    tokens: Window = Window()
    day: int = 0
    day_tokens: int = 0


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

    def decide(self, state: Ledger, said: Input[Ledger]) -> tuple[Ledger, Sequence[Emit]]:
        """The next ledger, and what follows."""
        match said.event:
            case ChatRequested() | UsageSettled() | QuotaLimitSet() if said.event.tenant != state.tenant:
                # Under another tenant's key it has no place in this order: owners move it to its own (`Addresses`).
                return state, ()
            case ChatRequested():
                return self._request(_advance(state, said.timestamp_ms), said.event, said.timestamp_ms)
            case UsageSettled():
                return _settle(_advance(state, said.timestamp_ms), said.event), ()
            case QuotaLimitSet():
                return msgspec.structs.replace(_advance(state, said.timestamp_ms), limits=said.event.limits), ()
            case _:
                return state, ()

    def _request(self, state: Ledger, asked: ChatRequested, requested_ms: int) -> tuple[Ledger, Sequence[Emit]]:
        if asked.request in state.seen:
            return state, ()
        seen = state.seen.insert(state.clock_ms, asked.request)
        known = msgspec.structs.replace(state, seen=seen)
        if asked.deadline_ms is not None and asked.deadline_ms < state.clock_ms:
            late = Refusal(code="deadline_exceeded", message="the deadline had passed when the request was read")
            return known, _refused(asked, "expired", late)
        tokens = self._estimate.tokens(asked.body)
        if refusal := _refusal(state, tokens):
            return known, _refused(asked, "rejected", refusal)
        held = Held(tokens, state.clock_ms, _expiry(state.clock_ms, asked.deadline_ms), seen.newest)
        reservation = Reservation(tokens=tokens, expires_ms=held.expires_ms)
        admitted = ChatAdmitted(request=asked, requested_ms=requested_ms, reservation=reservation)
        return _reserve(known, asked.request, held), [Emit(CHAT_ADMITTED, asked.conversation, admitted)]

    def dump(self, state: Ledger) -> dict[str, object]:
        """The ledger as `head`, `ids/N` a bucket of ids, and `held/N` the reservations of those ids."""
        head = {
            "clock_ms": state.clock_ms,
            "limits": state.limits.model_dump(exclude_none=True),
            "requests": state.requests.slots,
            "tokens": state.tokens.slots,
            "day": state.day,
            "day_tokens": state.day_tokens,
        }
        parts: dict[str, object] = {"head": head}
        for number, bucket in state.seen.buckets.items():
            parts[f"ids/{number}"] = {"newest_ms": bucket.newest_ms, "ids": bucket.ids}
        for request, held in state.held.items():
            group = cast("dict[str, object]", parts.setdefault(f"held/{held.bucket}", {}))
            group[request] = (held.tokens, held.entered_ms, held.expires_ms)
        return parts

    def load(self, key: str, parts: dict[str, object]) -> Ledger:
        """What `dump` wrote, as a ledger again."""
        head = msgspec.convert(parts.get("head", {}), _Head)
        held = HashTrieMap(_held(parts))
        return Ledger(
            tenant=key,
            clock_ms=head.clock_ms,
            limits=Limits.model_validate(head.limits, extra="ignore"),
            seen=Seen.of(dict(_buckets(parts))),
            held=held,
            next_expiry_ms=_next_expiry(held),
            requests=Window.of(head.requests),
            tokens=Window.of(head.tokens),
            day=head.day,
            day_tokens=head.day_tokens,
        )


# --- time ---------------------------------------------------------------------------------------------------------


def _advance(state: Ledger, timestamp_ms: int) -> Ledger:
    """The ledger at a record's time: old ids forgotten, reservations expired, windows moved on."""
    now = max(state.clock_ms, timestamp_ms)
    day = now // DAY_MS
    state = msgspec.structs.replace(
        state,
        clock_ms=now,
        requests=state.requests.at(now),
        tokens=state.tokens.at(now),
        seen=state.seen.forget(now),
        day=day,
        day_tokens=state.day_tokens if day == state.day else 0,
    )
    return _expire(state) if state.held and now >= state.next_expiry_ms else state


def _expire(state: Ledger) -> Ledger:
    # Expiries fall on whole minutes, so the reservations are walked through at most once a minute.
    held = state.held
    for request, one in state.held.items():
        if one.expires_ms <= state.clock_ms:
            held = held.discard(request)
    return msgspec.structs.replace(state, held=held, next_expiry_ms=_next_expiry(held))


def _next_expiry(held: HashTrieMap[str, Held]) -> int:
    return min((one.expires_ms for one in held.values()), default=0)


def _expiry(now_ms: int, deadline_ms: int | None) -> int:
    due = max(now_ms, deadline_ms or 0) + HOLD_MS
    whole_minute = -(-due // _MINUTE_MS) * _MINUTE_MS
    # The id must be remembered as long as its reservation, or a repeat would be admitted beside it.
    return min(whole_minute, (now_ms + MEMORY_MS) // _MINUTE_MS * _MINUTE_MS)


# --- limits -------------------------------------------------------------------------------------------------------


def _refusal(state: Ledger, tokens: int) -> Refusal | None:
    """The refusal that lasts longest, if any limit refuses: a client that waits for it meets no other."""
    refusals = list(_refusals(state, tokens))
    return max(refusals, key=lambda one: _NEVER if one.retry_after_ms is None else one.retry_after_ms, default=None)


_NEVER: Final = 1 << 62


def _refusals(state: Ledger, tokens: int) -> Iterator[Refusal]:
    limits, now = state.limits, state.clock_ms
    if (most := limits.requests_per_minute) is not None and state.requests.total + 1 > most:
        yield _limit("requests_per_minute", most, 1, state.requests.wait_for(now, 1, most))
    if (most := limits.tokens_per_minute) is not None and state.tokens.total + tokens > most:
        yield _limit("tokens_per_minute", most, tokens, state.tokens.wait_for(now, tokens, most))
    if (most := limits.tokens_per_day) is not None and state.day_tokens + tokens > most:
        tomorrow = (state.day + 1) * DAY_MS - now
        yield _limit("tokens_per_day", most, tokens, tomorrow if tokens <= most else None)
    if (most := limits.concurrent_requests) is not None and len(state.held) + 1 > most:
        yield _limit("concurrent_requests", most, 1, _SLOT_RETRY_MS if most else None)


def _limit(name: str, most: int, need: int, wait_ms: int | None) -> Refusal:
    if wait_ms is None:
        advice = f"this request needs {need}: make it smaller, or ask for a higher limit"
    else:
        advice = f"try again in {-(-wait_ms // 1_000)} s"
    message = f"the limit of {most} {name.replace('_', ' ')} is reached: {advice}"
    return Refusal(code="rate_limit_exceeded", limit=name, message=message, retry_after_ms=wait_ms)


def _refused(asked: ChatRequested, status: Status, refusal: Refusal) -> list[Emit]:
    said = str(asked.body.get("model") or "")
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


def _reserve(state: Ledger, request: str, held: Held) -> Ledger:
    return msgspec.structs.replace(
        state,
        held=state.held.insert(request, held),
        next_expiry_ms=min(state.next_expiry_ms, held.expires_ms) if state.held else held.expires_ms,
        requests=state.requests.add(state.clock_ms, 1),
        tokens=state.tokens.add(state.clock_ms, held.tokens),
        day_tokens=state.day_tokens + held.tokens,
    )


def _settle(state: Ledger, settled: UsageSettled) -> Ledger:
    held = state.held.get(settled.request)
    if held is None:
        return state
    more = settled.usage.total_tokens - held.tokens
    today = held.entered_ms // DAY_MS == state.day
    return msgspec.structs.replace(
        state,
        held=state.held.discard(settled.request),
        tokens=state.tokens.correct(held.entered_ms, more),
        day_tokens=state.day_tokens + more if today else state.day_tokens,
    )


# --- snapshots ----------------------------------------------------------------------------------------------------


class _Head(msgspec.Struct):
    clock_ms: int = 0
    limits: dict[str, int] = {}
    requests: tuple[tuple[int, int], ...] = ()
    tokens: tuple[tuple[int, int], ...] = ()
    day: int = 0
    day_tokens: int = 0


def _buckets(parts: dict[str, object]) -> Iterator[tuple[int, Bucket]]:
    for name, part in parts.items():
        if name.startswith("ids/"):
            yield _number(name), msgspec.convert(part, Bucket)


def _held(parts: dict[str, object]) -> Iterator[tuple[str, Held]]:
    for name, part in parts.items():
        if name.startswith("held/"):
            for request, fields in msgspec.convert(part, dict[str, tuple[int, int, int]]).items():
                yield request, Held(*fields, bucket=_number(name))


def _number(name: str) -> int:
    return int(name.split("/")[1])
