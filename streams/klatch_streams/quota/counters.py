"""What was used: one counter a scope, bounded in number, forgotten when nothing in it can matter any more.

The counters of a tenant are spread over `SHARDS` parts of its snapshot, so that only parts that changed are written
again. A tenant has at most `MOST` counters for single subjects. While there are so many, new subjects share
`SHARED` more: that only counts too much, never too little. A shared counter goes on being used for its subjects until
it is forgotten, so that none of them begins afresh.
"""

from __future__ import annotations  # rpds classes take type arguments in annotations only

from collections.abc import Mapping
from typing import Final, NamedTuple
from zlib import crc32

import msgspec
from rpds import HashTrieMap

from klatch_streams.quota.calendar import Moment
from klatch_streams.windows import HOUR_SLOT_MS, SLOT_MS, Window

SHARDS: Final = 256
MOST: Final = 50_000
SHARED: Final = 1_024


class Need(msgspec.Struct, frozen=True):
    """What a request uses beside being one."""

    tokens: int
    micros: int = 0
    """Money: millionths of a US dollar."""


class Correction(NamedTuple):
    """How the cost of a request changes that was counted before."""

    entered_ms: int
    tokens: int
    """In the minute and hour of its entry."""
    day: Need
    """On the present day."""
    month: Need
    """In the present month."""
    running: int = 0
    """By how many more requests run."""
    reserved_day: Need = Need(0)
    """How much more of the present day is reserved for those that do."""
    reserved_month: Need = Need(0)
    """The same of the present month."""


class Counter(msgspec.Struct, frozen=True, array_like=True):
    """What one scope has used."""

    requests: Window = Window()
    tokens: Window = Window()
    day: int = 0
    day_tokens: int = 0
    day_micros: int = 0
    month: int = 0
    month_tokens: int = 0
    month_micros: int = 0
    running: int = 0
    """Requests that are neither settled nor expired."""
    hour_requests: Window | None = None
    """Kept while a burst is allowed, as is the next."""
    hour_tokens: Window | None = None
    day_reserved_tokens: int = 0
    """What of `day_tokens` is counted for requests that run, and may turn out to be less; so the next three."""
    day_reserved_micros: int = 0
    month_reserved_tokens: int = 0
    month_reserved_micros: int = 0

    def at(self, now: Moment) -> Counter:
        """The counter without what no longer counts."""
        same_day, same_month = self.day == now.day, self.month == now.month
        requests, tokens = self.requests.at(now.ms), self.tokens.at(now.ms)
        if same_day and requests is self.requests and tokens is self.tokens and self.hour_requests is self.hour_tokens:
            return self  # nothing has passed, and there is no window of an hour
        return Counter(
            requests,
            tokens,
            now.day,
            self.day_tokens if same_day else 0,
            self.day_micros if same_day else 0,
            now.month,
            self.month_tokens if same_month else 0,
            self.month_micros if same_month else 0,
            self.running,
            self.hour_requests and self.hour_requests.at(now.ms),
            self.hour_tokens and self.hour_tokens.at(now.ms),
            self.day_reserved_tokens if same_day else 0,
            self.day_reserved_micros if same_day else 0,
            self.month_reserved_tokens if same_month else 0,
            self.month_reserved_micros if same_month else 0,
        )

    def bursting(self, now: Moment, requests: bool, tokens: bool) -> Counter:
        """The counter with the windows of an hour that its limits need, and no other; they begin with
        its minute. The counter is one of `at(now)`."""
        if requests == (self.hour_requests is not None) and tokens == (self.hour_tokens is not None):
            return self
        return msgspec.structs.replace(
            self,
            hour_requests=(self.hour_requests or _hour_of(self.requests, now)) if requests else None,
            hour_tokens=(self.hour_tokens or _hour_of(self.tokens, now)) if tokens else None,
        )

    def add(self, now: Moment, need: Need) -> Counter:
        """Count a request; the counter is one of `at(now)`."""
        tokens, micros = need.tokens, need.micros
        return Counter(
            self.requests.add(now.ms, 1),
            self.tokens.add(now.ms, tokens),
            self.day,
            self.day_tokens + tokens,
            self.day_micros + micros,
            self.month,
            self.month_tokens + tokens,
            self.month_micros + micros,
            self.running + 1,
            self.hour_requests and self.hour_requests.add(now.ms, 1),
            self.hour_tokens and self.hour_tokens.add(now.ms, tokens),
            self.day_reserved_tokens + tokens,
            self.day_reserved_micros + micros,
            self.month_reserved_tokens + tokens,
            self.month_reserved_micros + micros,
        )

    def correct(self, by: Correction) -> Counter:
        """Change what a request was counted with; the counter is one of `at`."""
        return Counter(
            self.requests,
            self.tokens.correct(by.entered_ms, by.tokens),
            self.day,
            self.day_tokens + by.day.tokens,
            self.day_micros + by.day.micros,
            self.month,
            self.month_tokens + by.month.tokens,
            self.month_micros + by.month.micros,
            self.running + by.running,
            self.hour_requests,
            self.hour_tokens and self.hour_tokens.correct(by.entered_ms, by.tokens),
            # What an older klatch reserved was not counted here.
            max(0, self.day_reserved_tokens + by.reserved_day.tokens),
            max(0, self.day_reserved_micros + by.reserved_day.micros),
            max(0, self.month_reserved_tokens + by.reserved_month.tokens),
            max(0, self.month_reserved_micros + by.reserved_month.micros),
        )

    @property
    def idle(self) -> bool:
        """Whether it says no more than a new one; the counter is one of `at`."""
        return not (
            self.running
            or self.requests.slots
            or self.day_tokens
            or self.day_micros
            or self.month_tokens
            or self.month_micros
            or (self.hour_requests and self.hour_requests.slots)
            or (self.hour_tokens and self.hour_tokens.slots)
        )


