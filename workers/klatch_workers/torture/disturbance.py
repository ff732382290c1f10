"""Which faults may have kept a process from what it had to do: where there are any, its speed is not judged."""

from collections.abc import Collection, Sequence
from typing import Final

from klatch_workers.torture.evidence import Struck

BROKERS: Final = ("broker", "cluster", "leaderless")
_AFTERMATH_MS: Final = 15_000.0
"""How long after a fault a worker may still be deaf: a session time-out, and a new start."""


def began_ms(fault: Struck) -> float:
    """When a fault began."""
    return fault.began_ms or fault.at_ms


def over_ms(fault: Struck) -> float:
    """When nobody need be deaf any more for a fault."""
    return fault.until_ms + _AFTERMATH_MS


def near(struck: Sequence[Struck], since_ms: float, until_ms: float) -> list[Struck]:
    """The faults that were on between the two, or just over."""
    return [one for one in struck if began_ms(one) < until_ms and since_ms < over_ms(one)]


def disturbed(struck: Sequence[Struck], stages: Collection[str], since_ms: float, until_ms: float) -> bool:
    """Whether a broker, or a process of one of these stages, was struck between the two or just before."""
    return any(
        fault.what in BROKERS or any(stage in fault.what for stage in stages)
        for fault in near(struck, since_ms, until_ms)
    )
