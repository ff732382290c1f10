"""Which faults happen when: a pure function of the seed, so that a run can be told by its seed and had again.

What a fault meets (which records are in flight) is up to the machine: the same schedule finds the same bug often, not
always.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final, Literal, assert_never, get_args

from klatch_workers.torture.boundaries import BOUNDARIES, TAKEN_OVER

Kind = Literal[
    "kill", "boundary", "stop", "zombie", "outlive", "twin", "roll", "scale", "broker", "cluster", "leaderless"
]
ZOMBIES: Final[tuple[Kind, ...]] = ("zombie", "outlive")
"""Kinds that make a zombie at a boundary."""

ZOMBIE_S: Final = (12.0, 15.0)
"""How long a stopped process stays stopped: past the group's session time-out of 10 s."""
AWAITED_S: Final = 11.0
"""How long it takes at most until a stopped process is succeeded: the session time-out, and the successor's start."""
_PAUSE_S: Final = (3.0, 8.0)
_QUIET_S: Final = 4.0
"""At either end of the load nothing is struck: there must be streams to hit, and time to see them come back."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is done to a process.

    kill        SIGKILL of one worker of the stage `target`
    boundary    SIGKILL of the worker that the boundary `target` names, at the next record of it
    stop        SIGSTOP of one for `lasts_s` seconds, with another beside it, then SIGCONT: a zombie
    zombie      SIGSTOP of the worker that the boundary `target` names, at its next record, with another beside it,
                then SIGCONT `lasts_s` seconds after its successor's first record: both are at the same work
    outlive     SIGSTOP of the worker that the boundary `target` names, at its next record, with another beside it, of
                the same name where names are static; `lasts_s` seconds after its successor's first commit SIGKILL of
                that one and SIGCONT: what the zombie still writes stands last, and a third owner finds it
    twin        another worker (`count` of them at once) of the same name beside one of `target`, where names are
                static: the last to come gets the partitions, and as long as the others do not hear of it, all are at
                the same work; after `lasts_s` seconds SIGTERM of the first. Never drawn: it is a roll that begins
                the new before it ends the old
    roll        SIGTERM of one, and a new one in its place, as a rolling restart does
    scale       `count` workers of the stage from now on: a rebalance
    broker      SIGKILL of node `which`, started again after `lasts_s` seconds
    cluster     SIGKILL of all nodes, started again after `lasts_s` seconds
    leaderless  SIGKILL of so many nodes that nothing can be written: the only one, or two of three
    """

    at_s: float
    """Seconds after the load began."""
    kind: Kind
    target: str = ""
    which: int = 0
    """Which of the target's processes, modulo how many there are."""
    lasts_s: float = 0.0
    count: int = 0

    @property
    def takes_s(self) -> float:
        """How long it lasts, with what it waits for."""
        return self.lasts_s + (AWAITED_S if self.kind in ZOMBIES else 0.0)


_AT_A_BOUNDARY: Final[tuple[Kind, str]] = ("boundary", "")
_ZOMBIE_AT: Final = [name for name, boundary in BOUNDARIES.items() if boundary.stage in TAKEN_OVER]
_DECK: Final[tuple[tuple[Kind, str], ...]] = (
    ("kill", "generation"),
    ("scale", "generation"),
    ("kill", "admission"),
    ("kill", "generation"),
    ("stop", "generation"),
    ("kill", "screening"),
    ("scale", "generation"),
    ("broker", ""),
    ("kill", "http"),
    ("roll", "generation"),
    ("stop", "admission"),
    ("kill", "generation"),
    ("scale", "generation"),
    ("stop", "screening"),
    ("roll", "http"),
    *(_AT_A_BOUNDARY,) * 8,
    ("zombie", ""),
    ("zombie", ""),
    ("outlive", ""),
)
"""What is dealt, again and again: generation, which holds the most, is struck most."""
_RARE: Final[tuple[Kind, ...]] = ("cluster", "leaderless")
"""One after each round of the deck: nothing goes on meanwhile, so that little else is met."""
LEADERLESS_S: Final = 30.0


