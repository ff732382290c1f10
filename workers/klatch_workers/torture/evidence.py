"""What a run is judged by: the records of the log as they were read back, and what clients and the model server saw.

Plain values, so that the judge is a pure function and a test can plant any lie.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from klatch_schemas.codec import Delta
from klatch_schemas.events import Event
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_workers.torture.load import Turn


class Entry(NamedTuple):
    """A record of the log that could be read."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    event_id: str
    """Empty for deltas, and where the writer gave none."""
    said: Event | Delta

    @property
    def position(self) -> str:
        """As a person looks it up."""
        return f"{self.topic}/{self.partition}/{self.offset}"


class Kept(NamedTuple):
    """A snapshot of a tenant's ledger, as a restore would have found it."""

    topic: str
    partition: int
    offset: int
    """Of its head."""
    tenant: str
    applied: int
    """The offset in the tenant's own log up to which it says to cover."""
    parts: Mapping[str, object]

    @property
    def position(self) -> str:
        """As a person looks it up."""
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Observation:
    """What one reader of one stream was shown, from its first text to the end it was told of."""

    reader: str
    """Who read: live, http, resumed, …"""
    request: RequestId
    text: str
    """What stands in this reader's eyes."""
    outcome: str | None
    """How the stream ended for it; None: it was never told."""
    voided: tuple[str, ...] = ()
    """Texts that it was shown and then told to be superseded."""
    outcomes: tuple[str, ...] = ()
    """Every end it was told of, if there was more than one."""
    left: bool = False
    """Whether it went away of its own will, and so heard of no end."""
    unfit: tuple[str, ...] = ()
    """Answers that no door may give: a bare 500, 503 that does not say when to come again."""
    deleted: bool = False
    """Whether a door took its `DELETE`: from then on the log has a cancel."""
    hung_up_ms: float = 0.0
    """When it went away for good from the call that had asked, where that is to cancel it; 0: it did not."""
    until_ms: float = inf
    """When it read no more."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A call that reached the model server."""

    id: str
    request: RequestId
    started_ms: float
    ended_ms: float = 0.0
    """When its answer was complete, or its connection closed, whichever came first; 0: neither has."""
    prompt_tokens: int | None = None
    """What the model server counted in its prompt, if that is known."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was carried out."""

    what: str
    """Such as `kill generation`, or `boundary first-delta/http`."""
    at_ms: float
    """From when on klatch can recover: the kill; of brokers, when they are started again."""
    until_ms: float
    began_ms: float = 0.0
    """When it began, if that was earlier."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Time in which the kit, and so perhaps nobody on this machine, got a processor."""

    from_ms: float
    until_ms: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the load planned it."""

    tenant: Tenant
    conversation: Conversation
    turn: Turn


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything. Records of a topic stand in log order within each partition."""

    asked: Mapping[RequestId, Asked]
    acknowledged: Collection[RequestId]
    """Requests that a client was told are accepted."""
    requests: Sequence[Entry] = ()
    admitted: Sequence[Entry] = ()
    stream: Sequence[Entry] = ()
    turns: Sequence[Entry] = ()
    dead: Sequence[str] = ()
    """Positions of dead letters."""
    snapshots: Sequence[Kept] = ()
    """Snapshots of tenants' ledgers."""
    observations: Sequence[Observation] = ()
    calls: Sequence[ModelCall] = ()
    struck: Sequence[Struck] = field(default=())
    stalls: Sequence[Stall] = ()
    bare: bool = False
    """Whether the system keeps only requests and streams: there are no decisions, turns, settlements or ledgers."""
