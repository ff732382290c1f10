"""The judge of `klatch torture` finds every planted lie, and nothing else.

The lies are planted into the evidence of an honest run of two turns, one at a time.
"""

import json
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
from klatch_workers.torture.evidence import Asked, Entry, Evidence, ModelCall, Observation, Struck
from klatch_workers.torture.judge import judge
from klatch_workers.torture.load import Trouble, Turn
from klatch_workers.torture.report import BROKEN, Report

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


def http(text: str, outcome: str | None = "completed", **fields: Any) -> Evidence:
    """An honest run, and one more reader of the first turn."""
    return with_observation(Observation("http", ONE, text, outcome, **fields))


def kept(text: str) -> list[Entry]:
    """The first turn with this text, and the second."""
    return entries("chat.turns", turn(ONE, text), turn(TWO, said("c2", 0, 1, 2)))


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
    turns = kept(said("c1", 0, 1))
    seen = [Observation("live", ONE, said("c1", 0, 1), "cancelled")]
    calls = [ModelCall("c1", ONE, 0.0, 320.0)]
    return troubled(replace(evidence, requests=bills, turns=turns, observations=seen, calls=calls), cancel="record")


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
    "a turn was not kept": (lambda: honest(turns=entries("chat.turns", turn(TWO, said("c2", 0, 1, 2)))), {"lost": 1}),
    "a reader hears of no end": (lambda: http(said("c1", 0, 1), None), {"lost": 1}),
    "a reader is told of two ends": (
        lambda: http(said("c1", 0, 1, 2), outcomes=("failed", "completed")),
        {"ended_twice": 1},
    ),
    "a reader is told of another end than the log's": (lambda: http(said("c1", 0, 1, 2), "failed"), {"ended_twice": 1}),
    "two readers are told different texts": (lambda: http(said("c9", 0, 1, 2), "completed"), {"ended_twice": 1}),
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


def test_it_tells_how_soon_a_model_call_ends_after_a_cancel() -> None:
    cancels = judge(cancelled_late_billed(2)).cancels
    assert cancels == {"under_way": 1, "undisturbed": 1, "p50_ms": 20.0, "p99_ms": 20.0, "max_ms": 20.0}


def test_a_worker_that_is_stopped_need_not_hear_of_a_cancel() -> None:
    zombie = Struck("stop generation", 200.0, 12_000.0, 200.0)
    late = replace(cancelled_late_billed(2), calls=[ModelCall("c1", ONE, 0.0, 12_100.0)], struck=[zombie])
    report = judge(late)
    assert list(report.violations) == []
    assert report.cancels == {"under_way": 1, "undisturbed": 0}


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
