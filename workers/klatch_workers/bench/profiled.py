"""`python -m klatch_workers.bench.profiled FILE ARGUMENTS…`: klatch's command under a sampling profiler.

SIGUSR2 starts the sampling and, sent again, ends it: then FILE holds a JSON object of how often each stack was seen
on the main thread, by CPU time (`ITIMER_PROF`, 1 ms). Where nobody asks, it costs nothing. Frames inside C functions
count for the Python function that called them.
"""

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

from klatch_workers.cli import main as klatch

_PERIOD_S = 0.001


class Sampler:
    """Counts stacks."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stacks: Counter[tuple[CodeType, ...]] = Counter()
        self._running = False

    def toggle(self, _: int, __: FrameType | None) -> None:
        """SIGUSR2."""
        self._running = not self._running
        if self._running:
            self._stacks.clear()
            signal.setitimer(signal.ITIMER_PROF, _PERIOD_S, _PERIOD_S)
        else:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._write()

    def sample(self, _: int, frame: FrameType | None) -> None:
        """SIGPROF."""
        stack = list[CodeType]()
        while frame:
            stack.append(frame.f_code)
            frame = frame.f_back
        self._stacks[tuple(stack)] += 1

    def _write(self) -> None:
        named = Counter[str]()
        for stack, times in self._stacks.items():
            named[";".join(_name(code) for code in stack)] += times
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(named))
        fresh.replace(self._file)


def _name(code: CodeType) -> str:
    # Two parts tell modules apart; what was frozen into the interpreter has no path.
    return f"{Path(*Path(code.co_filename).parts[-2:])}:{code.co_qualname}"


def main() -> None:
    """Run klatch with the rest of the arguments."""
    sampler = Sampler(Path(sys.argv[1]))
    signal.signal(signal.SIGUSR2, sampler.toggle)
    signal.signal(signal.SIGPROF, sampler.sample)
    sys.argv = ["klatch", *sys.argv[2:]]
    klatch()


if __name__ == "__main__":
    main()
