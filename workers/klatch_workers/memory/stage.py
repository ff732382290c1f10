"""Embeds finished turns in batches into the vector index, under ids that make telling a turn twice harmless.

A turn counts as done when its memories are durable in the index. A batch that fails is tried turn by turn. A turn that
fails while a turn of our own making is remembered is tried again, later and later, and then is a dead letter; an index
or a model that takes nothing at all stops the stage, and its supervisor starts it again where it left. The topic is
the truth: an empty index and a group without offsets rebuild everything.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from klatch_agents.memory.recall import Recall
from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.errors import KlatchError
from klatch_schemas.events import TurnFinished
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_TURNS, Namespace
from klatch_streams.dead_letters import DeadLetter, bury, dead_letter, describe
from klatch_streams.log import Log

log = structlog.get_logger(__name__)

PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Before a turn is tried again that failed as if another try may mend it: longer together than a limit by the minute,
which a short text may pass and a long one not."""
_TRIES: Final = 2
"""Of a turn whose failure no other try mends: one before it was seen that others are taken, and one after."""


class MemoryStage:
    """Makes owners of partitions of `chat.turns`."""

    name = "memory"

    def __init__(self, log: Log, namespace: Namespace, recall: Recall, pauses_s: Sequence[float] = PAUSES_S) -> None:
        self.topic = namespace.of(CHAT_TURNS)
        self.log, self.namespace, self.recall, self.pauses_s = log, namespace, recall, pauses_s

    async def own(self, partition: Partition, committed: int) -> "MemoryOwner":  # noqa: ARG002 - see `Stage.own`
        """Nothing has to be restored."""
        return MemoryOwner(self, committed)


class MemoryOwner:
    """One partition of `chat.turns`."""

    def __init__(self, stage: MemoryStage, committed: int) -> None:
        self._stage = stage
        self._next = committed

    async def take(self, records: Sequence[Record]) -> None:
        """Remember a batch. Raises EmbeddingFailed, MemoryFailed where nothing can be remembered; AppendFailed."""
        turns = [(record, turn) for record in records if (turn := await self._read(record))]
        try:
            made = await self._stage.recall.remember(turn for _, turn in turns)
        except Exception as error:  # noqa: BLE001 - the boundary of a record: what failed is found out one by one
            log.warning("turns.failed", turns=len(turns), fault=describe(error))
            made = sum([await self._alone(record, turn) for record, turn in turns])
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
            await self._bury(record, DeadLetter("unreadable", str(error)))
            return None

    async def _alone(self, record: Record, turn: TurnFinished) -> int:
        """Remember one turn, or bury it. Raises what the stage ends with: nothing can be remembered at all."""
        failures = 0
        while True:
            try:
                return await self._stage.recall.remember([turn])
            except Exception as error:  # noqa: BLE001 - see `take`
                failures += 1
                fault, pause_s = describe(error), self._pause_s(error, failures)
            # If this fails, the fault is not the turn's.
            await self._stage.recall.probe()
            if pause_s is None:
                log.error("turn.given_up", request=turn.request, fault=fault, attempts=failures)
                await self._bury(record, DeadLetter("failed", fault, failures))
                return 0
            log.warning("turn.retried", request=turn.request, fault=fault, failures=failures, wait_s=pause_s)
            await asyncio.sleep(pause_s)

    def _pause_s(self, error: Exception, failures: int) -> float | None:
        if isinstance(error, KlatchError) and error.retriable:
            return self._stage.pauses_s[failures - 1] if failures <= len(self._stage.pauses_s) else None
        return 0.0 if failures < _TRIES else None

    async def _bury(self, record: Record, why: DeadLetter) -> None:
        await bury(self._stage.log, [dead_letter(record, self._stage.namespace, self._stage.name, why)])
