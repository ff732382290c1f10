"""What admission knows of one tenant, and how it stands in a snapshot.

Parts of a snapshot: `head` (time, the whole tenant's counter), `settings` and `changes`, `ids/N` a bucket of ids,
`held/N` and `overdue/N` the reservations of those ids, `used/N` a shard of counters. Only parts that changed are
written again.
"""

from __future__ import annotations  # rpds classes take type arguments in annotations only

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import msgspec
from rpds import HashTrieMap

from klatch_schemas.events import LimitRule, Limits, TokenPrice
from klatch_schemas.topics import DAY_MS
from klatch_streams.quota.calendar import Moment, moment
from klatch_streams.quota.changes import Change
from klatch_streams.quota.counters import Correction, Counter, Counters, Need
from klatch_streams.quota.rules import Rules, Settings
from klatch_streams.seen import Bucket, Seen
from klatch_streams.windows import Window


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A reservation in force."""

    tokens: int
    entered_ms: int
    expires_ms: int
    bucket: int
    """Number of the bucket of `Seen` that the request's id is in: reservations are written with their like."""
    micros: int = 0
    granted: int | None = None
    """Completion tokens that the reply may have; None: budgets do not bound it."""
    price: int = 0
    """Of a million completion tokens, in millionths of a dollar."""
    scopes: tuple[str, ...] = ("",)
    """Keys of the scopes it is counted in."""
    later_tokens: int = 0
    """Of `tokens`, those that were granted on the day after that of the entry: no reservation lasts longer."""
    later_micros: int = 0

    def corrected(self, more: Need, now: Moment) -> tuple[Held, Correction]:
        """It with `more` to its cost, and how counters change.

        More counts on the day on which it is added. Less is taken back where it was counted, from the latest first.
        """
        tokens = self._spread(more.tokens, self.later_tokens, now)
        money = self._spread(more.micros, self.later_micros, now)
        held = msgspec.structs.replace(
            self,
            tokens=self.tokens + more.tokens,
            micros=self.micros + more.micros,
            later_tokens=self.later_tokens + tokens.later,
            later_micros=self.later_micros + money.later,
        )
        day, month = Need(tokens.day, money.day), Need(tokens.month, money.month)
        return held, Correction(self.entered_ms, more.tokens, day, month)

    def grown(self, by: Need, now: Moment) -> tuple[Held, Correction]:
        """It with more reserved, and how counters change."""
        held, added = self.corrected(by, now)
        return held, added._replace(reserved_day=by, reserved_month=by)

    def released(self, more: Need, now: Moment) -> Correction:
        """How counters change when it ends, with `more` to its cost."""
        tokens, money = self._taken_back(now)
        day, month = Need(tokens.day, money.day), Need(tokens.month, money.month)
        return self.corrected(more, now)[1]._replace(running=-1, reserved_day=day, reserved_month=month)

    def revived(self, now: Moment) -> Correction:
        """How counters change when it is in force again."""
        tokens, money = self._taken_back(now)
        day, month = Need(-tokens.day, -money.day), Need(-tokens.month, -money.month)
        return self.corrected(Need(0), now)[1]._replace(running=1, reserved_day=day, reserved_month=month)

    def _taken_back(self, now: Moment) -> tuple[_Spread, _Spread]:
        """All of its tokens, and of its money, less where they count now."""
        return self._spread(-self.tokens, self.later_tokens, now), self._spread(-self.micros, self.later_micros, now)

    def _spread(self, by: int, later: int, now: Moment) -> _Spread:
        entered, following = moment(self.entered_ms), moment(self.entered_ms + DAY_MS)
        if by > 0:
            return _Spread(by, by, 0 if now.day == entered.day else by)
        back = max(by, -later)
        day = sum(part for when, part in ((entered, by - back), (following, back)) if when.day == now.day)
        month = sum(part for when, part in ((entered, by - back), (following, back)) if when.month == now.month)
        return _Spread(day, month, back)


class _Spread(NamedTuple):
    """What of a change counts now."""

    day: int
    month: int
    later: int
    """What of it is of the day after that of the entry."""


class Ledger(msgspec.Struct, frozen=True):
    """What admission knows of one tenant."""

    tenant: str
    clock_ms: int = 0
    """The latest record time: a broker whose clock is behind does not turn it back."""
    rules: Rules = Rules(Settings())
    changes: tuple[Change, ...] = ()
    seen: Seen = Seen()
    held: HashTrieMap[str, Held] = HashTrieMap()
    overdue: HashTrieMap[str, Held] = HashTrieMap()
    """Reservations that have expired: they hold no slot, but may still be settled while their ids are remembered."""
    next_expiry_ms: int = 0
    """No reservation expires before this."""
    used: Counter = Counter()
    """By the whole tenant."""
    counters: Counters = Counters()
    """Of its other scopes."""
    swept: int = 0
    """How many seconds had an event: each sweeps a shard."""


