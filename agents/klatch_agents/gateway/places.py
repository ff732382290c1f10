"""The places at one deployment, as something to wait for: the shell of `fair.py`.

They are this process's own: a limit of 8 in four generation processes lets 32 calls through.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from klatch_agents.gateway.errors import ExpiredError
from klatch_agents.gateway.fair import Claim, FairQueue, Turn


@dataclass(slots=True)
class Place:
    """A place that is held."""

    used: bool = False
    """Set it where a call is made: a place that was had in vain tells nothing of how long calls are."""


class Places:
    """Hands out places in the order of a `FairQueue`. `now` is in seconds since 1970, as deadlines are."""

    def __init__(self, limit: int | None, now: Callable[[], float] = time.time) -> None:
        self.queue = FairQueue(limit)
        self._now = now
        self._waiting: dict[Claim, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def hold(self, claim: Claim, moved: Callable[[], Awaitable[None]]) -> AsyncGenerator[Place | None]:
        """Have a place for as long as the block lasts, once it is one's turn. Raises ExpiredError.

        None: `moved`, which is begun where there is a wait, returned first. Whoever is cancelled while waiting leaves
        no trace; whoever was granted a place in that very moment gives it back.
        """
        place = Place()
        waiting = self._waiting[claim] = asyncio.get_running_loop().create_future()
        self._tell(self.queue.ask(claim, self._now()))
        try:
            if not waiting.done():
                await self._turn_of(claim, waiting, moved)
            if waiting.done():
                waiting.result()
                yield place
            else:
                yield None
        finally:
            del self._waiting[claim]
            if waiting.done() and waiting.exception() is None:
                self._tell(self.queue.give_back(claim, self._now(), used=place.used))
            else:
                self.queue.withdraw(claim)

    def resize(self, limit: int | None) -> None:
        """Set the limit anew."""
        if limit != self.queue.limit:
            self._tell(self.queue.resize(limit, self._now()))

    async def _turn_of(
        self, claim: Claim, waiting: "asyncio.Future[None]", moved: Callable[[], Awaitable[None]]
    ) -> None:
        left_s = None if claim.expires is None else max(0.0, claim.expires - self._now())
        moving = asyncio.ensure_future(moved())
        try:
            await asyncio.wait({waiting, moving}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if moving.done():
                moving.result()
            elif not waiting.done():
                raise _too_late()
        finally:
            moving.cancel()

    def _tell(self, turn: Turn) -> None:
        for claim in turn.granted:
            self._waiting[claim].set_result(None)
        for claim in turn.shed:
            self._waiting[claim].set_exception(_too_late())


def _too_late() -> ExpiredError:
    return ExpiredError("the request's deadline passed while it waited for a place at the model")
