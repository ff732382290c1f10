"""Runs something again after it failed, at growing intervals.

The policy is here, the doing is the caller's: `run` must leave nothing behind when it fails. Clock, sleep and
randomness are the caller's too, so tests need not wait.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

logger: Final = structlog.stdlib.get_logger()


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits `first_s`, then `factor` times as long each time, up to `most_s`; jitter takes up to half of it off."""

    first_s: float = 0.2
    factor: float = 2.0
    most_s: float = 15.0
    healthy_s: float = 60.0
    """A run that lasted so long was healthy: the next failure waits `first_s` again."""

    def wait_s(self, failures: int, chance: float) -> float:
        """How long to wait after `failures` in a row (1 or more); `chance` is in [0, 1)."""
        # The exponent is bounded because 2.0 ** 1024 overflows, and a supervisor runs for ever.
        whole = min(self.most_s, self.first_s * self.factor ** min(failures - 1, 64))
        return whole * (1 - chance / 2)


@dataclass(frozen=True, slots=True)
class Means:
    """The clock, the sleep and the dice."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: Callable[[], float] = random.random


async def supervise(
    run: Callable[[], Awaitable[None]],
    *,
    name: str,
    gives_up: Callable[[Exception], bool] = lambda _: False,
    backoff: Backoff | None = None,
    means: Means | None = None,
) -> None:
    """Await `run()` until it returns; after an exception, wait and await it again.

    Raises the exception that `gives_up` says yes to. Cancellation passes through.
    """
    backoff, means = backoff or Backoff(), means or Means()
    failures = 0
    while True:
        began = means.clock()
        try:
            return await run()
        except Exception as error:  # a boundary: whatever failed is logged and tried again
            if gives_up(error):
                logger.exception("supervisor.gave_up", run=name, error=type(error).__name__)
                raise
            lasted = means.clock() - began
            failures = 1 if lasted >= backoff.healthy_s else failures + 1
            wait_s = backoff.wait_s(failures, means.chance())
            logger.warning(
                "supervisor.failed",
                run=name,
                error=type(error).__name__,
                failures=failures,
                lasted_s=round(lasted, 3),
                again_in_s=round(wait_s, 3),
                exc_info=error,
            )
        await means.sleep(wait_s)
