"""Days and months of UTC, from record times. Nothing here reads a clock."""

from datetime import date
from functools import lru_cache
from typing import Final, NamedTuple

from klatch_schemas.topics import DAY_MS

_EPOCH: Final = date(1970, 1, 1).toordinal()
_LAST_DAY: Final = date.max.toordinal() - _EPOCH - 40
"""Later days are of the last month: a record's time may be any number."""


class Moment(NamedTuple):
    """A record's time: milliseconds, days and months since the epoch."""

    ms: int
    day: int
    month: int


def moment(ms: int) -> Moment:
    """The moment at `ms`, which is not before the epoch."""
    day = ms // DAY_MS
    return Moment(ms, day, _month(day)[0])


def until_tomorrow(ms: int) -> int:
    """Milliseconds until the next day begins."""
    return DAY_MS - ms % DAY_MS


def until_next_month(ms: int) -> int:
    """Milliseconds until the next month begins."""
    return max(1, _month(ms // DAY_MS)[1] * DAY_MS - ms)


@lru_cache(maxsize=64)
def _month(day: int) -> tuple[int, int]:
    """The number of the month that `day` is in, and the first day of the next."""
    when = date.fromordinal(_EPOCH + min(day, _LAST_DAY))
    number = (when.year - 1970) * 12 + when.month - 1
    following = date(when.year + when.month // 12, when.month % 12 + 1, 1)
    return number, following.toordinal() - _EPOCH
