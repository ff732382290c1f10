"""The system under torture: which processes it has, how each is started, and how its streams are read.

All else of a run is the same for all.

A worker is `python -m MODULE ARGUMENTS` that says `{"event": "ready"}` on stdout when it serves, and drains on SIGTERM.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from klatch_schemas import codec
from klatch_schemas.assembly import Said
from klatch_schemas.codec import Unreadable
from klatch_schemas.records import Record
from klatch_workers.settings import PREFIX

_AT_ONCE: Final = 8
"""Requests of a partition that have their turn at once: so few that tenants wait for their shares after an outage."""
Read = Callable[[Record], Sequence[Said]]
"""A reader of the stream topic: what a record says, in the words of the contract. Given every record once, in order."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker finds what it needs."""

    name: str
    """Of the worker, its own."""
    kafka: str
    """Bootstrap servers."""
    model_url: str
    """With `/v1`."""
    door: str
    """`http://HOST:PORT` of the HTTP door."""
    data: Path
    partitions: int
    """Of every topic that is keyed by conversation."""
    drain_s: float
    """How long a worker may take to end in good order."""
    remembers_s: float
    """How long a request may be asked again under the same key, and a stream may be looked for by its id."""
    static: bool
    """Whether the worker's name is its static membership in its groups."""


@dataclass(frozen=True, slots=True)
class Command:
    """A worker's process."""

    module: str
    arguments: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """Environment variables besides those of this process; klatch's own are not passed on."""


class System(Protocol):
    """What is tortured."""

    @property
    def name(self) -> str:
        """As a report calls it."""
        ...

    @property
    def stages(self) -> tuple[str, ...]:
        """Its sorts of worker, each a pool of processes, in the order in which work passes through them."""
        ...

    @property
    def bare(self) -> bool:
        """Whether it is only requests and their streams: nothing is admitted, billed or kept as a turn."""
        ...

    @property
    def readings(self) -> Mapping[str, Callable[[], Read]]:
        """How its streams are read, by name; what clients do is by the first."""
        ...

    def worker(self, stage: str, place: Place) -> Command:
        """How to start a worker of a stage."""
        ...


@dataclass(frozen=True, slots=True)
class Klatch:
    """klatch: each stage that a request passes through, and the HTTP door."""

    name: str = "klatch"
    stages: tuple[str, ...] = ("admission", "screening", "generation", "http")
    bare: bool = False

    @property
    def readings(self) -> Mapping[str, Callable[[], Read]]:
        """The contract's."""
        return {"contract": lambda: by_contract}

    def worker(self, stage: str, place: Place) -> Command:
        """`klatch worker STAGE`."""
        settings = {
            "KAFKA": place.kafka,
            "HTTP": place.door.removeprefix("http://"),
            "MODEL_URL": place.model_url,
            "DATA": str(place.data),
            "DRAIN_S": str(place.drain_s),
            "MODEL_CONTINUES": "prefill",
            "IDEMPOTENCY_S": str(place.remembers_s),
            "MAX_IN_FLIGHT": str(_AT_ONCE),
            **({"INSTANCE": place.name} if place.static else {}),
        }
        environment = {PREFIX + setting: value for setting, value in settings.items()}
        return Command("klatch_workers", ("worker", stage, "--json"), environment)


def by_contract(record: Record) -> Sequence[Said]:
    """What an event of klatch says; nothing, if it cannot be read."""
    try:
        return [codec.decode(record.value)]
    except Unreadable:
        return []
