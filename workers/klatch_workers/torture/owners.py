"""Which worker of a stage owns a partition, as its own log tells: to strike the process in question, and no other.

Only for aiming. A worker that has just lost or got a partition may be taken for its owner, or not be: then another
one is struck, and the run is as good.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ASSIGNED, _REVOKED = "runner.assigned", "runner.revoked"


@dataclass(slots=True)
class _Log:
    read: int = 0
    owns: frozenset[int] = frozenset()


@dataclass(slots=True)
class Owners:
    """Reads the logs of workers, each a line only once."""

    _logs: dict[Path, _Log] = field(default_factory=dict[Path, _Log])

    def of(self, log_file: Path) -> frozenset[int]:
        """The partitions that the worker with this log says it has."""
        known = self._logs.setdefault(log_file, _Log())
        with log_file.open("rb") as lines:
            lines.seek(known.read)
            told = lines.read()
        whole = told[: told.rfind(b"\n") + 1]
        known.read += len(whole)
        known.owns = _owned(known.owns, _facts(whole.splitlines()))
        return known.owns


def _facts(lines: Iterable[bytes]) -> Iterable[Mapping[str, Any]]:
    for line in lines:
        if _ASSIGNED.encode() in line or _REVOKED.encode() in line:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _owned(owned: frozenset[int], facts: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    for fact in facts:
        partitions = frozenset[int](fact.get("partitions", ()))
        match fact.get("event"):
            # A member is given all that it has anew at every rebalance, and gives up all before.
            case "runner.assigned":
                owned = partitions
            case "runner.revoked":
                owned = owned - partitions
            case _:
                pass
    return owned
