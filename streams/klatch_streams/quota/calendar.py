"""Days and months of UTC, from record times. Nothing here reads a clock."""

from functools import lru_cache
from typing import NamedTuple

from klatch_schemas.topics import DAY_MS

_MARCH_0_TO_1970 = 1_970 * 12 - 2


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
    # Howard Hinnant's civil_from_days: years begin in March, so that a leap day is the last of its year. Unlike
    # datetime it has no last year: a record's time may be any number.
    era, in_era = divmod(day + 719_468, 146_097)
    year = (in_era - in_era // 1_460 + in_era // 36_524 - in_era // 146_096) // 365
    in_year = in_era - (365 * year + year // 4 - year // 100)
    number = (era * 400 + year) * 12 + (5 * in_year + 2) // 153
    return number - _MARCH_0_TO_1970, _first_day(number + 1)


def _first_day(number: int) -> int:
    """The first day of a month that is counted from March of year 0."""
    era, in_era = divmod(number, 4_800)
    year, month = divmod(in_era, 12)
    return era * 146_097 + 365 * year + year // 4 - year // 100 + (153 * month + 2) // 5 - 719_468
