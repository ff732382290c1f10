"""What a request under way works with: the means of its process and partition, and effects named by their cause."""

from dataclasses import dataclass
from typing import Final

from klatch_agents.gateway.port import Gateway
from klatch_schemas import codec
from klatch_schemas.events import Event
from klatch_schemas.records import Cause, Draft
from klatch_schemas.topics import CHAT_REQUESTS, Namespace, Topic
from klatch_streams.batches import Batches
from klatch_streams.log import Log
from klatch_streams.stalls import Stalls
from klatch_workers.generation.conclude import PriceOf
from klatch_workers.generation.prepare import Preparer
from klatch_workers.generation.table import Table
from klatch_workers.generation.turns import Conversations

# The numbers of a request's effects: an effect is named by its cause, and is the same one when it is repeated.
SETTLED: Final = 0
TURN: Final = 1
END: Final = 2
OPENING: Final = 3
"""Ends and openings are numbered by attempt from here, in steps of two."""
RUNNING: Final = 1 << 40
"""Questions for more credit are numbered by the grant from here."""
CANCEL: Final = 1_000_000
"""Cancels of earlier requests, which `if_busy` asks for, are numbered by their distance from here."""


@dataclass(frozen=True, slots=True)
class Means:
    """What a request needs of its process and of its partition."""

    log: Log
    namespace: Namespace
    partition: int
    table: Table
    conversations: Conversations
    batches: Batches
    gateway: Gateway
    preparer: Preparer
    tries: int
    """How often the model is asked for one request, if another try may mend its failures."""
    prices: PriceOf
    stalls: Stalls
    owner: str
    """Unique to this owner of the partition: writers are named after it."""


@dataclass(frozen=True, slots=True)
class Effects:
    """Records of one request, with the ids that they have whenever they are written."""

    namespace: Namespace
    partition: int
    cause: Cause
    traceparent: str | None

    def draft(self, effect: int, topic: Topic, key: str, event: Event) -> Draft:
        """The record that holds `event`, the request's effect of that number."""
        partition = None if topic is CHAT_REQUESTS else self.partition
        cause = self.cause._replace(effect=effect)
        name = self.namespace.of(topic)
        return codec.draft(name, key, event, cause=cause, traceparent=self.traceparent, partition=partition)
