"""Embeds finished turns in batches into the vector index, under ids that make telling a turn twice harmless.

A turn counts as done when its memories are durable in the index; an index or an embedding model that cannot be
reached stops the stage, and its supervisor starts it again where it left. The topic is the truth: an empty index
and a group without offsets rebuild everything.
"""

from collections.abc import Sequence

import structlog

from klatch_agents.memory.recall import Recall
from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.events import TurnFinished
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_TURNS, Namespace
from klatch_streams.dead_letters import DeadLetter, bury, dead_letter
from klatch_streams.log import Log

log = structlog.get_logger(__name__)


class MemoryStage:
    """Makes owners of partitions of `chat.turns`."""

    name = "memory"

    def __init__(self, log: Log, namespace: Namespace, recall: Recall) -> None:
        self.topic = namespace.of(CHAT_TURNS)
        self.log, self.namespace, self.recall = log, namespace, recall

    async def own(self, partition: Partition, committed: int) -> "MemoryOwner":  # noqa: ARG002 - see `Stage.own`
        """Nothing has to be restored."""
        return MemoryOwner(self, committed)


class MemoryOwner:
    """One partition of `chat.turns`."""

    def __init__(self, stage: MemoryStage, committed: int) -> None:
        self._stage = stage
        self._next = committed

    async def take(self, records: Sequence[Record]) -> None:
        """Remember a batch. Raises EmbeddingFailed, MemoryFailed, AppendFailed."""
        turns = [turn for record in records if (turn := await self._read(record))]
        made = await self._stage.recall.remember(turns)
        if made:
            log.info("turns.remembered", turns=len(turns), memories=made)
        self._next = records[-1].offset + 1

    async def checkpoint(self) -> int:
        """Everything taken is durable."""
        return self._next

    async def release(self, drain_s: float) -> None:
        """Nothing is in flight between two batches."""

    async def _read(self, record: Record) -> TurnFinished | None:
        try:
            return codec.decode_as(TurnFinished, record.value)
        except Unreadable as error:
            why = DeadLetter("unreadable", str(error))
            await bury(self._stage.log, [dead_letter(record, self._stage.namespace, self._stage.name, why)])
            return None
