"""Whether a request has room in all its scopes, how much there is left, and how far a running reply may go.

What counts against a limit, all in record time:

    requests_per_minute     admitted requests of the sliding minute (`windows.Window`)
    tokens_per_minute       real tokens of settled requests and estimates of others, in the minute they entered
    tokens_per_day, _month  the same, each amount on the UTC day and in the UTC month in which it was added
    cost_micros_per_day, …  the same for money
    concurrent_requests     admitted requests that are neither settled nor expired

With a burst, a minute may hold that much more than its limit, as long as no sliding hour holds over 60 times the limit.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from klatch_schemas.events import RateLimit, RateLimits, Refusal, TokenPrice
from klatch_streams.quota.calendar import Moment, until_next_month, until_tomorrow
from klatch_streams.quota.counters import Counter, Need
from klatch_streams.quota.rules import Budget, Scope, tokens_for
from klatch_streams.windows import SLOTS, Window

_SOON_MS: Final = 1_000
"""When requests that run will end, and free what they hold, is unknown: a hint to try again soon."""
_NEVER: Final = 1 << 62


class Counted(NamedTuple):
    """A scope and what it has used so far."""

    scope: Scope
    counter: Counter


class Room(NamedTuple):
    """How many more completion tokens budgets allow, and the tightest of them."""

    tokens: int
    limit: str


# --- refusals -----------------------------------------------------------------------------------------------------


def refusal(counted: Sequence[Counted], need: Need, now: Moment) -> Refusal | None:
    """The refusal that lasts longest, if any limit refuses: a client that waits for it meets no other."""
    longest: Refusal | None = None
    for scope, counter in counted:
        for one in _refusals(scope, counter, need, now):
            if longest is None or _lasts(one) > _lasts(longest):
                longest = one
    return longest


def _lasts(one: Refusal) -> int:
    return _NEVER if one.retry_after_ms is None else one.retry_after_ms


def _refusals(scope: Scope, counter: Counter, need: Need, now: Moment) -> Iterator[Refusal]:
    limits, tokens = scope.limits, need.tokens
    if (most := limits.requests_per_minute) is not None:
        wait = _wait(counter.requests, counter.hour_requests, _Rate(1, most, limits.burst_requests or 0), now)
        if wait != 0:
            yield _refused(scope, "requests_per_minute", most, 1, wait)
    if (most := limits.tokens_per_minute) is not None:
        wait = _wait(counter.tokens, counter.hour_tokens, _Rate(tokens, most, limits.burst_tokens or 0), now)
        if wait != 0:
            yield _refused(scope, "tokens_per_minute", most, tokens, wait)
    for budget in scope.budgets:
        needed = need.micros if budget.money else tokens
        # What costs nothing is never refused for money.
        if budget.used(counter) + needed > budget.most and (needed or not budget.money):
            yield _refused(scope, budget.name, budget.most, needed, _until_room(budget, counter, needed, now))
    if (most := limits.concurrent_requests) is not None and counter.running + 1 > most:
        yield _refused(scope, "concurrent_requests", most, 1, _SOON_MS if most else None)


class _Rate(NamedTuple):
    """What a request asks of a limit a minute."""

    needed: int
    most: int
    burst: int


def _wait(minute: Window, hour: Window | None, asks: _Rate, now: Moment) -> int | None:
    """Milliseconds until there is room; None: never."""
    needed, most, burst = asks
    wait = minute.wait_for(now.ms, needed, most + burst)
    if hour and wait is not None:
        later = hour.wait_for(now.ms, needed, SLOTS * most)
        wait = None if later is None else max(wait, later)
    return wait


def _refused(scope: Scope, name: str, most: int, needed: int, wait_ms: int | None) -> Refusal:
    if wait_ms is None:
        advice = f"this request needs {needed}: make it smaller, or ask for a higher limit"
    else:
        advice = f"try again in {-(-wait_ms // 1_000)} s"
    dimensions = scope.dimensions
    whose = f" for this {dimensions.replace('_', ' ').replace('+', ' and ')}" if dimensions else ""
    message = f"the limit of {most} {name.replace('_', ' ')}{whose} is reached: {advice}"
    return Refusal(code="rate_limit_exceeded", limit=name, scope=dimensions, message=message, retry_after_ms=wait_ms)


# --- budgets ------------------------------------------------------------------------------------------------------


def _ends(budget: Budget, now: Moment) -> int:
    return until_next_month(now.ms) if budget.monthly else until_tomorrow(now.ms)


def _until_room(budget: Budget, counter: Counter, needed: int, now: Moment) -> int | None:
    """Milliseconds until there may be room; None: never."""
    if needed > budget.most:
        return None
    settled = budget.used(counter) - budget.reserved(counter)
    # Where only running requests fill a budget, they may use less than is reserved for them.
    return _ends(budget, now) if settled + needed > budget.most else min(_SOON_MS, _ends(budget, now))


def room(counted: Sequence[Counted], prompt: Need, price: TokenPrice) -> Room | None:
    """How many completion tokens budgets allow beside `prompt`, at `price` each; None: no budget bounds them.

    Of money, a millionth is kept back for what rounding up adds.
    """
    tightest: Room | None = None
    for scope, counter in counted:
        for budget in scope.budgets:
            left = budget.most - budget.used(counter) - (prompt.micros if budget.money else prompt.tokens)
            tokens = tokens_for(price, max(0, left - 1)) if budget.money else left
            if tokens is not None and (tightest is None or tokens < tightest.tokens):
                tightest = Room(max(0, tokens), budget.name)
    return tightest


# --- what clients are told ------------------------------------------------------------------------------------------


class _Standing(NamedTuple):
    """How a scope stands with one limit."""

    left: int
    name: str
    most: int
    place: int
    """Which of the request's scopes it is."""
    hourly: bool = False
    """Whether the hour of a limit with a burst is meant, and not its minute."""


