"""How soon a cancelled request's model call ends: from the time of the cancel's record to the close of the connection.

Only calls that were under way at that time count. A worker that is stopped, or has no broker to read from, cannot
hear of a cancel: calls that a fault of that kind overlaps are told apart. One that was killed has closed its
connection by that.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from klatch_schemas.events import StreamCancel
from klatch_schemas.ids import RequestId
from klatch_workers.torture.case import Case
from klatch_workers.torture.evidence import Struck

_DEAFENING: Final = ("stop generation", "zombie generation", "broker", "cluster", "leaderless")
_AFTERMATH_MS: Final = 15_000.0
"""How long after such a fault a worker may still be deaf: a session time-out, and a new start."""


class Closing(NamedTuple):
    """A model call that was under way when its request was cancelled."""

    request: RequestId
    call: str
    ms: float
    """From the cancel to its end; infinite if it never ended."""
    disturbed: bool
    """Whether a fault may have kept its worker from hearing of the cancel."""


def closings(cases: Iterable[Case], struck: Sequence[Struck]) -> list[Closing]:
    """Of every cancel that ended a stream, the calls that it found under way."""
    deaf = [
        (fault.began_ms or fault.at_ms, fault.until_ms + _AFTERMATH_MS) for fault in struck if fault.what in _DEAFENING
    ]
    return [closing for case in cases for closing in _of_one(case, deaf)]


def _of_one(case: Case, deaf: Sequence[tuple[float, float]]) -> Iterator[Closing]:
    ended = case.told.ended
    if ended is None or not isinstance(ended.said, StreamCancel):
        return
    cancelled_ms = float(ended.timestamp_ms)
    for call in case.calls:
        closed_ms = call.ended_ms or float("inf")
        if call.started_ms < cancelled_ms < closed_ms:
            disturbed = any(began < closed_ms and cancelled_ms < until for began, until in deaf)
            yield Closing(case.request, call.id, closed_ms - cancelled_ms, disturbed)


def figures(closed: Sequence[Closing]) -> Mapping[str, float]:
    """How many there were, and of those that nothing disturbed percentiles in milliseconds."""
    heard = sorted(one.ms for one in closed if not one.disturbed)
    if not heard:
        return {"under_way": len(closed), "undisturbed": 0}
    return {
        "under_way": len(closed),
        "undisturbed": len(heard),
        "p50_ms": round(heard[len(heard) // 2], 1),
        "p99_ms": round(heard[len(heard) * 99 // 100], 1),
        "max_ms": round(heard[-1], 1),
    }
