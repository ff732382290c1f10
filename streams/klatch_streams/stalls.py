"""Notices that this process did not run for a while: it was stopped, suspended, or got no processor.

Whatever it knew before is old then: records that stand in the log have not been read, and its group may have another
member in its place. The same holds where it waited long for something else, such as brokers that were away.
"""

import asyncio
import time
from collections.abc import Callable

_EVERY_S = 0.25


class Stalls:
    """`run` beside the work; `lately` says whether there was a stall."""

    def __init__(
        self, longer_than_s: float = 1.0, lately_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` must go on while the process is stopped, and not wait for the event loop's next round, as its own."""
        self._longer_than_s = longer_than_s
        self._lately_s = lately_s
        self._clock = clock
        self._seen = clock()
        self._over_at = float("-inf")

    @property
    def lately(self) -> bool:
        """Whether a stall ended within the last `lately_s`, or just now."""
        return self._clock() - self.last_over < self._lately_s

    @property
    def last_over(self) -> float:
        """When the last stall ended, by the clock: another one, if it is another time."""
        self.look()
        return self._over_at

    def now(self) -> float:
        """Seconds, by the clock."""
        return self._clock()

    def waited(self, since: float) -> None:
        """Somebody has waited since then, and may go by what was known before: if that was long, it is a stall."""
        now = self._clock()
        if now - since > self._longer_than_s:
            self._over_at = now

    def look(self) -> None:
        """Note that the process runs."""
        now = self._clock()
        if now - self._seen > self._longer_than_s + _EVERY_S:
            self._over_at = now
        self._seen = now

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        self.look()
        while True:
            await asyncio.sleep(_EVERY_S)
            self.look()
