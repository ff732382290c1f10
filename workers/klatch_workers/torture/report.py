"""What a run comes to: counts of requests, the violations behind them, and how long the worst recovery took.

The JSON of a report holds ids and positions in the log, and message text only if it was asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from klatch_workers.torture.boundaries import BOUNDARIES
from klatch_workers.torture.recovery import Recovery

Broken = Literal["lost", "ended_twice", "reordered", "spliced", "duplicated", "redone", "missettled", "failed", "dead"]
"""A promise that was broken; docs/reliability.md defines each."""

BROKEN: Final[tuple[Broken, ...]] = (
    "lost",
    "ended_twice",
    "reordered",
    "spliced",
    "duplicated",
    "redone",
    "missettled",
    "failed",
    "dead",
)

_BOUNDARY: Final = "boundary "


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    kind: Broken
    request: str
    what: str
    """In a few words, without message text."""
    positions: tuple[str, ...] = ()
    """Where in the log to look."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to. A count is a number of requests, however often each was offended."""

    accepted: int
    ended_once: int
    violations: Sequence[Violation] = ()
    recoveries: Mapping[str, Recovery] = field(default_factory=dict[str, Recovery])
    """The longest recovery from each sort of fault."""
    outcomes: Mapping[str, int] = field(default_factory=dict[str, int])
    checked: Mapping[str, int] = field(default_factory=dict[str, int])
    """How much was looked at: a run that met nothing proves nothing."""
    struck: Mapping[str, int] = field(default_factory=dict[str, int])
    """How often each sort of fault was carried out."""
    cancels: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How soon model calls ended after a cancel, and which were the slowest, see `cancelling.figures`."""
    memory_mb: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    """How large the largest worker of each stage was in each quarter of the run."""
    readings: Mapping[str, "Report"] = field(default_factory=dict[str, "Report"])
    """What the same records come to for consumers that read them otherwise."""

    def count(self, kind: Broken) -> int:
        """How many requests were offended in this way."""
        return len({violation.request for violation in self.violations if violation.kind == kind})

    @property
    def passed(self) -> bool:
        """Whether nothing was found, and there was something to find."""
        return not self.violations and self.accepted > 0

    def facts(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "accepted": self.accepted,
            "ended_once": self.ended_once,
            **{kind: self.count(kind) for kind in BROKEN},
            "worst_recovery_s": round(max((one.seconds for one in self.recoveries.values()), default=0.0), 2),
            "recoveries_s": {what: round(one.seconds, 2) for what, one in self.recoveries.items()},
            "outcomes": dict(self.outcomes),
            "cancels": dict(self.cancels),
            "memory_mb": {stage: list(quarters) for stage, quarters in self.memory_mb.items()},
            "struck": {what: number for what, number in self.struck.items() if not what.startswith(_BOUNDARY)},
            "boundaries": {name: self.struck.get(_BOUNDARY + name, 0) for name in BOUNDARIES},
            "checked": dict(self.checked),
            **({"readings": {name: report.facts() for name, report in self.readings.items()}} if self.readings else {}),
        }
