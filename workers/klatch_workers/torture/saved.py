"""A run as a file: everything that makes it, so that it can be had again, and kept as a regression."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Final, cast

from klatch_workers.torture.load import Shape
from klatch_workers.torture.run import Orders
from klatch_workers.torture.schedule import Fault, faults_of

_FIELDS: Final = ("seed", "minutes", "nodes", "requests_per_second", "static", "plain")
_SINCE: Final = ("partitions", "shape")
"""What older files do not say: it is as usual then."""
_SETTLING_S: Final = 25.0
"""What a load goes on after the last fault: streams must be seen to come back."""


def to_json(orders: Orders, about: str = "") -> str:
    """The parameters of a run as JSON, a fault a line. `about` says to people what it shows."""
    head = {"about": about, **{name: getattr(orders, name) for name in _FIELDS}}
    head |= {"partitions": orders.partitions, "shape": asdict(orders.shape)}
    faults = ",\n".join(f"    {json.dumps(asdict(fault))}" for fault in orders.faults)
    return json.dumps(head, indent=2)[:-2] + f',\n  "faults": [\n{faults}\n  ]\n}}\n'


def from_json(text: str) -> Orders:
    """The run that `to_json` wrote. Raises ValueError."""
    said: Any = json.loads(text)
    try:
        more = {name: said[name] for name in _SINCE if name in said}
        if "shape" in more:
            more["shape"] = Shape(**more["shape"])
        return Orders(faults=faults_of(said["faults"]), **{name: said[name] for name in _FIELDS}, **more)
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a saved run: {error}") from error


def faults_in(text: str) -> list[Fault]:
    """The faults of a saved run, or of a bare list of faults. Raises ValueError."""
    said: Any = json.loads(text)
    bare = isinstance(said, list)
    return faults_of(cast("list[Any]", said)) if bare else list(from_json(text).faults)


def with_faults(orders: Orders, faults: Sequence[Fault]) -> Orders:
    """The same with fewer faults, and no longer than they need: a shorter load is the beginning of a longer one."""
    last = max((fault.at_s + fault.takes_s for fault in faults), default=0.0)
    return replace(orders, faults=faults, minutes=min(orders.minutes, round((last + _SETTLING_S) / 60, 2)))
