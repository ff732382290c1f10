"""The kernel: `decide(state, event) -> (state, effects)`, and what follows from its being pure.

A decider is a deterministic function of one totally ordered input partition, so a zombie and its successor, or one
owner before and after a crash, reach the same decisions. Every effect is named by its cause, so that receivers can
drop what they have seen. Nothing here, or in any decider, imports a clock, randomness, the network or asyncio.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from klatch_schemas import codec
from klatch_schemas.events import Event
from klatch_schemas.records import Cause, Draft, Record
from klatch_schemas.topics import Namespace, Topic
from klatch_streams.dead_headers import history

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Emit:
    """An effect: write `event` under `key` into `topic`."""

    topic: Topic
    key: str
    event: Event


@dataclass(frozen=True, slots=True)
class Input(Generic[S]):
    """An event with the facts about its record that a decision may use."""

    event: Event
    timestamp_ms: int
    """The record's timestamp: the only clock a decider has."""


class Decider(Protocol[S]):
    """A pure, total stage: one per input topic, a state per key."""

    name: str
    input: Topic
    state: Topic
    """The compacted topic of its snapshots, co-partitioned with `input`."""

    def initial(self, key: str) -> S:
        """The state of a key that was never heard of."""
        ...

    def decide(self, state: S, said: "Input[S]") -> tuple[S, Sequence[Emit]]:
        """The next state, and what follows. A late or repeated event changes nothing."""
        ...

    def dump(self, state: S) -> dict[str, object]:
        """The state as parts of plain JSON data, by part name; only parts that changed are written again.

        No parts: a state that decides as the initial one does; its key is forgotten.
        """
        ...

    def load(self, key: str, parts: dict[str, object]) -> S:
        """What `dump` wrote, as a state again."""
        ...


def fold(decider: Decider[S], key: str, said: Iterable["Input[S]"]) -> tuple[S, list[Emit]]:
    """Replay: the state after `said`, and every effect on the way."""
    state, effects = decider.initial(key), list[Emit]()
    for one in said:
        state, more = decider.decide(state, one)
        effects += more
    return state, effects


def drafts_of(effects: Sequence[Emit], record: Record, namespace: Namespace) -> list[Draft]:
    """The effects of `record`, each named by its cause, in the trace of the record.

    Those of a redriven record say so: whoever receives them looks for what was done the time before.
    """
    trace, before = record.header(codec.TRACEPARENT), history(record)
    drafts = [
        codec.draft(
            namespace.of(effect.topic),
            effect.key,
            effect.event,
            cause=Cause(record.partition, record.offset, index),
            traceparent=trace,
        )
        for index, effect in enumerate(effects)
    ]
    return [draft._replace(headers=[*draft.headers, *before]) for draft in drafts] if before else drafts
