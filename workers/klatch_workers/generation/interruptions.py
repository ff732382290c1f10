"""What ends a wait at once: a cancel or an end in the log, somebody else's attempt, a deadline.

Whatever a command of the policy waits for, its work is cancelled the moment one of them comes: a model's connection
closes with it.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from klatch_streams.generation import Interrupted, Report
from klatch_workers.generation.table import Tracked


@dataclass(frozen=True, slots=True)
class Interruptions:
    """Those of one request."""

    tracked: Tracked
    deadline_ms: int | None
    in_force: Callable[[], bool]
    """Whether the attempt in force is this process's own."""

    async def unless(self, work: Coroutine[None, None, Report], *, alone: bool = False) -> Report:
        """Do the work, or report what came between. With `alone`, somebody else's attempt may go on beside it."""
        if already := self._already(alone):
            work.close()  # not even begun: a model that was called for a moment was called
            return already
        working = asyncio.ensure_future(work)
        listening = asyncio.ensure_future(self._come_between(alone))
        try:
            await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else listening.result()
        finally:
            await _cancelled(working, listening)

    async def until(self, true: Callable[[], bool], *, alone: bool = False) -> None:
        """Wait until `true()`, which the request is told of, or until something comes between."""
        if not self._already(alone):
            await self._first(alone, true)

    def seconds_left(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self.deadline_ms is None else max(0.0, self.deadline_ms / 1000 - time.time())

    def _already(self, alone: bool) -> Interrupted | None:
        if said := self._now(self.tracked.assembly.state.attempt, alone):
            return said
        return Interrupted("expired") if self.seconds_left() == 0 else None

    async def _come_between(self, alone: bool) -> Report:
        interrupted = await self._first(alone, lambda: False)
        assert interrupted  # noqa: S101 - awaited just now
        return interrupted

    async def _first(self, alone: bool, true: Callable[[], bool]) -> Interrupted | None:
        at_start = self.tracked.assembly.state.attempt
        try:
            async with asyncio.timeout(self.seconds_left()):
                await self.tracked.until(lambda: true() or self._now(at_start, alone) is not None)
        except TimeoutError:
            return Interrupted("expired")
        return self._now(at_start, alone)

    def _now(self, attempt_at_start: int, alone: bool) -> Interrupted | None:
        state = self.tracked.assembly.state
        if state.status is not None:
            return Interrupted("ended" if state.settled else "cancelled")
        if state.attempt > attempt_at_start and not alone and not self.in_force():
            return Interrupted("superseded")
        return None


async def _cancelled(*tasks: "asyncio.Future[Report]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
