"""A failing schedule is made smaller as long as it fails; a run survives its file; every planted bug has its place."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from klatch_workers.torture import saved
from klatch_workers.torture.campaign import Verdict
from klatch_workers.torture.load import Shape
from klatch_workers.torture.mutants import PACKAGES, Mutant, MutantLost, changed, fault_of, mutants, plant, source_of
from klatch_workers.torture.run import Orders
from klatch_workers.torture.schedule import Fault, schedule
from klatch_workers.torture.shrink import shrink
from klatch_workers.torture.system import Place

# --- shrinking ---------------------------------------------------------------------------------------------------


class Predicate:
    """Fails if all of `needed` are there; counts how often it was asked."""

    def __init__(self, *needed: int) -> None:
        self.needed, self.asked = set(needed), 0

    async def __call__(self, items: Sequence[int]) -> bool:
        self.asked += 1
        assert list(items) == sorted(items), "faults must stay in their order"
        return self.needed <= set(items)


@pytest.mark.parametrize("needed", [(0,), (31,), (3, 4), (0, 31), (5, 17, 30), (1, 9, 16, 25), tuple(range(32))])
async def test_what_is_left_is_what_the_failure_needs(needed: tuple[int, ...]) -> None:
    fails = Predicate(*needed)
    smallest, runs = await shrink(range(32), fails, most=1_000)
    assert (smallest, runs) == (list(needed), fails.asked)


async def test_a_single_fault_among_sixty_is_found_in_a_dozen_runs() -> None:
    smallest, runs = await shrink(range(60), Predicate(41), most=1_000)
    assert smallest == [41]
    assert runs <= 12


@pytest.mark.parametrize("most", range(1, 12))
async def test_it_stops_after_so_many_runs_with_the_smallest_that_failed(most: int) -> None:
    fails = Predicate(3, 20)
    smallest, runs = await shrink(range(32), fails, most)
    assert runs == fails.asked == most
    assert {3, 20} <= set(smallest)


async def test_a_schedule_of_one_fault_is_not_run_again() -> None:
    assert await shrink([7], Predicate(7), most=5) == ([7], 0)


# --- runs as files -----------------------------------------------------------------------------------------------


def test_a_run_survives_its_file() -> None:
    orders = Orders(9, 10, schedule(9, 10, nodes=3), 3, 5.5, static=True)
    assert saved.from_json(saved.to_json(orders, "a test")) == orders
    assert saved.faults_in(saved.to_json(orders)) == list(orders.faults)
    shaped = replace(orders, partitions=1, shape=Shape(slow=1.0, every_s=20.0))
    assert saved.from_json(saved.to_json(shaped)) == shaped
    older = json.loads(saved.to_json(orders))
    del older["partitions"], older["shape"]
    assert saved.from_json(json.dumps(older)) == orders


@pytest.mark.parametrize(
    ("faults", "complaint"),
    [
        ('[{"when": 1}]', "not a fault"),
        ('[{"at_s": 1, "kind": "burn"}]', "no kind"),
        ('[{"at_s": 1, "kind": "boundary", "target": "end/nobody"}]', "no boundary"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(faults: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        saved.faults_in(faults)
    with pytest.raises(ValueError, match="not a saved run"):
        saved.from_json('{"seed": 1}')


def test_fewer_faults_need_less_time_and_never_more() -> None:
    orders = Orders(1, 10, [Fault(5, "kill", "http"), Fault(300, "stop", "generation", lasts_s=12.5)])
    assert saved.with_faults(orders, orders.faults[:1]).minutes == 0.5
    assert saved.with_faults(orders, orders.faults).minutes == pytest.approx(5.63, abs=0.01)
    assert saved.with_faults(Orders(1, 0.4, []), orders.faults[:1]).minutes == 0.4


# --- planted bugs ------------------------------------------------------------------------------------------------


CONTROL, *PLANTED = mutants()


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_a_planted_bug_changes_its_module_into_another_that_compiles(mutant: Mutant) -> None:
    source = source_of(mutant).read_text()
    bug = changed(mutant, source)
    assert bug != source
    compile(bug, mutant.module, "exec")


def test_the_control_is_klatch_as_it_is_and_must_stay_green(tmp_path: Path) -> None:
    assert [one.name for one in (CONTROL, *PLANTED) if one.control] == ["control"]
    packages, module = plant(CONTROL, tmp_path), PLANTED[0].module
    assert (packages / module).read_text() == source_of(PLANTED[0]).read_text()
    assert Verdict(CONTROL, {}, 1.0).as_meant
    assert not Verdict(CONTROL, {"lost": 1}, 1.0).as_meant
    assert not Verdict(PLANTED[0], {}, 1.0).as_meant
    assert Verdict(PLANTED[0], {"lost": 1}, 1.0).as_meant


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_the_control_of_a_planted_bug_is_the_same_run(mutant: Mutant, tmp_path: Path) -> None:
    assert mutant.unplanted().control
    assert mutant.unplanted().orders(tmp_path) == mutant.orders(tmp_path)


def test_a_planted_bug_whose_text_is_gone_is_an_error() -> None:
    mutant = PLANTED[0]
    with pytest.raises(MutantLost, match=f"{mutant.name}.*0 times"):
        changed(mutant, "something else")


def test_workers_import_the_planted_bug_and_this_process_does_not(tmp_path: Path) -> None:
    mutant = PLANTED[0]
    orders = mutant.orders(plant(mutant, tmp_path))
    place = json.dumps([str(tmp_path / package) for package in PACKAGES])
    look = f"import json, {', '.join(PACKAGES)}; print(json.dumps([p.__path__[0] for p in ({', '.join(PACKAGES)})]))"
    settings = orders.system.worker("generation", _place(tmp_path)).settings
    said = subprocess.run([sys.executable, "-c", look], env={**os.environ, **settings}, capture_output=True, check=True)
    assert json.loads(said.stdout) == json.loads(place)
    assert source_of(mutant).is_relative_to(Path(__file__).parents[2])


def _place(folder: Path) -> Place:
    return Place(
        "generation-0", "localhost:1", "http://localhost:2/v1", "http://localhost:3", folder, 8, 1.0, 60.0, static=False
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("6 kill generation", Fault(6, "kill", "generation")),
        ("6.5 boundary first-delta/http", Fault(6.5, "boundary", "first-delta/http")),
        ("12 stop admission for 12.5 s", Fault(12, "stop", "admission", lasts_s=12.5)),
        ("3 cluster for 1 s", Fault(3, "cluster", lasts_s=1)),
    ],
)
def test_faults_of_planted_bugs_are_written_as_they_are_said(text: str, fault: Fault) -> None:
    assert fault_of(text) == fault


def test_what_is_no_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="no fault"):
        fault_of("6 burn generation")