def dump(state: Ledger) -> dict[str, object]:
    """The ledger as parts of plain JSON data."""
    parts: dict[str, object] = {
        "head": {"clock_ms": state.clock_ms, "used": state.used, "swept": state.swept},
        "settings": state.rules.settings.dump(),
        "changes": state.changes,
    }
    for number, bucket in state.seen.buckets.items():
        parts[f"ids/{number}"] = {"newest_ms": bucket.newest_ms, "ids": bucket.ids}
    for kind, reservations in (("held", state.held), ("overdue", state.overdue)):
        for request, held in reservations.items():
            group = cast("dict[str, object]", parts.setdefault(f"{kind}/{held.bucket}", {}))
            group[request] = held
    for number, shard in state.counters.shards.items():
        parts[f"used/{number}"] = shard
    return parts


def load(tenant: str, parts: Mapping[str, object]) -> Ledger:
    """What `dump` wrote, as a ledger again."""
    if "settings" not in parts and parts:
        parts = _upgraded(parts)
    head = msgspec.convert(parts.get("head", {}), _Head)
    held = _reservations(parts, "held")
    shards = {number: msgspec.convert(part, dict[str, Counter]) for number, part in _numbered(parts, "used")}
    return Ledger(
        tenant=tenant,
        clock_ms=head.clock_ms,
        rules=Rules(_settings(cast("Mapping[str, Any]", parts.get("settings", {})))),
        changes=msgspec.convert(parts.get("changes", ()), tuple[Change, ...]),
        seen=Seen.of({number: msgspec.convert(part, Bucket) for number, part in _numbered(parts, "ids")}),
        held=held,
        overdue=_reservations(parts, "overdue"),
        next_expiry_ms=next_expiry(held.values()),
        used=head.used,
        counters=Counters.of(shards),
        swept=head.swept,
    )


def _reservations(parts: Mapping[str, object], kind: str) -> HashTrieMap[str, Held]:
    groups = [msgspec.convert(part, dict[str, Held]) for _, part in _numbered(parts, kind)]
    return HashTrieMap({request: one for group in groups for request, one in group.items()})


def next_expiry(held: Iterable[Held]) -> int:
    """When the first of some reservations expires."""
    return min((one.expires_ms for one in held), default=0)


class _Head(msgspec.Struct):
    clock_ms: int = 0
    used: Counter = Counter()
    swept: int = 0


def _settings(said: Mapping[str, Any]) -> Settings:
    # A newer klatch may have written more.
    return Settings(
        limits=Limits.model_validate(said.get("limits", {}), extra="ignore"),
        rules=tuple(LimitRule.model_validate(rule, extra="ignore") for rule in said.get("rules", ())),
        weight=float(said.get("weight", 1.0)),
        priority=int(said.get("priority", 0)),
        prices={
            model: TokenPrice.model_validate(price, extra="ignore") for model, price in said.get("prices", {}).items()
        },
    )


def _numbered(parts: Mapping[str, object], prefix: str) -> Iterator[tuple[int, object]]:
    for name, part in parts.items():
        kind, _, number = name.partition("/")
        if kind == prefix:
            yield int(number), part


# --- what klatch wrote before it knew scopes ------------------------------------------------------------------------


class _OldHead(msgspec.Struct):
    clock_ms: int = 0
    limits: dict[str, int] = {}
    requests: tuple[tuple[int, int], ...] = ()
    tokens: tuple[tuple[int, int], ...] = ()
    day: int = 0
    day_tokens: int = 0


def _upgraded(parts: Mapping[str, object]) -> dict[str, object]:
    """Parts of the first format: one counter a tenant, tokens only. Its month begins with its last day."""
    old = msgspec.convert(parts.get("head", {}), _OldHead)
    groups = {
        f"held/{number}": {
            request: Held(tokens, entered, expires, number)
            for request, (tokens, entered, expires) in msgspec.convert(part, dict[str, tuple[int, int, int]]).items()
        }
        for number, part in _numbered(parts, "held")
    }
    used = Counter(
        requests=Window.of(old.requests),
        tokens=Window.of(old.tokens),
        day=old.day,
        day_tokens=old.day_tokens,
        month=moment(old.day * DAY_MS).month,
        month_tokens=old.day_tokens,
        running=sum(map(len, groups.values())),
    )
    head = {"clock_ms": old.clock_ms, "used": used}
    return {**parts, **groups, "head": head, "settings": {"limits": old.limits}}