def schedule(seed: int, minutes: float, nodes: int = 1, *, plain: bool = False) -> list[Fault]:
    """The faults of a load of so many minutes, in the order of their times.

    Plain ones can be done to any system: to its brokers, and to the workers that call the model.
    """
    chance = random.Random(f"faults {seed}")  # noqa: S311 - no secret
    at, faults, dealt = _QUIET_S, list[Fault](), _deal(chance, plain=plain)
    records = {kind: _in_turn(chance, _ZOMBIE_AT) for kind in ZOMBIES}
    records["boundary"] = _in_turn(chance, list(BOUNDARIES))
    # A fault's own duration counts too: it must be over before the load is.
    while True:
        kind, target = next(dealt)
        fault = _fault(chance, at, kind, next(records[kind]) if kind in records else target, nodes)
        if at + fault.takes_s > minutes * 60 - _QUIET_S:
            return faults
        faults.append(fault)
        # The next may come while this one still lasts; what nothing goes on beside is let end.
        beside = 1.0 if kind in _RARE else chance.choice((0.3, 1.0))
        at = round(at + chance.uniform(*_PAUSE_S) + fault.takes_s * beside, 2)


def _deal(chance: random.Random, *, plain: bool) -> Iterator[tuple[Kind, str]]:
    deck = [dealt for dealt in _DECK if not plain or dealt[1] == "generation" or dealt[0] == "broker"]
    for rare in cycle(_RARE):
        yield from chance.sample(deck, len(deck))
        yield rare, ""


def _in_turn(chance: random.Random, names: Sequence[str]) -> Iterator[str]:
    while True:
        yield from chance.sample(names, len(names))


def _fault(chance: random.Random, at: float, kind: Kind, target: str, nodes: int) -> Fault:
    which = chance.randrange(12)
    match kind:
        case "stop":
            return Fault(at, kind, target, which, round(chance.uniform(*ZOMBIE_S), 2))
        case "zombie":
            return Fault(at, kind, target, which, round(chance.uniform(0.0, 0.5), 2))
        case "outlive":
            return Fault(at, kind, target, which, round(chance.uniform(0.0, 2.0), 2))
        case "twin":
            return Fault(at, kind, target, which, round(chance.uniform(0.0, 3.0), 2))
        case "scale":
            return Fault(at, kind, target, count=chance.choice((1, 2, 4, 4)))
        case "broker":
            # One node comes back at once, as a supervisor would start it; of three, one may be away for longer.
            return Fault(at, kind, "", which, 5.0 if nodes > 1 else round(chance.uniform(0.0, 2.0), 2))
        case "cluster":
            return Fault(at, kind, "", which, round(chance.uniform(0.0, 2.0), 2))
        case "leaderless":
            return Fault(at, kind, "", which, LEADERLESS_S)
        case "kill" | "boundary" | "roll":
            return Fault(at, kind, target, which)
    assert_never(kind)


def faults_of(listed: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """Faults from plain JSON data. Raises ValueError for what is none."""
    try:
        faults = [Fault(**fields) for fields in listed]
    except TypeError as error:
        raise ValueError(f"not a fault: {error}") from error
    for fault in faults:
        if fault.kind not in get_args(Kind):
            raise ValueError(f"{fault.kind!r} is no kind of fault")
        if fault.kind == "boundary" and fault.target not in BOUNDARIES:
            raise ValueError(f"{fault.target!r} is no boundary: one of {', '.join(BOUNDARIES)}")
        if fault.kind in ZOMBIES and fault.target not in _ZOMBIE_AT:
            raise ValueError(f"{fault.target!r} is no boundary of a stage that is succeeded: {', '.join(_ZOMBIE_AT)}")
    return faults
