"""A state of the small model's world, and the bounds within which all of them are visited."""

from dataclasses import dataclass
from typing import NamedTuple

from tests.model.logs import Admitted, Effect, Intake, Place, Said
from tests.model.parts import Saved
from tests.model.policy import Node
from tests.model.strands import Token

from klatch_schemas.events import IfBusy


@dataclass(frozen=True)
class Bounds:
    """How much may happen, at any time and in any order."""

    requests: int = 1
    """Of one conversation, published by different clients in any order."""
    chunks: int = 2
    """Tokens of a whole reply."""
    repeats: int = 0
    """How often a producer sends a request again."""
    cancels: int = 0
    takeovers: int = 0
    """How often generation's partition gets a new owner. The old one may be dead, or a zombie that goes on for any
    time, at any pace, with what it knows: a crash is a zombie that does nothing more."""
    admission_takeovers: int = 0
    breaks: int = 0
    """How often a model call fails, at any token, such that another try may mend it."""
    impatience: int = 0
    """How often somebody takes an attempt for stalled whose owner lives."""
    deadlines: bool = False
    """Whether the requests' deadline passes, at any time."""
    concurrent: int | None = None
    """The tenant's limit of concurrent requests."""
    continues: bool = False
    """Whether later attempts go on behind the text that stands."""
    if_busy: IfBusy = "enqueue"
    in_flight: bool = False
    """Whether deltas, too, may be on their way for any time (openings, ends and cancels always may). It adds little:
    that an owner is slow to read what would stop it comes to the same, until it concludes."""


class AdmissionOwner(NamedTuple):
    """An owner of the tenant's partition."""

    at: int
    """Offset of the next record that it takes."""
    applied: int
    """The last offset that its state holds."""
    pending: tuple[Effect, ...] = ()
    """Written, not yet in the log."""


class Running(NamedTuple):
    """A request that an owner brings to its end."""

    request: int
    offset: int
    """Of its record on chat.admitted: its place in the conversation's line."""
    policy: Node
    phase: str = ""
    """How far its command is carried out."""
    began_at: int = 0
    """The attempt that was in force when the command began."""
    given_up: int = 0
    attempt: int = 0
    """The last that this owner opened."""
    opened: int = -1
    """Where its opening stands; -1: on its way."""
    openings: int = 0
    continues: bool = False
    anew: bool = False
    """Whether nobody continued what stood: later attempts of this owner begin anew."""
    call: str = ""
    token: Token | None = None
    """The last one that the call has said, or was given to go on from."""
    said: int = 0
    """How many deltas were written into the attempt."""
    spoke: bool = False
    finished: bool = False
    ended: int = -1
    """Where its end stands; -1: on its way."""
    stands_aside: bool = False


class Owner(NamedTuple):
    """An owner of the conversation's partition."""

    at: int
    """Offset of the next record of chat.admitted that it takes."""
    view: Place
    """As far as it has read chat.stream."""
    seen: int
    saved: Saved
    """What it may write as its snapshot."""
    done_before: int
    wrote: int
    """The `applied` of the last snapshot that it wrote, or restored."""
    concluded: frozenset[int] = frozenset()
    running: tuple[Running, ...] = ()
    """In the order in which they were met."""
    pending: tuple[Said, ...] = ()
    """Written, not yet in the log; lands in order, or never."""

    def with_running(self, one: Running) -> "Owner":
        """The owner after one of its requests has moved."""
        running = tuple(one if other.request == one.request else other for other in self.running)
        return self._replace(running=running)


class World(NamedTuple):
    """Everything that a continuation may depend on."""

    requests: Intake
    admitted: tuple[Admitted, ...]
    stream: Place
    admission: tuple[AdmissionOwner, ...]
    """The last one owns the partition; the others may not know."""
    generation: tuple[Owner, ...]
    admission_saved: int = -1
    """Applied offset of admission's snapshot."""
    admission_committed: int = 0
    saved: Saved = Saved()
    committed: int = 0
    repeats: int = 0
    cancels: int = 0
    breaks: int = 0
    impatience: int = 0
    expired: bool = False

    def with_owner(self, number: int, owner: Owner) -> "World":
        """The world after an owner of the conversation's partition has moved."""
        owners = self.generation
        return self._replace(generation=(*owners[:number], owner, *owners[number + 1 :]))


class Step(NamedTuple):
    """A transition."""

    name: str
    to: World
    fair: bool = True
    """Whether it happens by itself, without faults, without clients, and without zombies."""
    alone: bool = False
    """Whether nothing that may happen before it can differ from what happens after it: it is then taken first."""
