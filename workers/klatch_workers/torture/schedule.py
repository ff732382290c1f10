"""Which faults happen when: a pure function of the seed, so that a run can be told by its seed and had again.

What a fault meets (which records are in flight) is up to the machine: the same schedule finds the same bug often, not
always. A schedule is saved as JSON, and replayed from it.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

Kind = Literal["kill", "stop", "roll", "scale", "broker"]

ZOMBIE_S: Final = (12.0, 15.0)
"""How long a stopped process stays stopped: past the group's session time-out of 10 s."""
_PAUSE_S: Final = (3.0, 8.0)
_QUIET_S: Final = 4.0
"""At either end of the load nothing is struck: there must be streams to hit, and time to see them come back."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is done to a process.

    kill    SIGKILL of one worker of the stage `target`
    stop    SIGSTOP of one for `lasts` seconds, with another beside it, then SIGCONT: a zombie
    roll    SIGTERM of one, and a new one in its place, as a rolling restart does
    scale   `count` workers of the stage from now on: a rebalance
    broker  SIGKILL of node `which`, started again after `lasts` seconds
    """

    at_s: float
    """Seconds after the load began."""
    kind: Kind
    target: str = ""
    which: int = 0
    """Which of the target's processes, modulo how many there are."""
    lasts_s: float = 0.0
    count: int = 0


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
)
"""What is dealt, again and again: generation, which holds the most, is struck most."""


def schedule(seed: int, minutes: float, nodes: int = 1) -> list[Fault]:
    """The faults of a load of so many minutes, in the order of their times."""
    chance = random.Random(f"faults {seed}")  # noqa: S311 - no secret
    at, faults, dealt = _QUIET_S, list[Fault](), _deal(chance)
    # A fault's own duration counts too: it must be over before the load is.
    while True:
        fault = _fault(chance, at, *next(dealt), nodes)
        if at + fault.lasts_s > minutes * 60 - _QUIET_S:
            return faults
        faults.append(fault)
        # The next may come while this one still lasts.
        at = round(at + chance.uniform(*_PAUSE_S) + fault.lasts_s * chance.choice((0.3, 1.0)), 2)


def _deal(chance: random.Random) -> Iterator[tuple[Kind, str]]:
    while True:
        yield from chance.sample(_DECK, len(_DECK))


def _fault(chance: random.Random, at: float, kind: Kind, target: str, nodes: int) -> Fault:
    which = chance.randrange(12)
    match kind:
        case "stop":
            return Fault(at, kind, target, which, round(chance.uniform(*ZOMBIE_S), 2))
        case "scale":
            return Fault(at, kind, target, count=chance.choice((1, 2, 4, 4)))
        case "broker":
            # One node comes back at once, as a supervisor would start it; of three, one may be away for longer.
            return Fault(at, kind, "", which, 5.0 if nodes > 1 else round(chance.uniform(0.0, 2.0), 2))
        case _:
            return Fault(at, kind, target, which)


def to_json(faults: Sequence[Fault]) -> str:
    """A schedule as JSON, a fault a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(fault)) for fault in faults) + "\n]\n"


def from_json(text: str) -> list[Fault]:
    """What `to_json` wrote. Raises ValueError."""
    try:
        return [Fault(**fields) for fields in json.loads(text)]
    except TypeError as error:
        raise ValueError(f"not a schedule of faults: {error}") from error
