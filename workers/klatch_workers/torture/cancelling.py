"""How soon a cancelled request's model call ends: from the time of the cancel's record to the close of the connection.

Only calls that were under way at that time count. A worker that is stopped, or has no broker to read from, cannot
hear of a cancel: calls that a fault of that kind overlaps are told apart. One that was killed has closed its
connection by that. Time in which the kit itself did not run is not the worker's: the kit's model server dates the
close, and the kit's clients send most of the cancels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from klatch_schemas.events import StreamCancel
from klatch_schemas.ids import RequestId
from klatch_workers.torture.case import Case
from klatch_workers.torture.disturbance import BROKERS, began_ms, near
from klatch_workers.torture.evidence import Evidence, Stall, Struck
from klatch_workers.torture.stalls import stalled_ms

_DEAFENING: Final = ("stop generation", "zombie generation", "outlive generation", *BROKERS)
_PROMISED_MS: Final = 100.0
"""Within it a connection is to close after the cancel's record."""
_TOLD: Final = 10
"""So many of the slowest are told one by one."""


class Closing(NamedTuple):
    """A model call that was under way when its request was cancelled."""

    request: RequestId
    call: str
    ms: float
    """From the cancel to its end, less what the kit slept of it; infinite if it never ended."""
    disturbed: bool
    """Whether a fault may have kept its worker from hearing of the cancel."""
    stalled_ms: float = 0.0
    """What the kit slept between the two."""
    near: Sequence[tuple[str, float]] = ()
    """Faults that were on or just over, with the seconds from the beginning of each to the cancel."""

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "request": self.request,
            "call": self.call,
            "ms": round(self.ms, 1),
            "stalled_ms": round(self.stalled_ms, 1),
            "near": [{"struck": what, "s_before": round(seconds, 1)} for what, seconds in self.near],
        }


def closings(cases: Iterable[Case], evidence: Evidence) -> list[Closing]:
    """Of every cancel that ended a stream, the calls that it found under way."""
    return [closing for case in cases for closing in _of_one(case, evidence.struck, evidence.stalls)]


def _of_one(case: Case, struck: Sequence[Struck], stalls: Sequence[Stall]) -> Iterator[Closing]:
    ended = case.told.ended
    if ended is None or not isinstance(ended.said, StreamCancel):
        return
    cancelled_ms = float(ended.timestamp_ms)
    for call in case.calls:
        closed_ms = call.ended_ms or float("inf")
        if call.started_ms < cancelled_ms < closed_ms:
            faults = near(struck, cancelled_ms, closed_ms)
            slept_ms = stalled_ms(stalls, cancelled_ms, closed_ms)
            yield Closing(
                case.request,
                call.id,
                closed_ms - cancelled_ms - slept_ms,
                any(fault.what in _DEAFENING for fault in faults),
                slept_ms,
                [(fault.what, (cancelled_ms - began_ms(fault)) / 1000) for fault in faults],
            )


def figures(closed: Sequence[Closing]) -> Mapping[str, Any]:
    """How many there were; of those that nothing disturbed percentiles in milliseconds, and the slowest one by one."""
    heard = sorted((one for one in closed if not one.disturbed), key=lambda one: one.ms)
    if not heard:
        return {"under_way": len(closed), "undisturbed": 0}
    return {
        "under_way": len(closed),
        "undisturbed": len(heard),
        "p50_ms": round(heard[len(heard) // 2].ms, 1),
        "p99_ms": round(heard[len(heard) * 99 // 100].ms, 1),
        "over_100_ms": sum(one.ms > _PROMISED_MS for one in heard),
        "max_ms": round(heard[-1].ms, 1),
        "slowest": [one.facts() for one in heard[: -_TOLD - 1 : -1]],
    }
