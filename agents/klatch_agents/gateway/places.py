"""The places at deployments, as something to wait for: the shell of `fair.py`.

They are this process's own: a limit of 8 in four generation processes lets 32 calls through. Who would have a place at
any of several deployments waits for a turn at each, and has left the others when the first one comes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from klatch_agents.gateway.errors import ExpiredError
from klatch_agents.gateway.fair import Claim, FairQueue, Turn


@dataclass(slots=True)
class Place:
    """A place that is held."""

    at: str
    """Which of those that were asked for."""
    used: bool = False
    """Set it where a call is made: a place that was had in vain tells nothing of how long calls are."""


class Places:
    """Hands out the places at one deployment in the order of a `FairQueue`. `now` is in seconds since 1970, as
    deadlines are."""

    def __init__(self, limit: int | None, now: Callable[[], float] = time.time) -> None:
        self.queue = FairQueue(limit)
        self.now = now
        self._waiting: dict[Claim, _Wait] = {}

    def ask(self, wait: "_Wait") -> None:
        """Have somebody wait here, too; its turn may be now."""
        self._waiting[wait.claim] = wait
        self._tell(self.queue.ask(wait.claim, self.now()))

    def withdraw(self, claim: Claim) -> None:
        """A claim that waits here, or did, does so no longer."""
        self._waiting.pop(claim, None)
        self.queue.withdraw(claim)

    def give_back(self, claim: Claim, *, used: bool) -> None:
        """See `FairQueue.give_back`."""
        self._tell(self.queue.give_back(claim, self.now(), used=used))

    def resize(self, limit: int | None) -> None:
        """Set the limit anew."""
        if limit != self.queue.limit:
            self._tell(self.queue.resize(limit, self.now()))

    def _tell(self, turn: Turn) -> None:
        for claim in turn.granted:
            self._waiting.pop(claim).granted(self)
        for claim in turn.shed:
            self._waiting.pop(claim).shed()


class _Wait:
    """Somebody who waits for a place at any of several deployments."""

    def __init__(self, claim: Claim, choice: Mapping[str, Places]) -> None:
        self.claim = claim
        self.turn: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._choice = choice
        for places in choice.values():
            if not self.turn.done():
                places.ask(self)

    def granted(self, at: Places) -> None:
        # Before anybody else is told anything: no claim ever has two places.
        self._leave()
        self.turn.set_result(next(name for name, places in self._choice.items() if places is at))

    def shed(self) -> None:
        self._leave()
        self.turn.set_exception(_too_late())

    async def over(self, moved: Callable[[], Awaitable[object]]) -> None:
        """Wait for the turn, or for `moved` to return. Raises ExpiredError."""
        now = next(iter(self._choice.values())).now()
        left_s = None if self.claim.expires is None else max(0.0, self.claim.expires - now)
        moving = asyncio.ensure_future(moved())
        try:
            either: set[asyncio.Future[Any]] = {self.turn, moving}
            await asyncio.wait(either, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if moving.done():
                moving.result()
            elif not self.turn.done():
                raise _too_late()
        finally:
            moving.cancel()

    def end(self, place: Place | None) -> None:
        if self.turn.done() and self.turn.exception() is None:
            self._choice[self.turn.result()].give_back(self.claim, used=place is not None and place.used)
        else:
            self._leave()

    def _leave(self) -> None:
        for places in self._choice.values():
            places.withdraw(self.claim)


@asynccontextmanager
async def hold(
    claim: Claim, choice: Mapping[str, Places], moved: Callable[[], Awaitable[object]]
) -> AsyncGenerator[Place | None]:
    """Have a place for as long as the block lasts, at the first of `choice` that has one, once it is one's turn there.
    Raises ExpiredError.

    None: there is no choice, or `moved`, which is begun where there is a wait, returned first. Whoever is cancelled
    while waiting leaves no trace; whoever was granted a place in that very moment gives it back.
    """
    wait, place = _Wait(claim, choice), None
    try:
        if choice and not wait.turn.done():
            await wait.over(moved)
        if wait.turn.done():
            place = Place(wait.turn.result())
        yield place
    finally:
        wait.end(place)


def _too_late() -> ExpiredError:
    return ExpiredError("the request's deadline passed while it waited for a place at the model")
