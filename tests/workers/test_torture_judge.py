"""The judge of `klatch torture` finds every planted lie, and nothing else.

The lies are planted into the evidence of an honest run of two turns, one at a time.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.workers.honest_run import (
    ONE,
    TALK,
    TENANT,
    TOKENS,
    TWO,
    admitted,
    asked,
    cancelled_late_billed,
    continued,
    counts,
    delta,
    end,
    entries,
    honest,
    http,
    kept,
    opening,
    priced,
    prompted,
    raced,
    refusal,
    refused_by_all,
    rejected,
    requests,
    rolled_back,
    said,
    settled,
    stream_of,
    streaming,
    swapped,
    troubled,
    turn,
    with_observation,
)

from klatch_schemas.codec import Delta
from klatch_schemas.events import Event, StreamEnd, StreamRetract, Usage
from klatch_schemas.ids import RequestId, Writer
from klatch_workers.torture.evidence import Evidence, ModelCall, Observation, Stall, Struck
from klatch_workers.torture.judge import judge
from klatch_workers.torture.report import BROKEN


def test_an_honest_run_passes() -> None:
    report = judge(honest())
    assert list(report.violations) == []
    assert (report.accepted, report.ended_once, report.passed) == (2, 2, True)


def test_a_run_in_which_nothing_was_accepted_does_not_pass() -> None:
    assert not judge(Evidence(asked={}, acknowledged=set())).passed


def test_what_faults_may_do_is_no_violation() -> None:
    repeated = entries(
        "chat.requests",
        *(asked(ONE), asked(ONE), asked(TWO), settled(ONE), settled(ONE), settled(TWO)),
        ids=("a", "a", "b", "s1", "s1", "s2"),
    )
    first_lost: list[Event | Delta] = [
        opening(ONE),
        delta(ONE, 0, said("c0", 0)),
        opening(ONE, 2, "v"),
        # A zombie that writes on, and ends what is not its own any more.
        delta(ONE, 1, said("c0", 1)),
        *(delta(ONE, number, said("c1", number), 2, "v") for number in range(TOKENS)),
        end(ONE, seq=2),
        end(ONE, attempt=2, writer=Writer("v")),
        end(ONE, attempt=2, writer=Writer("v")),
    ]
    calls = [ModelCall("c0", ONE, 0.0), ModelCall("c1", ONE, 250.0), ModelCall("c2", TWO, 800.0)]
    told = Observation("http", ONE, said("c1", 0, 1, 2), "completed", voided=(said("c0", 0),))
    evidence = replace(streaming(*first_lost), requests=repeated, calls=calls, observations=[told])
    evidence = replace(
        evidence,
        admitted=entries("chat.admitted", admitted(ONE), admitted(ONE), admitted(TWO), ids=("1", "1", "2")),
        turns=entries(
            "chat.turns",
            turn(ONE, told.text),
            turn(ONE, told.text),
            turn(TWO, said("c2", 0, 1, 2)),
            ids=("1", "1", "2"),
        ),
    )
    report = judge(evidence)
    assert list(report.violations) == []
    assert (report.checked["superseded"], report.checked["ignored_deltas"]) == (1, 1)


# --- planted lies ------------------------------------------------------------------------------------------------


LIES: dict[str, tuple[Callable[[], Evidence], dict[str, int]]] = {
    "an acknowledged request is not in the log": (
        lambda: honest(requests=entries("chat.requests", asked(TWO), settled(TWO), settled(ONE))),
        {"lost": 1, "missettled": 1},
    ),
    "a request is never decided": (
        lambda: honest(admitted=entries("chat.admitted", admitted(TWO))),
        {"lost": 1, "missettled": 1},
    ),
    "a request has no end": (
        lambda: replace(streaming(*stream_of(ONE, "c1")[:-1]), observations=[]),
        {"lost": 1, "missettled": 1},
    ),
    "a turn was not kept": (lambda: honest(turns=entries("chat.turns", turn(TWO, said("c2", 0, 1, 2)))), {"lost": 1}),
    "a reader hears of no end": (lambda: http(said("c1", 0, 1), None), {"lost": 1}),
    "a reader is told of two ends": (
        lambda: http(said("c1", 0, 1, 2), outcomes=("failed", "completed")),
        {"ended_twice": 1},
    ),
    "a reader is told of another end than the log's": (lambda: http(said("c1", 0, 1, 2), "failed"), {"ended_twice": 1}),
    "a late reader is told of the end that a cancel came before": (lambda: raced("failed"), {"ended_twice": 1}),
    "two readers are told different texts": (lambda: http(said("c9", 0, 1, 2), "completed"), {"ended_twice": 1}),
    "admission decided twice": (
        lambda: honest(admitted=entries("chat.admitted", admitted(ONE), admitted(TWO), refusal(ONE))),
        {"ended_twice": 1, "missettled": 1},
    ),
    "a turn was kept twice, as two": (
        lambda: honest(
            turns=entries(
                "chat.turns",
                turn(ONE, said("c1", 0, 1, 2)),
                turn(ONE, said("c1", 0, 1, 2)),
                turn(TWO, said("c2", 0, 1, 2)),
            )
        ),
        {"ended_twice": 1},
    ),
    "a healthy request failed": (
        lambda: replace(
            streaming(*stream_of(ONE, "c1")[:-1], end(ONE, "failed")),
            requests=entries("chat.requests", asked(ONE), asked(TWO), settled(ONE, "failed"), settled(TWO)),
            observations=[],
        ),
        {"failed": 1},
    ),
    "a reply is made of two model calls": (
        lambda: replace(
            streaming(
                opening(ONE),
                delta(ONE, 0, said("c1", 0)),
                delta(ONE, 1, said("c9", 1)),
                delta(ONE, 2, said("c9", 2)),
                end(ONE),
            ),
            observations=[],
            turns=kept(said("c1", 0) + said("c9", 1, 2)),
        ),
        {"spliced": 1},
    ),
    "a reply was completed too soon": (
        lambda: replace(
            streaming(*stream_of(ONE, "c1")[:3], end(ONE, seq=2)),
            observations=[],
            turns=kept(said("c1", 0, 1)),
        ),
        {"spliced": 1, "missettled": 1},
    ),
    "the log lacks a delta": (
        lambda: replace(
            streaming(opening(ONE), delta(ONE, 0, said("c1", 0)), delta(ONE, 2, said("c1", 2)), end(ONE)),
            observations=[],
            turns=kept(said("c1", 0)),
        ),
        {"spliced": 1, "missettled": 1},
    ),
    "a turn holds another text than its stream": (lambda: honest(turns=kept(said("c7", 0))), {"spliced": 1}),
    "a reader was shown a splice, and told to forget it": (
        lambda: http(said("c1", 0, 1, 2), voided=(said("c8", 0) + said("c9", 1),)),
        {"spliced": 1},
    ),
    "a reader was shown a hole before it left": (lambda: http(said("c1", 0, 2), None, left=True), {"spliced": 1}),
    "a reader was shown a token twice": (lambda: http(said("c1", 0, 1, 1), None, left=True), {"duplicated": 1}),
    "a reader was shown tokens out of order": (lambda: http(said("c1", 1, 0, 2), None, left=True), {"reordered": 1}),
    "a later turn was answered first": (swapped, {"reordered": 1}),
    "a later turn was kept first": (
        lambda: honest(turns=entries("chat.turns", turn(TWO, said("c2", 0, 1, 2)), turn(ONE, said("c1", 0, 1, 2)))),
        {"reordered": 1},
    ),
    "a later turn was published first": (
        lambda: honest(requests=entries("chat.requests", asked(TWO), asked(ONE), settled(ONE), settled(TWO))),
        {"reordered": 1},
    ),
    "a model is called for what has ended": (
        lambda: honest(calls=[ModelCall("c1", ONE, 0.0), ModelCall("c5", ONE, 2_000.0)]),
        {"redone": 1},
    ),
    "a model is called for what has ended, and the kit slept for less than that": (
        lambda: replace(
            honest(calls=[ModelCall("c1", ONE, 0.0), ModelCall("c5", ONE, 2_000.0)]), stalls=[Stall(1_700.0, 1_950.0)]
        ),
        {"redone": 1},
    ),
    "a model is called for what was cancelled before": (
        lambda: replace(
            cancelled_late_billed(2), calls=[ModelCall("c1", ONE, 0.0, 320.0), ModelCall("c5", ONE, 1_500.0, 1_600.0)]
        ),
        {"redone": 1},
    ),
    "a model goes on after a cancel": (
        lambda: replace(cancelled_late_billed(2), calls=[ModelCall("c1", ONE, 0.0, 3_400.0)]),
        {"redone": 1},
    ),
    "a model goes on for ever after a cancel": (
        lambda: replace(cancelled_late_billed(2), calls=[ModelCall("c1", ONE, 0.0)]),
        {"redone": 1},
    ),
    "a model is called after the deadline": (
        lambda: troubled(
            replace(
                honest(calls=[ModelCall("c1", ONE, 1_300.0)]),
                requests=entries("chat.requests", asked(ONE, deadline_ms=100), asked(TWO), settled(ONE), settled(TWO)),
            ),
            timeout_ms=100,
        ),
        {"redone": 1},
    ),
    "a request was not billed": (lambda: requests(settled(TWO)), {"missettled": 1}),
    "a request was billed twice": (lambda: requests(settled(ONE), settled(TWO), settled(ONE)), {"missettled": 1}),
    "a refused request was billed": (
        lambda: honest(admitted=entries("chat.admitted", refusal(ONE), admitted(TWO))),
        {"missettled": 1},
    ),
    "a request was billed as something else than it was": (
        lambda: requests(settled(ONE, "cancelled"), settled(TWO)),
        {"missettled": 1},
    ),
    "a repeated bill says something else": (
        lambda: requests(settled(ONE), settled(TWO), settled(ONE, usage=Usage()), ids=("a", "b", "s1", "s2", "s1")),
        {"missettled": 1},
    ),
    "a request was billed for more than its model said": (
        lambda: requests(settled(ONE, usage=Usage(prompt_tokens=5, completion_tokens=4)), settled(TWO)),
        {"missettled": 1},
    ),
    "a request was billed for less than its tokens cost": (lambda: priced(34), {"missettled": 1}),
    "a request was billed for more than its tokens cost": (lambda: priced(36), {"missettled": 1}),
    "a request was billed nothing, by a deployment with a price": (lambda: priced(0), {"missettled": 1}),
    "a request was answered and billed nothing, by nobody": (lambda: priced(0, deployment=""), {"missettled": 1}),
    "a request was billed for less, by nobody": (lambda: priced(34, deployment=""), {"missettled": 1}),
    "a request that costs nothing was billed": (
        lambda: requests(settled(ONE, micros=35), settled(TWO)),
        {"missettled": 1},
    ),
    "a repeated bill asks for other money": (
        lambda: requests(settled(ONE), settled(TWO), settled(ONE, micros=1), ids=("a", "b", "s1", "s2", "s1")),
        {"missettled": 1},
    ),
    "a request was billed for another prompt than its model read": (lambda: prompted(6), {"missettled": 1}),
    "a cancelled request was billed as nothing": (lambda: cancelled_late_billed(0), {"missettled": 1}),
    "a cancelled request was billed for what nobody wrote": (lambda: cancelled_late_billed(9), {"missettled": 1}),
    "a reply is continued by a token that stands already": (
        lambda: continued(said("c5", 0, 1, 2)),
        {"duplicated": 1, "spliced": 1, "missettled": 1},
    ),
    "a reply is continued behind a token that is missing": (
        lambda: continued(said("c5", 2)),
        {"spliced": 1, "missettled": 1},
    ),
    "a third call goes on in a reply that was continued once": (
        lambda: continued(said("c5", 1) + said("c6", 2)),
        {"spliced": 1},
    ),
    "a turn that was rolled back is remembered": (lambda: rolled_back(remembered=True), {"ended_twice": 1}),
    "a request is rejected that would have waited": (rejected, {"failed": 1}),
    "a door answered a bare 500": (
        lambda: http(said("c1", 0, 1, 2), unfit=("POST was answered with a bare 500",)),
        {"failed": 1},
    ),
    "a door answered a bare 500 to one that was never accepted": (
        lambda: with_observation(Observation("http", RequestId("talk.9"), "", None, left=True, unfit=("500",))),
        {"failed": 1},
    ),
    "a record was buried": (lambda: honest(dead=["dead.letters/0/0"]), {"dead": 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_judge_finds_that(lie: str) -> None:
    plant, expected = LIES[lie]
    report = judge(plant())
    assert counts(report) == expected
    assert not report.passed


def test_a_lie_is_planted_for_every_promise() -> None:
    assert {kind for _, expected in LIES.values() for kind in expected} == set(BROKEN)


def test_a_cancelled_request_that_is_billed_for_what_stands_is_no_violation() -> None:
    assert list(judge(cancelled_late_billed(2)).violations) == []


@pytest.mark.parametrize(
    "evidence",
    [continued(said("c5", 1, 2)), rolled_back(remembered=False), rejected(if_busy="reject"), raced("cancelled")],
)
def test_what_a_request_asked_for_is_no_violation(evidence: Evidence) -> None:
    assert list(judge(evidence).violations) == []


def test_a_reader_that_gave_up_before_the_end_was_not_deprived_of_it() -> None:
    ended_ms = next(one.timestamp_ms for one in honest().stream if isinstance(one.said, StreamEnd))
    early, late = (http("", None, until_ms=ended_ms + later) for later in (1_000, 6_000))
    assert counts(judge(early)) == {}
    assert judge(early).checked["readers that gave up before the end"] == 1
    assert counts(judge(late)) == {"lost": 1}
    assert judge(late).checked["readers that gave up before the end"] == 0


@pytest.mark.parametrize(
    ("what", "until_s", "lost"),
    [
        ("kill http", 19, 0),
        ("kill http", 21, 1),
        ("boundary end/http", 19, 0),
        ("leaderless", 19, 0),
        ("kill generation", 19, 1),
    ],
)
def test_nobody_is_lost_who_gives_up_while_the_door_that_could_tell_is_away(
    what: str, until_s: float, lost: int
) -> None:
    ended_ms = next(one.timestamp_ms for one in honest().stream if isinstance(one.said, StreamEnd))
    struck = [Struck(what, ended_ms, ended_ms)]
    gave_up = replace(http("", None, until_ms=ended_ms + until_s * 1000), struck=struck)
    assert counts(judge(gave_up)).get("lost", 0) == lost


@pytest.mark.parametrize(("heard_ms", "redone"), [(1_200.0, 0), (900.0, 1), (float("inf"), 1)])
def test_nobody_goes_on_for_an_end_that_brokers_had_not_taken_yet(heard_ms: float, redone: int) -> None:
    evidence = honest(calls=[ModelCall("c1", ONE, 0.0), ModelCall("c5", ONE, 2_000.0)])
    seen = [replace(one, until_ms=heard_ms) if one.reader == "live" else one for one in evidence.observations]
    assert counts(judge(replace(evidence, observations=seen))).get("redone", 0) == redone


def test_a_bill_is_its_tokens_times_their_price() -> None:
    assert counts(judge(priced(35))) == {}
    assert judge(priced(35)).checked["unpriced"] == 0
    assert counts(judge(prompted(5))) == {}


def test_a_prompt_that_no_deployment_answered_has_no_price_and_is_told() -> None:
    report = judge(refused_by_all())
    assert (counts(report), report.checked["unpriced"]) == ({}, 1)


def test_it_tells_how_often_a_reply_was_continued_or_undone_or_a_cancel_raced_an_end() -> None:
    assert judge(raced("cancelled")).checked["raced"] == 1
    assert judge(cancelled_late_billed(2)).checked["raced"] == 0
    assert judge(continued(said("c5", 1, 2))).checked["continued"] == 1
    assert judge(rolled_back(remembered=False)).checked["undone"] == 1


def test_a_call_that_the_kit_slept_through_is_not_late() -> None:
    calls = [ModelCall("c1", ONE, 0.0), ModelCall("c5", ONE, 2_000.0)]
    report = judge(replace(honest(calls=calls), stalls=[Stall(800.0, 1_400.0), Stall(1_500.0, 2_100.0)]))
    assert list(report.violations) == []
    assert report.checked["stalled_ms"] == 1_200


def test_what_the_doors_of_others_answer_is_not_judged() -> None:
    evidence = http(said("c1", 0, 1, 2), unfit=("POST was answered with a bare 500",))
    assert "failed" not in counts(judge(replace(evidence, bare=True)))


def test_it_counts_how_often_each_boundary_was_struck() -> None:
    struck = [Struck(what, 1.0, 2.0) for what in ("boundary turn/generation", "boundary turn/generation", "kill http")]
    facts = judge(honest(struck=struck)).facts()
    assert facts["boundaries"]["turn/generation"] == 2
    assert facts["boundaries"]["end/http"] == 0
    assert facts["struck"] == {"kill http": 1}


def test_readers_that_resume_where_text_was_retracted_are_checked_too() -> None:
    stream = [
        *stream_of(ONE, "c1")[:4],
        StreamRetract(request=ONE, tenant=TENANT, conversation=TALK, from_seq=2),
        end(ONE, "completed"),
    ]
    evidence = replace(streaming(*stream), observations=[])
    assert counts(judge(evidence))["spliced"] == 1


def test_a_violation_names_positions_and_no_text() -> None:
    report = judge(LIES["two readers are told different texts"][0]())
    assert report.violations[0].positions == ("chat.stream/0/4",)
    assert "<<" not in json.dumps(report.facts()) + report.violations[0].what
