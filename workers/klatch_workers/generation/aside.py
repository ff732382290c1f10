"""Work that looks at every chunk of a reply; of a long one in a thread, in which the streams of others go on."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

Made = TypeVar("Made")

LONG: Final = 1_000
"""Chunks; so many are put together in about ten milliseconds."""


async def aside(chunks: int, work: Callable[[], Made]) -> Made:
    """Do the work; what it looks at must not change meanwhile."""
    return await asyncio.to_thread(work) if chunks > LONG else work()
