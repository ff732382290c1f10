"""The event loop of a worker process: uvloop's, where it is installed.

Why: docs/decisions/0020-uvloop-and-a-beat-of-20-ms.md.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from klatch_streams.kafka.closed_transports import expect_closed_transports

try:
    import uvloop
except ImportError:  # there is none for Windows
    _new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    _new_event_loop = uvloop.new_event_loop

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run(main)` on that loop."""
    expect_closed_transports()
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        return runner.run(main)
