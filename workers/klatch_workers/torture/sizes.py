"""How large the workers are while they are tortured: an outage or a backlog must not make one grow without bound."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from klatch_workers.processes import rss_mb

_EVERY_S: Final = 1.0
_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class Size:
    """How large the largest worker of a stage was, at one moment."""

    stage: str
    at_s: float
    resident_mb: float
    """Resident memory, in millions of bytes; shared pages count."""


async def watch(pids: Callable[[], Iterable[tuple[str, int]]], sizes: list[Size]) -> None:
    """Add to `sizes`, every second, what each stage comes to, given the pids of its workers; until cancelled."""
    now = asyncio.get_running_loop().time
    began = now()
    while True:
        stages = {str(pid): stage for stage, pid in pids()}
        largest = dict[str, float]()
        for pid, resident in rss_mb({pid: int(pid) for pid in stages}).items():
            largest[stages[pid]] = max(resident, largest.get(stages[pid], 0.0))
        sizes += [Size(stage, now() - began, resident) for stage, resident in largest.items()]
        await asyncio.sleep(_EVERY_S)


def by_quarters(sizes: Sequence[Size]) -> Mapping[str, Sequence[int]]:
    """Of every stage the largest worker's size in each quarter of the run, in MB: what leaks grows from left to right.

    A quarter without any worker is 0; a system without /proc tells of no stage.
    """
    until_s = max((size.at_s for size in sizes), default=0.0) or 1.0
    largest = dict[str, list[int]]()
    for size in sizes:
        quarters = largest.setdefault(size.stage, [0] * _PARTS)
        quarter = min(int(size.at_s / until_s * _PARTS), _PARTS - 1)
        quarters[quarter] = max(quarters[quarter], round(size.resident_mb))
    return largest
