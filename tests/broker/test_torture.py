"""The torture kit: its schedule is a function of the seed, its judge finds every planted lie, and klatch passes it.

The lies are planted into the evidence of an honest run of two turns, one at a time. The bounded run at the end is
the lane that CI runs on a real Kafka; longer ones are `klatch torture`.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from klatch_schemas import codec
from klatch_schemas.codec import Delta
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    Refusal,
    Reservation,
    Status,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
    StreamRetract,
    TurnFinished,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_workers import leash
from klatch_workers.torture.evidence import Asked, Entry, Evidence, ModelCall, Observation, Struck
from klatch_workers.torture.judge import judge
from klatch_workers.torture.load import Trouble, Turn, plan
from klatch_workers.torture.recovery import Recovery, Speaking, recoveries
from klatch_workers.torture.report import BROKEN, Report
from klatch_workers.torture.schedule import Fault, from_json, schedule, to_json

# --- the schedule and the load -----------------------------------------------------------------------------------


def test_a_seed_makes_the_same_faults_and_the_same_load_every_time() -> None:
    assert schedule(7, 10) == schedule(7, 10)
    assert schedule(7, 10) != schedule(8, 10)
    assert plan(7, 1, 5) == plan(7, 1, 5)
    assert plan(7, 1, 5) != plan(8, 1, 5)


def test_a_schedule_survives_its_file() -> None:
    faults = schedule(7, 10)
    assert from_json(to_json(faults)) == faults
    with pytest.raises(ValueError, match="not a schedule"):
        from_json('[{"when": 1}]')


@pytest.mark.parametrize("seed", range(20))
def test_faults_come_in_order_and_are_over_before_the_load_is(seed: int) -> None:
    faults = schedule(seed, 2)
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    assert faults[0].at_s > 0
    assert all(fault.at_s + fault.lasts_s < 120 for fault in faults)


def test_ten_minutes_hold_every_kind_of_fault_on_every_stage() -> None:
    struck = {(fault.kind, fault.target) for fault in schedule(1, 10)}
    assert {("kill", stage) for stage in ("admission", "screening", "generation", "http")} <= struck
    assert {("stop", stage) for stage in ("admission", "screening", "generation")} <= struck
    assert {("scale", "generation"), ("roll", "generation"), ("broker", "")} <= struck


def test_a_zombie_sleeps_longer_than_its_group_waits() -> None:
    stops = [fault for fault in schedule(1, 20) if fault.kind == "stop"]
    assert stops
    assert all(fault.lasts_s > 10 for fault in stops)


def test_a_load_asks_as_often_as_it_was_told_and_has_every_trouble() -> None:
    turns = [turn for talk in plan(3, 10, 5) for turn in talk.turns]
    assert 2_400 < len(turns) < 3_600
    assert len({turn.request for turn in turns}) == len(turns)
    assert {turn.trouble.cancel for turn in turns} == {None, "record", "delete", "disconnect"}
    assert {turn.trouble.upstream.get("fault") for turn in turns} >= {"drop", "reset", "stall", "garbage"}
    assert {turn.trouble.upstream.get("status") for turn in turns} >= {429, 500}
    assert any(turn.twice for turn in turns)
    assert any(turn.leaves_after for turn in turns)
    assert sum(turn.plain for turn in turns) > len(turns) / 2


# --- an honest run -----------------------------------------------------------------------------------------------

TENANT, TALK = Tenant("acme"), Conversation("talk")
ONE, TWO = RequestId("talk.0"), RequestId("talk.1")
TOKENS = 3
USAGE = Usage(prompt_tokens=5, completion_tokens=TOKENS)


def said(call: str, *numbers: int) -> str:
    return "".join(f"<<{call}:{number}>>" for number in numbers)


def delta(request: str, seq: int, text: str, attempt: int = 1, writer: str = "w") -> Delta:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return Delta(request, attempt, writer, seq, msgspec.Raw(codec.dumps(chunk)))


def opening(request: RequestId, attempt: int = 1, writer: str = "w") -> StreamAttempt:
    return StreamAttempt(request=request, tenant=TENANT, conversation=TALK, attempt=attempt, writer=Writer(writer))


def end(request: RequestId, status: Status = "completed", seq: int = TOKENS, **fields: Any) -> StreamEnd:
    fields = {"attempt": 1, "writer": Writer("w"), "usage": USAGE, **fields}
    return StreamEnd(request=request, tenant=TENANT, conversation=TALK, status=status, seq=seq, **fields)


def cancel(request: RequestId) -> StreamCancel:
    return StreamCancel(request=request, tenant=TENANT, conversation=TALK, by="me")


def asked(request: RequestId, **fields: Any) -> ChatRequested:
    return ChatRequested(request=request, tenant=TENANT, conversation=TALK, body={"messages": []}, **fields)


def settled(request: RequestId, status: Status = "completed", usage: Usage = USAGE) -> UsageSettled:
    return UsageSettled(request=request, tenant=TENANT, status=status, usage=usage)


def turn(request: RequestId, text: str) -> TurnFinished:
    return TurnFinished(
        request=request,
        tenant=TENANT,
        conversation=TALK,
        status="completed",
        messages=(),
        reply=({"role": "assistant", "content": text},),
        usage=USAGE,
        attempt=1,
        started_ms=0,
        finished_ms=0,
    )


def admitted(request: RequestId) -> ChatAdmitted:
    return ChatAdmitted(request=asked(request), requested_ms=0, reservation=Reservation(tokens=9, expires_ms=9))


def entries(topic: str, *events: Event | Delta, ids: Sequence[str] = ()) -> list[Entry]:
    """Records a tenth of a second apart; each with an id of its own, unless `ids` says otherwise."""
    named = ids or [f"{topic}-{number}" for number in range(len(events))]
    return [Entry(topic, 0, number, 100 * number, named[number], event) for number, event in enumerate(events)]


def stream_of(request: RequestId, call: str) -> list[Event | Delta]:
    return [
        opening(request),
        *(delta(request, number, said(call, number)) for number in range(TOKENS)),
        end(request),
    ]


def honest(**fields: Any) -> Evidence:
    """Two turns of one conversation, each answered once."""
    texts = {ONE: said("c1", 0, 1, 2), TWO: said("c2", 0, 1, 2)}
    return replace(
        Evidence(
            asked={
                request: Asked(TENANT, TALK, Turn(number, request, TOKENS, 1.0))
                for number, request in enumerate((ONE, TWO))
            },
            acknowledged={ONE, TWO},
            requests=entries("chat.requests", asked(ONE), asked(TWO), settled(ONE), settled(TWO)),
            admitted=entries("chat.admitted", admitted(ONE), admitted(TWO)),
            stream=entries("chat.stream", *stream_of(ONE, "c1"), *stream_of(TWO, "c2")),
            turns=entries("chat.turns", turn(ONE, texts[ONE]), turn(TWO, texts[TWO])),
            observations=[Observation("live", request, text, "completed") for request, text in texts.items()],
            calls=[ModelCall("c1", ONE, 0.0), ModelCall("c2", TWO, 500.0)],
        ),
        **fields,
    )


def streaming(*events: Event | Delta) -> Evidence:
    """The first turn as told, the second as it should be."""
    return honest(stream=entries("chat.stream", *events, *stream_of(TWO, "c2")))


def troubled(evidence: Evidence, request: RequestId = ONE, **trouble: Any) -> Evidence:
    """The same, where something was done to a request."""
    known = evidence.asked[request]
    changed = replace(known, turn=replace(known.turn, trouble=Trouble(**trouble)))
    return replace(evidence, asked={**evidence.asked, request: changed})


def counts(report: Report) -> dict[str, int]:
    return {kind: report.count(kind) for kind in BROKEN if report.count(kind)}


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


def with_observation(*seen: Observation) -> Evidence:
    evidence = honest()
    return replace(evidence, observations=[*evidence.observations, *seen])


def refusal(request: RequestId) -> ChatRefused:
    said = Refusal(code="rate_limit_exceeded", message="no")
    return ChatRefused(request=request, tenant=TENANT, conversation=TALK, refusal=said)


def swapped() -> Evidence:
    """The second turn is answered before the first."""
    return honest(stream=entries("chat.stream", *stream_of(TWO, "c2"), *stream_of(ONE, "c1")))


def requests(*events: Event, ids: Sequence[str] = ()) -> Evidence:
    return honest(requests=entries("chat.requests", asked(ONE), asked(TWO), *events, ids=ids))


def cancelled_late_billed(tokens: int) -> Evidence:
    """Cancelled after two tokens, and billed so many."""
    usage = Usage(prompt_tokens=5, completion_tokens=tokens, estimated=True)
    stream = [*stream_of(ONE, "c1")[:3], cancel(ONE), end(ONE, "cancelled", 2, usage=usage)]
    evidence = streaming(*stream)
    bills = entries("chat.requests", asked(ONE), asked(TWO), settled(ONE, "cancelled", usage), settled(TWO))
    turns = entries("chat.turns", turn(ONE, said("c1", 0, 1)), turn(TWO, said("c2", 0, 1, 2)))
    seen = [Observation("live", ONE, said("c1", 0, 1), "cancelled")]
    return troubled(replace(evidence, requests=bills, turns=turns, observations=seen), cancel="record")


LIES: dict[str, tuple[Callable[[], Evidence], dict[str, int]]] = {
    "an acknowledged request is not in the log": (
        lambda: honest(requests=entries("chat.requests", asked(TWO), settled(TWO), settled(ONE))),
        {"lost": 1},
    ),
    "a request is never decided": (
        lambda: honest(admitted=entries("chat.admitted", admitted(TWO))),
        {"lost": 1, "missettled": 1},
    ),
    "a request has no end": (
        lambda: replace(streaming(*stream_of(ONE, "c1")[:-1]), observations=[]),
        {"lost": 1, "missettled": 1},
    ),
    "a turn was not kept": (
        lambda: honest(turns=entries("chat.turns", turn(TWO, said("c2", 0, 1, 2)))),
        {"lost": 1},
    ),
    "a reader hears of no end": (
        lambda: with_observation(Observation("http", ONE, said("c1", 0, 1), None)),
        {"lost": 1},
    ),
    "a reader is told of two ends": (
        lambda: with_observation(
            Observation("http", ONE, said("c1", 0, 1, 2), "completed", (), ("failed", "completed"))
        ),
        {"ended_twice": 1},
    ),
    "a reader is told of another end than the log's": (
        lambda: with_observation(Observation("http", ONE, said("c1", 0, 1, 2), "failed")),
        {"ended_twice": 1},
    ),
    "two readers are told different texts": (
        lambda: with_observation(Observation("http", ONE, said("c9", 0, 1, 2), "completed")),
        {"ended_twice": 1},
    ),
    "admission decided twice": (
        lambda: honest(admitted=entries("chat.admitted", admitted(ONE), admitted(TWO), refusal(ONE))),
        {"ended_twice": 1},
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
            turns=entries("chat.turns", turn(ONE, said("c1", 0) + said("c9", 1, 2)), turn(TWO, said("c2", 0, 1, 2))),
        ),
        {"spliced": 1},
    ),
    "a reply was completed too soon": (
        lambda: replace(
            streaming(*stream_of(ONE, "c1")[:3], end(ONE, seq=2)),
            observations=[],
            turns=entries("chat.turns", turn(ONE, said("c1", 0, 1)), turn(TWO, said("c2", 0, 1, 2))),
        ),
        {"spliced": 1, "missettled": 1},
    ),
    "the log lacks a delta": (
        lambda: replace(
            streaming(opening(ONE), delta(ONE, 0, said("c1", 0)), delta(ONE, 2, said("c1", 2)), end(ONE)),
            observations=[],
            turns=entries("chat.turns", turn(ONE, said("c1", 0)), turn(TWO, said("c2", 0, 1, 2))),
        ),
        {"spliced": 1, "missettled": 1},
    ),
    "a turn holds another text than its stream": (
        lambda: honest(turns=entries("chat.turns", turn(ONE, said("c7", 0)), turn(TWO, said("c2", 0, 1, 2)))),
        {"spliced": 1},
    ),
    "a reader was shown a splice, and told to forget it": (
        lambda: with_observation(
            Observation("http", ONE, said("c1", 0, 1, 2), "completed", voided=(said("c8", 0) + said("c9", 1),))
        ),
        {"spliced": 1},
    ),
    "a reader was shown a hole before it left": (
        lambda: with_observation(Observation("http", ONE, said("c1", 0, 2), None, left=True)),
        {"spliced": 1},
    ),
    "a reader was shown a token twice": (
        lambda: with_observation(Observation("http", ONE, said("c1", 0, 1, 1), None, left=True)),
        {"duplicated": 1},
    ),
    "a reader was shown tokens out of order": (
        lambda: with_observation(Observation("http", ONE, said("c1", 1, 0, 2), None, left=True)),
        {"reordered": 1},
    ),
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
    "a model is called for what was cancelled before": (
        lambda: replace(cancelled_late_billed(2), calls=[ModelCall("c1", ONE, 0.0), ModelCall("c5", ONE, 1_500.0)]),
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
    "a cancelled request was billed as nothing": (lambda: cancelled_late_billed(0), {"missettled": 1}),
    "a cancelled request was billed for what nobody wrote": (lambda: cancelled_late_billed(9), {"missettled": 1}),
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


# --- recovery ----------------------------------------------------------------------------------------------------


def test_recovery_is_from_the_fault_to_the_next_token_of_the_stream_that_waited_longest() -> None:
    struck = [Struck("kill generation", 1_000.0, 1_000.0), Struck("kill http", 60_000.0, 60_000.0)]
    streams = [
        Speaking("untouched", 0, 9_000, [900, 1_020, 1_040]),
        Speaking("hit", 0, 9_000, [990, 8_500]),
        Speaking("asked later", 3_000, 9_000, [8_600]),
        Speaking("over before", 0, 990, [10]),
    ]
    assert recoveries(struck, streams) == {"kill generation": Recovery(7.5, "hit"), "kill http": Recovery(0.0, "")}


# --- a bounded run -----------------------------------------------------------------------------------------------


@pytest.mark.broker
@pytest.mark.timeout(280)
async def test_klatch_keeps_its_promises_through_half_a_minute_of_torture() -> None:
    argv = [sys.executable, "-m", "klatch_workers", "torture", "--json", "--minutes", "0.6", "--seed", "11"]
    process = await leash.spawn([*argv, "--requests-per-second", "6"], stdout=PIPE, stderr=PIPE)
    out, told = await asyncio.wait_for(process.communicate(), 270)
    facts = json.loads(out.splitlines()[-1])
    assert (process.returncode, {kind: facts[kind] for kind in BROKEN}) == (0, dict.fromkeys(BROKEN, 0)), told.decode()
    assert facts["accepted"] == facts["ended_once"] > 100
    assert facts["checked"]["superseded"] > 0, "no stream was hit: the run proves nothing"


def test_the_bounded_run_kills_generation_and_makes_a_zombie() -> None:
    struck = {(fault.kind, fault.target) for fault in schedule(11, 0.6)}
    assert {("kill", "generation"), ("stop", "generation")} <= struck


def test_faults_name_what_they_are() -> None:
    assert Fault(1.0, "kill", "generation") in from_json(to_json([Fault(1.0, "kill", "generation")]))
