"""One timer for all connections of a door.

Keep-alives, write timeouts and patience are checked here once a second for every open answer: a timer of its own for
each wait would cost more than the token that ends it. `now` is as exact as that needs: nobody asks a clock per token.
"""

import asyncio
from contextlib import suppress
from typing import Protocol


class Beating(Protocol):
    """Something that looks at the clock."""

    def beat(self, now: float) -> None:
        """Called about once a second with the event loop's time; must not block or raise."""
        ...


class Pulse:
    """Beats for everything in `members`."""

    def __init__(self, period_s: float = 1.0) -> None:
        self.members: set[Beating] = set()
        self.now = 0.0
        """The event loop's time at the last beat."""
        self._period_s = period_s
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to beat."""
        self.now = asyncio.get_running_loop().time()
        self._running = asyncio.create_task(self._run(), name="http-pulse")

    async def close(self) -> None:
        """Stop."""
        if self._running:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._period_s)
            self.now = loop.time()
            for member in tuple(self.members):
                member.beat(self.now)
