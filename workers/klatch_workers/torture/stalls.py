"""When the kit itself got no processor: whatever it dates then is dated late, such as the beginning of a model call."""

import asyncio
import time
from collections.abc import Sequence

from klatch_workers.torture.evidence import Stall

_EVERY_S = 0.01
"""A tenth of what the most exact of the promises allows, the end of a model call after its cancel."""


async def watch(stalls: list[Stall]) -> None:
    """Add to `stalls` whenever this process was run late by more than it rests; until cancelled.

    A stall counts from when the process was due: whatever came before that was dated in time.
    """
    while True:
        due = time.time() + _EVERY_S
        await asyncio.sleep(_EVERY_S)
        now = time.time()
        if now - due > _EVERY_S:
            stalls.append(Stall(due * 1000, now * 1000))


def stalled_ms(stalls: Sequence[Stall], since_ms: float, until_ms: float) -> float:
    """How much of the time from `since_ms` to `until_ms` was stalled."""
    return sum(max(0.0, min(one.until_ms, until_ms) - max(one.from_ms, since_ms)) for one in stalls)
