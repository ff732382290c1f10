"""A baseline can be tortured: its worker is killed under load, and everything that it said is read back and counted.

What its counts come to is no promise of klatch, and on a busy machine not always the same: this shows that there are
some. The run on faust-streaming takes longer and is made by hand: `klatch torture --system faust --minutes 0.3`.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from dataclasses import asdict
from pathlib import Path

import pytest

from klatch_workers import leash
from klatch_workers.torture.report import BROKEN
from klatch_workers.torture.schedule import Fault


@pytest.mark.broker
@pytest.mark.timeout(280)
async def test_faststream_is_killed_under_the_plain_load_and_counted(tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.json"
    faults = [Fault(3.0, "kill", "generation"), Fault(4.0, "scale", "admission", count=2)]
    schedule.write_text(json.dumps([asdict(fault) for fault in faults]))
    argv = [sys.executable, "-m", "klatch_workers", "torture", "--system", "faststream", "--json"]
    options = ["--minutes", "0.15", "--seed", "3", "--requests-per-second", "2", "--schedule", str(schedule)]
    process = await leash.spawn([*argv, *options], stdout=PIPE, stderr=PIPE)
    out, told = await asyncio.wait_for(process.communicate(), 270)
    facts = json.loads(out.splitlines()[-1])
    careful = facts["readings"]["careful"]
    assert facts["system"] == "faststream"
    assert (facts["checked"]["faults"], facts["accepted"]) == (1, careful["accepted"]), told.decode()
    assert facts["accepted"] == facts["ended_once"] + facts["lost"] > 5
    assert facts["checked"]["model_calls"] >= facts["ended_once"] > 5
    assert process.returncode == int(any(facts[kind] for kind in BROKEN))
