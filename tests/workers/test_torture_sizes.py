"""The sizes of workers under torture: read of real processes, and told by quarters of the run."""

import asyncio
import os
from pathlib import Path

import pytest

from klatch_workers.torture.sizes import Size, by_quarters, watch


def test_a_quarter_tells_of_its_largest_worker() -> None:
    sizes = [
        Size("admission", 0.0, 80.0),
        Size("admission", 10.0, 90.4),
        Size("admission", 30.0, 85.0),
        Size("generation", 39.0, 120.0),
        Size("admission", 99.0, 110.0),
        Size("admission", 100.0, 70.0),
    ]
    assert by_quarters(sizes) == {"admission": [90, 85, 0, 110], "generation": [0, 120, 0, 0]}


def test_a_run_of_one_look_is_all_in_its_first_quarter() -> None:
    assert by_quarters([Size("http", 0.0, 55.0)]) == {"http": [55, 0, 0, 0]}
    assert by_quarters([]) == {}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
async def test_the_largest_worker_of_a_stage_is_told() -> None:
    sizes, asked = list[Size](), asyncio.Event()

    def pids() -> list[tuple[str, int]]:
        asked.set()
        return [("generation", os.getpid()), ("generation", 1), ("gone", 2**22)]

    watching = asyncio.create_task(watch(pids, sizes))
    await asked.wait()
    watching.cancel()
    await asyncio.wait([watching])
    [size] = sizes
    assert size.stage == "generation"
    assert size.resident_mb > 10
