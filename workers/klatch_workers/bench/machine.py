"""Which machine this is, how busy it is, and which klatch runs: what a figure needs beside it."""

import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CalledProcessError, run

from klatch_workers.bench.report import Machine

_BUSY = 0.3
"""Load a CPU above which others disturb the figures."""


def load() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def is_busy(load_before: float) -> bool:
    """Whether somebody else uses this machine."""
    return load_before > _BUSY * _cpus()


def describe(load_before: float) -> Machine:
    """This machine, now that the run is over."""
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=" ".join(["klatch", *sys.argv[1:]]),
        commit=_commit(),
        cpus=_cpus(),
        cpu=_cpu(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        load_before=load_before,
        load_after=load(),
        busy=is_busy(load_before),
    )


def _cpus() -> int:
    # What this process may use, which in a container is less than what is there.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """Of the checkout this code stands in; empty for an installed package."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return run(git, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, CalledProcessError):
        return ""
