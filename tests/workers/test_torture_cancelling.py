"""How soon a model call ends after a cancel: what is told of it, and what counts for it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.workers.honest_run import ONE, cancelled_late_billed

from klatch_workers.torture.evidence import ModelCall, Stall, Struck
from klatch_workers.torture.judge import judge


def cancelled(*ended_ms: float, struck: Sequence[Struck] = (), stalls: Sequence[Stall] = ()) -> Mapping[str, Any]:
    """What is told of a request that was cancelled at 300 ms, whose model calls ended then."""
    calls = [ModelCall(f"c{number}", ONE, 0.0, at_ms) for number, at_ms in enumerate(ended_ms, 1)]
    return judge(replace(cancelled_late_billed(2), calls=calls, struck=struck, stalls=stalls)).cancels


def test_it_tells_how_soon_a_model_call_ends_after_a_cancel() -> None:
    cancels = judge(cancelled_late_billed(2)).cancels
    slowest: list[dict[str, Any]] = [{"request": ONE, "call": "c1", "ms": 20.0, "stalled_ms": 0.0, "near": []}]
    assert cancels == {
        "under_way": 1,
        "undisturbed": 1,
        "p50_ms": 20.0,
        "p99_ms": 20.0,
        "over_100_ms": 0,
        "max_ms": 20.0,
        "slowest": slowest,
    }


def test_it_counts_the_ends_that_came_more_than_a_tenth_of_a_second_after_a_cancel() -> None:
    assert cancelled(*(301.0 + 33 * number for number in range(6)))["over_100_ms"] == 2
    late, zombie = 700.0, Struck("stop generation", 200.0, 12_000.0, 200.0)
    assert cancelled(late)["over_100_ms"] == 1
    assert cancelled(late, stalls=[Stall(350.0, 660.0)])["over_100_ms"] == 0
    assert "over_100_ms" not in cancelled(late, struck=[zombie])


def test_it_names_the_slowest_ends_after_a_cancel_and_only_so_many() -> None:
    slowest = cancelled(*(301.0 + number for number in range(12)))["slowest"]
    assert [(one["call"], one["ms"]) for one in slowest] == [(f"c{n}", float(n)) for n in range(12, 2, -1)]
    json.dumps(slowest)


def test_it_tells_which_faults_were_near_a_slow_end_after_a_cancel() -> None:
    struck = [
        Struck("kill generation", 100.0, 110.0),
        Struck("scale generation", 320.0, 900.0),
        Struck("roll generation", 450.0, 900.0),
    ]
    near = cancelled(400.0, struck=struck)["slowest"][0]["near"]
    assert near == [{"struck": "kill generation", "s_before": 0.2}, {"struck": "scale generation", "s_before": -0.0}]


def test_an_end_after_a_cancel_is_not_late_by_what_the_kit_slept() -> None:
    # The first is over before the cancel, the last begins after the end.
    cancels = cancelled(500.0, stalls=[Stall(100.0, 290.0), Stall(330.0, 480.0), Stall(510.0, 600.0)])
    assert (cancels["max_ms"], cancels["slowest"][0]["stalled_ms"]) == (50.0, 150.0)


def test_a_worker_that_is_stopped_need_not_hear_of_a_cancel() -> None:
    zombie = Struck("stop generation", 200.0, 12_000.0, 200.0)
    late = replace(cancelled_late_billed(2), calls=[ModelCall("c1", ONE, 0.0, 12_100.0)], struck=[zombie])
    report = judge(late)
    assert list(report.violations) == []
    assert report.cancels == {"under_way": 1, "undisturbed": 0}
