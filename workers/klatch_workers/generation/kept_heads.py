"""The heads of a partition's conversations in its snapshots: found by a successor, taken away once they serve nothing.

A head serves nothing once the log holds its turn no more: then the conversation begins anew. Which these are is asked
of the log now and then, and gone through a few heads a checkpoint, so that millions of them hold nobody up.
"""

import asyncio
from typing import Any, Final

import structlog

from klatch_schemas.records import Partition
from klatch_streams.log import Log, LogError
from klatch_streams.snapshots import Parts, Snapshots
from klatch_workers.generation.heads import Aging, Head
from klatch_workers.generation.turns import Conversations

log: Final = structlog.stdlib.get_logger(__name__)

_TURNS: Final = "turns/"
_LAST: Final = "last"

ASKED_EVERY_S: Final = 600.0
"""Between two looks at where the log of turns begins."""
_PATIENCE_S: Final = 2.0
LOOKED_AT: Final = 1_000
"""Heads a checkpoint: a millisecond or two."""


class KeptHeads:
    """Restores and keeps the heads of one partition."""

    def __init__(self, source: Log, turns: Partition, conversations: Conversations, snapshots: Snapshots) -> None:
        self._log, self._turns = source, turns
        self._conversations, self._snapshots = conversations, snapshots
        self._aging = Aging(conversations.heads)
        self._ask_at = 0.0
        for key, saved in snapshots.hand_over(_TURNS):
            last: Any = saved.parts[_LAST]
            conversations.heads.put(key.removeprefix(_TURNS), Head(last["offset"], saved.applied))

    def changed(self) -> list[tuple[str, int, Parts]]:
        """What the snapshot does not hold yet; it is going to be written now."""
        conversations = self._conversations
        changed, conversations.changed = conversations.changed, {}
        heads = [(key, conversations.heads.get(key), changed[key]) for key in sorted(changed)]
        return [
            (f"{_TURNS}{key}", head.applied, {_LAST: {"offset": head.offset, "request": request}})
            for key, head, request in heads
            if head
        ]

    async def forget_aged(self, committed: int) -> None:
        """Take away some heads that serve nothing, of requests that are committed. Raises AppendFailed.

        Before that a successor needs them, to not remember a turn twice.
        """
        if (now := asyncio.get_running_loop().time()) >= self._ask_at:
            self._ask_at = now + ASKED_EVERY_S
            await self._ask()
        aged = self._aging.step(committed, LOOKED_AT)
        for key, _ in aged:
            self._conversations.heads.forget(key)
        if aged:
            log.info("conversations.forgotten", partition=self._turns.number, count=len(aged))
            await self._snapshots.take_away((f"{_TURNS}{key}", head.applied, (_LAST,)) for key, head in aged)

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                first, _ = await self._log.bounds(self._turns)
        except (LogError, TimeoutError) as error:
            log.warning("conversations.not_aged", partition=self._turns.number, reason=str(error) or "too slow")
        else:
            self._aging.begin(first)
