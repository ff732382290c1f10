"""Where the CPU time of a chunk goes: stages under the sampling profiler while they carry many paced streams."""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from klatch_workers.bench.load import Paced, Seen, paced
from klatch_workers.bench.report import KLATCH
from klatch_workers.bench.rig import MODEL, Rig, Say, profile_file, rig

_MOST = 25
_LOOP = ("asyncio/events.py:Handle._run", "asyncio/runners.py:Runner.run")
"""What calls whatever an event loop runs: asyncio's own; or uvloop's, whose frames are not seen."""


async def profile(folder: Path, stages: Sequence[str], load: Paced, say: Say) -> str:
    """Run the stages under load; returns tables of functions, with CPU microseconds a chunk."""
    async with rig(folder, say, profile=stages) as running:
        target = running.targets[KLATCH]
        # The first load fills caches, and warms the broker's JIT.
        await paced(target, load, MODEL, running.pids, Seen())
        say("profiling")
        seen = Seen()
        _toggle(running, stages)
        await paced(target, load, MODEL, running.pids, seen)
        _toggle(running, stages)
        return "\n".join([await _told(folder, stage, seen) for stage in stages])


def _toggle(running: Rig, stages: Sequence[str]) -> None:
    for stage in stages:
        os.kill(running.klatch.children[stage].pid, signal.SIGUSR2)


async def _told(folder: Path, stage: str, seen: Seen) -> str:
    file = profile_file(folder, stage)
    async with asyncio.timeout(10):
        while not file.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.05)
    stacks: dict[str, int] = json.loads(file.read_text())
    return table(stage, stacks, seen.cpu.get(stage, 0.0) / max(1, seen.chunks) * 1e6)


def table(stage: str, stacks: dict[str, int], us_a_chunk: float) -> str:
    """CPU microseconds a chunk, told three ways: by what the event loop ran, by function, and by own time alone."""
    woken, within, own = Counter[str](), Counter[str](), Counter[str]()
    for stack, times in stacks.items():
        frames = stack.split(";")
        own[frames[0]] += times
        at = next((frames.index(frame) for frame in _LOOP if frame in frames), len(frames))
        # A coroutine's frames begin where the event loop stepped it.
        woken[frames[at - 1] if 0 < at < len(frames) else "the event loop itself"] += times
        for frame in set(frames[: at + 1]):
            within[frame] += times
    samples = max(1, sum(own.values()))
    scale = us_a_chunk / samples
    lines = [f"\n{stage}: {us_a_chunk:.0f} µs a chunk, {samples} samples"]
    for title, counted in (
        ("by what the event loop ran", woken),
        ("by function, with what it calls", within),
        ("by function, alone", own),
    ):
        lines += [f"  {title}", *(f"    {times * scale:6.1f}  {name}" for name, times in counted.most_common(_MOST))]
    return "\n".join(lines)
