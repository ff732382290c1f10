"""CPU time and memory of running processes, from /proc; on a system without it they are unknown, not an error.

CPU times come in ticks of 10 ms: measure for seconds. RSS counts shared pages in every process that maps them.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """User and system time of each process so far."""
    used = dict[str, float]()
    for name, pid in pids.items():
        with suppress(OSError):
            # The name in parentheses may hold spaces: what follows it is field 3 and on (proc(5)).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used[name] = (int(fields[11]) + int(fields[12])) * _TICK_S
    return used


def rss_mb(pids: Mapping[str, int]) -> dict[str, float]:
    """Resident memory of each process, in millions of bytes."""
    resident = dict[str, float]()
    for name, pid in pids.items():
        with suppress(OSError):
            resident[name] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1e6
    return resident


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What each process used in between."""
    return {name: after[name] - before[name] for name in before if name in after}
