"""Credit of a running reply: how many tokens it may still say before a budget of its tenant is spent.

Only for replies that admission granted a number of tokens (`Reservation.granted`). Well before they are used up more is
asked for, once a grant; the answer comes in the reply's own stream (`Tracked.granted`). A chunk that does not fit waits
for it, and without an answer, or without more, is not said: the reply is stopped. What was not said is not billed.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import structlog

from klatch_agents.gateway.port import Chunk
from klatch_schemas import codec
from klatch_schemas.assembly import LAST
from klatch_schemas.chunks import Json
from klatch_schemas.events import ChatAdmitted, UsageRunning
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_REQUESTS
from klatch_streams.counting import Count
from klatch_streams.log import LogError
from klatch_workers.generation.means import RUNNING, Effects, Means
from klatch_workers.generation.table import Tracked

log = structlog.get_logger(__name__)

ANSWER_S: Final = 5.0
"""How long a reply waits for an answer."""
LEAD: Final = 256
"""More is asked for when so many tokens are left, or a quarter of the grant if that is fewer."""
_CONSTANT: Final = ("id", "created", "model", "system_fingerprint")


@dataclass(slots=True)
class Credit:
    """The credit of one request, over all its attempts."""

    means: Means
    admitted: ChatAdmitted
    effects: Effects
    tracked: Tracked
    first: int
    """What was granted on entry."""
    count: Count = field(default_factory=Count)
    choices: set[int] = field(default_factory=set[int])
    finishes: dict[int, str] = field(default_factory=dict[int, str])
    """By choice: how it finished."""
    last: deque[bytes] = field(default_factory=lambda: deque[bytes](maxlen=LAST))
    """The last chunks that were said."""
    stopped_by: str | None = None
    """The budget that stopped the reply."""
    _asked: int = -1
    _asking: "set[asyncio.Task[None]]" = field(default_factory=set["asyncio.Task[None]"])

    def begin(self, tokens: int) -> None:
        """An attempt begins, with so many tokens standing."""
        self.count, self.stopped_by = Count(tokens), None
        self.last.clear()
        self.choices.clear()
        self.finishes.clear()

    async def allows(self, chunk: Chunk, raw: bytes) -> bool:
        """Whether the reply may say this chunk, as `raw`, which is then counted."""
        self.choices.update(chunk.choices)
        tokens = self.count.after(raw)
        if tokens > self._most - min(LEAD, self._most // 4):
            self._ask(tokens)
            if tokens > self._most and not await self._granted(tokens):
                self.stopped_by = self.tracked.spent or self.admitted.reservation.limit or "budget"
                log.info("reply.stopped", request=self.tracked.request, limit=self.stopped_by, tokens=self.count.tokens)
                return False
        self.count.tokens = tokens
        self.last.append(raw)
        self.finishes.update(chunk.finishes)
        return True

    def closing(self) -> list[Chunk]:
        """The chunks that say that the reply was stopped, one a choice that is open, named as those before."""
        said: list[Json] = [codec.loads(raw) for raw in reversed(self.last)]
        nobody: Json = {}
        spoken = next((chunk for chunk in said if chunk.get("id")), said[0] if said else nobody)
        named: Json = {name: spoken[name] for name in _CONSTANT if name in spoken}
        chunks: list[Chunk] = []
        for index in sorted(self.choices - self.finishes.keys()):
            choice: Json = {"index": index, "delta": {}, "finish_reason": "length"}
            facts: Json = {
                "object": "chat.completion.chunk",
                "choices": [choice],
                "klatch": {"stopped_by": self.stopped_by},
            }
            chunks.append(Chunk(codec.dumps({**named, **facts}), choices=(index,), finishes=((index, "length"),)))
            self.finishes[index] = "length"
        return chunks

    @property
    def _most(self) -> int:
        return max(self.first, self.tracked.granted)

    async def _granted(self, tokens: int) -> bool:
        try:
            async with asyncio.timeout(ANSWER_S):
                while tokens > self._most and self.tracked.spent is None:
                    self._ask(tokens)
                    await self._answer()
        except TimeoutError:
            log.warning("credit.unanswered", request=self.tracked.request, tokens=tokens, granted=self._most)
        return tokens <= self._most

    async def _answer(self) -> None:
        known = self._most
        await self.tracked.until(lambda: self._most > known or self.tracked.spent is not None)

    def _ask(self, tokens: int) -> None:
        if self._asked == self._most or self.tracked.spent is not None:
            return
        self._asked = self._most
        request = self.admitted.request
        running = UsageRunning(
            request=request.request,
            tenant=request.tenant,
            conversation=request.conversation,
            tokens=tokens,
            granted=self._most,
        )
        draft = self.effects.draft(RUNNING + self._most, CHAT_REQUESTS, request.tenant, running)
        asking = asyncio.create_task(self._append(draft), name="credit")
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)

    async def _append(self, draft: Draft) -> None:
        try:
            await self.means.log.append([draft])
        except LogError as error:
            # No answer will come: the reply stops at its grant.
            log.warning("credit.not_asked", request=self.tracked.request, error=str(error))


def credit_of(means: Means, admitted: ChatAdmitted, effects: Effects, tracked: Tracked) -> Credit | None:
    """The credit of a request; None if nothing bounds its reply."""
    granted = admitted.reservation.granted
    return None if granted is None else Credit(means, admitted, effects, tracked, granted)