def rate_limits(counted: Sequence[Counted], now: Moment) -> RateLimits | None:
    """Where a request stands that is counted in all of `counted`; None: nothing limits its kind.

    A limit with a burst has two windows, its minute and its hour: the one with less left counts.
    """
    requests, tokens = list[_Standing](), list[_Standing]()
    for place, (scope, counter) in enumerate(counted):
        limits = scope.limits
        if (most := limits.requests_per_minute) is not None:
            windows = (counter.requests, counter.hour_requests)
            requests += _sliding("requests_per_minute", most, limits.burst_requests or 0, windows, place)
        if (most := limits.concurrent_requests) is not None:
            requests.append(_Standing(most - counter.running, "concurrent_requests", most, place))
        if (most := limits.tokens_per_minute) is not None:
            windows = (counter.tokens, counter.hour_tokens)
            tokens += _sliding("tokens_per_minute", most, limits.burst_tokens or 0, windows, place)
        for budget in scope.budgets:
            if not budget.money:
                tokens.append(_Standing(budget.most - budget.used(counter), budget.name, budget.most, place))
    if not requests and not tokens:
        return None
    return RateLimits(requests=_tightest(requests, counted, now), tokens=_tightest(tokens, counted, now))


def _sliding(
    name: str, most: int, burst: int, windows: tuple[Window, Window | None], place: int
) -> Iterator[_Standing]:
    minute, hour = windows
    yield _Standing(most + burst - minute.total, name, most + burst, place)
    if hour:
        yield _Standing(SLOTS * most - hour.total, name, SLOTS * most, place, hourly=True)


def _tightest(found: list[_Standing], counted: Sequence[Counted], now: Moment) -> RateLimit | None:
    if not found:
        return None
    least = min(one.left for one in found)
    # Of those with as little left the one that keeps a client waiting longest.
    reset_ms, one = max((_reset(one, counted[one.place].counter, now), one) for one in found if one.left == least)
    return RateLimit(name=one.name, limit=one.most, remaining=max(0, one.left), reset_ms=reset_ms)


def _reset(one: _Standing, counter: Counter, now: Moment) -> int:
    """Milliseconds until nothing of a limit would be used, if nothing else came."""
    match one.name:
        case "requests_per_minute":
            return _empty(counter.hour_requests if one.hourly else counter.requests, now)
        case "tokens_per_minute":
            return _empty(counter.hour_tokens if one.hourly else counter.tokens, now)
        case "concurrent_requests":
            return _SOON_MS
        case "tokens_per_month":
            return until_next_month(now.ms)
        case _:
            return until_tomorrow(now.ms)


def _empty(window: Window | None, now: Moment) -> int:
    return window.empty_after(now.ms) if window else 0
