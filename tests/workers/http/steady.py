"""An event loop for tests of a door with little patience: what its process was kept from doing takes none of it.

A door whose patience is a few tenths of a second cannot tell a log that is silent from a machine that has given its
process no time. Here only the first tenth of a second of any such pause has passed, for all that the loop times.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")

_STEP_S = 0.1
"""uvicorn looks around as often: no loop with a server is idle for longer."""


class Steady(asyncio.SelectorEventLoop):
    """A loop whose time goes on in small steps."""

    _real = _now = 0.0

    def time(self) -> float:
        """See asyncio."""
        real = super().time()
        self._now += min(real - self._real, _STEP_S)
        self._real = real
        return self._now


def steady(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in such a loop. What its fixtures hold must be of no other."""

    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=Steady) as runner:
            runner.run(test(*arguments, **named))

    return run
