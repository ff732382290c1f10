"""Several runs in a row: ever smaller schedules of one that failed, and one run for every planted bug."""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klatch_workers.torture import saved
from klatch_workers.torture.mutants import Mutant, plant
from klatch_workers.torture.report import BROKEN, Report
from klatch_workers.torture.rig import Say
from klatch_workers.torture.run import Orders, torture
from klatch_workers.torture.schedule import Fault
from klatch_workers.torture.shrink import shrink


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest schedule that was seen to fail, and how many runs it took to find."""

    orders: Orders
    runs: int


async def smallest_failing(orders: Orders, report: Report, most: int, say: Say) -> Shrunk:
    """Run ever smaller parts of a schedule that failed, at most so many; those that break one of its promises fail."""
    wanted = {violation.kind for violation in report.violations}

    async def still_fails(faults: Sequence[Fault]) -> bool:
        say(f"trying {len(faults)} of {len(orders.faults)} faults")
        kinds = {violation.kind for violation in (await _run(saved.with_faults(orders, faults), say)).violations}
        say(f"{len(faults)} faults: {', '.join(sorted(kinds)) or 'nothing found'}")
        # Another bug would lead away from the one that is looked for.
        return bool(kinds & wanted)

    faults, runs = await shrink(list(orders.faults), still_fails, most)
    return Shrunk(saved.with_faults(orders, faults), runs)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a planted bug."""

    mutant: Mutant
    counts: Mapping[str, int]
    """What was counted that has to be 0."""
    seconds: float
    """Of the whole run, Kafka's start included."""
    shrunk: Shrunk | None = None
    """Fewer faults that find it, if they were looked for."""

    @property
    def as_meant(self) -> bool:
        """Whether the run turned red; that of the control, whether it did not."""
        return bool(self.counts) != self.mutant.control


async def hunt(mutant: Mutant, say: Say, shrink_in: int = 0) -> Verdict:
    """Plant a bug and torture it; if it is found, look for fewer faults in so many runs.

    Raises MutantLost, and what a part raises that does not start.
    """
    with tempfile.TemporaryDirectory(prefix="klatch-mutant-") as packages:
        orders = mutant.orders(plant(mutant, Path(packages)))
        began = time.monotonic()
        report = await _run(orders, say)
        seconds = round(time.monotonic() - began, 1)
        for one in report.violations:
            say(f"{one.kind}: {one.request}: {one.what} [{', '.join(one.positions)}]")
        shrunk = None
        if shrink_in and report.violations:
            shrunk = await smallest_failing(orders, report, shrink_in, say)
    counts: dict[str, int] = {kind: report.count(kind) for kind in BROKEN if report.count(kind)}
    return Verdict(mutant, counts, seconds, shrunk)


async def _run(orders: Orders, say: Say) -> Report:
    folder = Path(tempfile.mkdtemp(prefix="klatch-torture-"))
    try:
        return await torture(folder, orders, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
