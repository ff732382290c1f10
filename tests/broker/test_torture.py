"""klatch passes half a minute or more of torture by each saved run, on a real Kafka: the lane that CI runs.

Longer ones are `klatch torture`. A run that failed is made smaller by `--shrink`, and kept in `regressions`. That the
judge would find what is broken is shown beside it, in `tests/workers/test_torture_judge.py`.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import get_args

import pytest

from klatch_workers import leash
from klatch_workers.torture import saved
from klatch_workers.torture.report import BROKEN
from klatch_workers.torture.schedule import Kind

RUNS = sorted((Path(__file__).parent / "regressions").glob("*.json"))
LONGEST_MIN = 1.5
"""Of load: this lane is a part of every test run."""


@pytest.mark.broker
@pytest.mark.timeout(400)
@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
async def test_klatch_keeps_its_promises_through(run: Path) -> None:
    argv = [sys.executable, "-m", "klatch_workers", "torture", "--json", "--replay", str(run)]
    process = await leash.spawn(argv, stdout=PIPE, stderr=PIPE)
    out, told = await asyncio.wait_for(process.communicate(), 390)
    facts = json.loads(out.splitlines()[-1])
    assert (process.returncode, {kind: facts[kind] for kind in BROKEN}) == (0, dict.fromkeys(BROKEN, 0)), told.decode()
    assert facts["accepted"] == facts["ended_once"] > 100
    assert facts["checked"]["superseded"] > 0, "no stream was hit: the run proves nothing"


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_a_saved_run_is_short_and_strikes_generation(run: Path) -> None:
    orders = saved.from_json(run.read_text())
    assert orders.minutes <= LONGEST_MIN
    assert any("generation" in fault.target for fault in orders.faults)


def test_the_saved_runs_have_every_sort_of_fault() -> None:
    struck = {fault.kind for run in RUNS for fault in saved.from_json(run.read_text()).faults}
    # On one node `cluster` is `broker`; `twin` is no fault that is drawn, and an `outlive` is a `zombie` and more.
    assert struck >= set(get_args(Kind)) - {"cluster", "twin", "zombie"}