class Counters(msgspec.Struct, frozen=True):
    """The counters of a tenant's scopes, but for the whole tenant's."""

    shards: HashTrieMap[int, Mapping[str, Counter]] = HashTrieMap()
    count: int = 0
    most: int = MOST

    @classmethod
    def of(cls, shards: Mapping[int, Mapping[str, Counter]]) -> Counters:
        """The counters that these shards hold."""
        return cls(HashTrieMap(shards), sum(map(len, shards.values())))

    def get(self, key: str, now: Moment) -> Counter:
        """A scope's counter at `now`."""
        found = self._find(key) or self._find(self._place(key))
        return found.at(now) if found else Counter(day=now.day, month=now.month)

    def put(self, key: str, counter: Counter) -> Counters:
        """With a scope's counter changed."""
        number = _shard(key)
        old = self.shards.get(number)
        if old is None or key not in old:  # it is new, or counted with others
            key = self._place(key)
            number = _shard(key)
            old = self.shards.get(number) or {}
        return self._with(number, old, {**old, key: counter})

    def sweep(self, number: int, now: Moment) -> Counters:
        """Forget what one shard need not keep."""
        number %= SHARDS
        old = self.shards.get(number)
        if not old:
            return self
        return self._with(number, old, {key: kept for key, one in old.items() if not (kept := one.at(now)).idle})

    def _with(self, number: int, old: Mapping[str, Counter], new: Mapping[str, Counter]) -> Counters:
        shards = self.shards.insert(number, new) if new else self.shards.discard(number)
        return Counters(shards, self.count + len(new) - len(old), self.most)

    def _place(self, key: str) -> str:
        """Where a scope is counted: by itself, or with others."""
        if self._find(key):
            return key
        shared = f"~{crc32(key.encode()) % SHARED}"
        return shared if self.count >= self.most or self._find(shared) else key

    def _find(self, place: str) -> Counter | None:
        shard = self.shards.get(_shard(place))
        return shard.get(place) if shard else None


def _hour_of(minute: Window, now: Moment) -> Window:
    """An hour that begins with a minute, so that what was counted in it is corrected in both."""
    slots = dict[int, int]()
    for slot, amount in minute.slots:
        hourly = slot * SLOT_MS // HOUR_SLOT_MS
        slots[hourly] = slots.get(hourly, 0) + amount
    since = minute.slots[0][0] * SLOT_MS if minute.slots else now.ms
    return Window.of(tuple(slots.items()), HOUR_SLOT_MS, since - 1)


def _shard(place: str) -> int:
    return crc32(place.encode()) % SHARDS
