"""The evidence of an honest run of two turns, for the judge of `klatch torture`, and ways to change it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec

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
    StreamError,
    TurnFinished,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_workers.torture.evidence import Asked, Entry, Evidence, ModelCall, Observation
from klatch_workers.torture.load import Trouble, Turn
from klatch_workers.torture.report import BROKEN, Report
from klatch_workers.torture.tenants import PERSONS

TENANT, TALK = Tenant("acme"), Conversation("talk")
ONE, TWO = RequestId("talk.0"), RequestId("talk.1")
TOKENS = 3
USAGE = Usage(prompt_tokens=5, completion_tokens=TOKENS)


def said(call: str, *numbers: int) -> str:
    return "".join(f"<<{call}:{number}>>" for number in numbers)


def delta(request: str, seq: int, text: str, attempt: int = 1, writer: str = "w") -> Delta:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return Delta(request, attempt, writer, seq, msgspec.Raw(codec.dumps(chunk)))


def opening(
    request: RequestId, attempt: int = 1, writer: str = "w", mode: Literal["restart", "continue"] = "restart"
) -> StreamAttempt:
    return StreamAttempt(
        request=request, tenant=TENANT, conversation=TALK, attempt=attempt, writer=Writer(writer), mode=mode
    )


def end(request: RequestId, status: Status = "completed", seq: int = TOKENS, **fields: Any) -> StreamEnd:
    fields = {"attempt": 1, "writer": Writer("w"), "usage": USAGE, **fields}
    return StreamEnd(request=request, tenant=TENANT, conversation=TALK, status=status, seq=seq, **fields)


def cancel(request: RequestId, *, undo: bool = False) -> StreamCancel:
    return StreamCancel(request=request, tenant=TENANT, conversation=TALK, by="me", undo=undo)


def asked(request: RequestId, **fields: Any) -> ChatRequested:
    return ChatRequested(request=request, tenant=TENANT, conversation=TALK, body={"messages": []}, **fields)


def settled(
    request: RequestId, status: Status = "completed", usage: Usage = USAGE, micros: int = 0, deployment: str = ""
) -> UsageSettled:
    return UsageSettled(
        request=request, tenant=TENANT, status=status, usage=usage, cost_micros=micros, deployment=deployment
    )


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


def continued(second: str) -> Evidence:
    """The first turn's second attempt continues behind its first token, and says `second`."""
    first = said("c1", 0)
    tokens = re.findall("<<.*?>>", second)
    stream: list[Event | Delta] = [
        opening(ONE),
        delta(ONE, 0, first),
        opening(ONE, 2, "v", "continue"),
        *(delta(ONE, seq, token, 2, "v") for seq, token in enumerate(tokens)),
        end(ONE, seq=len(tokens), attempt=2, writer=Writer("v")),
    ]
    return replace(streaming(*stream), observations=[], turns=kept(first + second))


def priced(micros: int, deployment: str = "priced") -> Evidence:
    """The first turn's model has a price, and it was billed so much."""
    evidence = requests(settled(ONE, micros=micros, deployment=deployment), settled(TWO))
    known = evidence.asked[ONE]
    by_ann = replace(known, turn=replace(known.turn, person=PERSONS[0]))
    return replace(evidence, asked={**evidence.asked, ONE: by_ann})


def refused_by_all() -> Evidence:
    """The second turn's model has a price, and no deployment answered it: its prompt is counted, at no price."""
    prompt = Usage(prompt_tokens=5, estimated=True)
    evidence = troubled(
        honest(
            stream=entries("chat.stream", *stream_of(ONE, "c1"), opening(TWO), end(TWO, "failed", 0, usage=prompt)),
            requests=entries("chat.requests", asked(ONE), asked(TWO), settled(ONE), settled(TWO, "failed", prompt)),
            turns=entries("chat.turns", turn(ONE, said("c1", 0, 1, 2))),
            observations=[],
            calls=[],
        ),
        TWO,
        upstream={"status": 500},
    )
    known = evidence.asked[TWO]
    return replace(evidence, asked={**evidence.asked, TWO: replace(known, turn=replace(known.turn, person=PERSONS[0]))})


def prompted(tokens: int) -> Evidence:
    """The model server counted so many tokens in the first turn's prompt, and others in that of a lost call."""
    calls = [ModelCall("c0", ONE, 0.0, 0.0, 99), ModelCall("c1", ONE, 0.0, 0.0, tokens), ModelCall("c2", TWO, 500.0)]
    return honest(calls=calls)


def rolled_back(*, remembered: bool) -> Evidence:
    """The first turn, which a later one may interrupt, was rolled back after two tokens."""
    evidence = cancelled_late_billed(2)
    stream = [*stream_of(ONE, "c1")[:3], cancel(ONE, undo=True), *[one.said for one in evidence.stream[4:]]]
    known = evidence.asked[ONE]
    interrupted = replace(known, turn=replace(known.turn, trouble=Trouble(), interrupted=True))
    return replace(
        evidence,
        asked={**evidence.asked, ONE: interrupted},
        stream=entries("chat.stream", *stream),
        turns=evidence.turns if remembered else evidence.turns[1:],
    )


def rejected(**asked_as: Any) -> Evidence:
    """The second turn was rejected, and was asked in this way."""
    nothing = Usage()
    evidence = honest(
        stream=entries(
            "chat.stream",
            *stream_of(ONE, "c1"),
            end(TWO, "rejected", 0, attempt=0, writer=Writer("generation"), usage=nothing),
        ),
        requests=entries("chat.requests", asked(ONE), asked(TWO), settled(ONE), settled(TWO, "rejected", nothing)),
        turns=entries("chat.turns", turn(ONE, said("c1", 0, 1, 2))),
        observations=[],
        calls=[],
    )
    known = evidence.asked[TWO]
    return replace(evidence, asked={**evidence.asked, TWO: replace(known, turn=replace(known.turn, **asked_as))})


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


def raced(told: str) -> Evidence:
    """A cancel came just before an end that meant to fail; a late reader over HTTP was told of this outcome."""
    evidence = cancelled_late_billed(2)
    first, rest = evidence.stream[:4], evidence.stream[5:]
    usage = Usage(prompt_tokens=5, completion_tokens=2, estimated=True)
    error = StreamError(code="model_error", message="it failed")
    meant = end(ONE, "failed", 2, usage=usage, error=error)
    late = Observation("late http", ONE, said("c1", 0, 1), told)
    return replace(
        evidence,
        stream=entries("chat.stream", *[one.said for one in first], meant, *[one.said for one in rest]),
        observations=[*evidence.observations, late],
    )
