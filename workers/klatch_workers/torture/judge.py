"""The judge: from what was read back and what clients saw to the report. Pure, and it believes nobody.

Each check reads one promise of docs/reliability.md; a promise that nothing could break here would be no check, so a
test plants a lie for every one of them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import Final

from klatch_schemas.events import ChatRefused, TurnFinished, UsageSettled
from klatch_schemas.ids import Conversation, RequestId
from klatch_workers.torture.cancelling import closings, figures
from klatch_workers.torture.case import Case, cases_of
from klatch_workers.torture.disturbance import BROKERS, near, over_ms
from klatch_workers.torture.evidence import Entry, Evidence, Observation, Stall, Struck
from klatch_workers.torture.heeded import checked as heeded
from klatch_workers.torture.heeded import deadlines_of, wishes
from klatch_workers.torture.ledgers import checked as ledgers
from klatch_workers.torture.ledgers import forgotten
from klatch_workers.torture.limits import broken_limits
from klatch_workers.torture.money import missettled, unpriced
from klatch_workers.torture.recovery import Speaking, recoveries
from klatch_workers.torture.report import Report, Violation
from klatch_workers.torture.stalls import stalled_ms
from klatch_workers.torture.tokens import faults_of, tokens_of
from klatch_workers.torture.told import resumed

GRACE_MS: Final = 1_000.0
"""How long a process may take to hear of a cancel or an end before a call that it makes is one too many."""
_HEARD_MS: Final = 5_000.0
"""How much later than it is dated an end may be heard of."""
LATE_CLOSE_MS: Final = 3_000.0
"""How long a model call may go on after a cancel while nothing keeps its worker from hearing of it."""


def judge(evidence: Evidence) -> Report:
    """What the evidence comes to."""
    cases = cases_of(evidence)
    violations = [violation for case in cases.values() for violation in _of_one(case, evidence)]
    violations += _of_conversations(cases)
    violations += broken_limits(evidence)
    violations += forgotten(evidence)
    closed = closings(cases.values(), evidence)
    violations += [
        cases[one.request].broke("redone", f"model call {one.call} went on for {one.ms / 1000:.1f} s after the cancel")
        for one in closed
        if one.ms > LATE_CLOSE_MS and not one.disturbed
    ]
    violations += _unfit_answers(evidence)
    wished = list(wishes(list(cases.values()), evidence))
    violations += [broken for wish in wished for broken in wish.broken]
    violations += [
        Violation("dead", position, "a dead letter: the load has none", (position,)) for position in evidence.dead
    ]
    ended_twice = {violation.request for violation in violations if violation.kind == "ended_twice"}
    return Report(
        accepted=len(cases),
        ended_once=sum(case.told.ended is not None and case.request not in ended_twice for case in cases.values()),
        violations=violations,
        recoveries=recoveries(evidence.struck, _waiting(cases)),
        outcomes=Counter(str(case.told.outcome) for case in cases.values()),
        checked={**_checked(evidence, cases), **ledgers(evidence), **heeded(wished)},
        struck=Counter(fault.what for fault in evidence.struck),
        cancels=figures(closed),
    )


def _checked(evidence: Evidence, cases: Mapping[RequestId, Case]) -> dict[str, int]:
    told = [case.told for case in cases.values()]
    return {
        "faults": len(evidence.struck),
        "readers": len(evidence.observations),
        **{f"readers: {name}": number for name, number in Counter(one.reader for one in evidence.observations).items()},
        "readers that gave up before the end": sum(
            _impatient(case, seen, evidence.struck)
            for case in cases.values()
            for seen in case.observations
            if not seen.left
        ),
        "voided": sum(len(one.voided) for one in evidence.observations),
        "model_calls": len(evidence.calls),
        "stalled_ms": round(sum(one.until_ms - one.from_ms for one in evidence.stalls)),
        "alone": sum(case.asked.turn.alone for case in cases.values()),
        "published_twice": sum(len(case.published) > 1 for case in cases.values()),
        "raced": sum(one.raced for one in told),
        "superseded": sum(one.attempts > 1 for one in told),
        "continued": sum(one.continued > 0 for one in told),
        "healed": sum(case.told.outcome == "completed" and "fails" in _script(case) for case in cases.values()),
        "undone": sum(one.assembly.state.undone for one in told),
        "ignored_deltas": sum(one.ignored for one in told),
        "settled_twice": sum(len(case.settlements) > 1 for case in cases.values()),
        "repeated_admissions": sum(len(case.decisions) > 1 for case in cases.values()),
        "repeated_turns": sum(len(case.turns) > 1 for case in cases.values()),
        "unpriced": sum(_unpriced(case) for case in cases.values()),
        "stopped_by_budgets": sum(case.stopped for case in cases.values()),
        **{f"refused: {limit}": number for limit, number in Counter(map(_refused_by, cases.values())).items() if limit},
    }


def _refused_by(case: Case) -> str | None:
    """The limit that refused it, if one did."""
    said = case.decisions[0].said if case.decisions else None
    return said.refusal.limit if isinstance(said, ChatRefused) else None


def _unpriced(case: Case) -> bool:
    """Whether its bill has tokens with a price, and names no deployment that they could have it from."""
    return any(isinstance(entry.said, UsageSettled) and unpriced(case, entry.said) for entry in case.settlements)


def _script(case: Case) -> Mapping[str, object]:
    return case.asked.turn.trouble.upstream


# --- one request -----------------------------------------------------------------------------------------------------


def _of_one(case: Case, evidence: Evidence) -> Iterator[Violation]:
    yield from _lost(case, evidence.struck)
    yield from _ended_twice(case)
    yield from _outcome(case)
    yield from _text(case)
    yield from _redone(case, evidence.stalls)
    if not case.bare:
        yield from missettled(case)


def _lost(case: Case, struck: Sequence[Struck]) -> Iterator[Violation]:
    if not case.published:
        yield case.broke("lost", "acknowledged, and not in the log")
    elif not case.decisions and not case.bare:
        yield case.broke("lost", "admission never decided", *case.published[:1])
    if case.told.ended is None:
        yield case.broke("lost", "no end", *case.published[:1], *case.told.entries[-1:])
    elif case.told.text and not (case.turns or case.bare or case.told.assembly.state.undone):
        yield case.broke("lost", "its turn is not in the log", *case.decisions[:1])
    for seen in case.observations:
        if seen.outcome is None and not (seen.left or _impatient(case, seen, struck)):
            yield case.broke("lost", f"its {seen.reader} reader heard of no end", *case.published[:1])


def _impatient(case: Case, seen: Observation, struck: Sequence[Struck]) -> bool:
    """Whether a reader gave up before there was an end that it could have heard of."""
    ended = case.told.ended
    if seen.outcome is not None or ended is None:
        return False
    # A door, or a broker, that was away had nobody to tell it.
    away = [fault for fault in struck if fault.what in BROKERS or ("http" in fault.what and "http" in seen.reader)]
    back = [over_ms(fault) for fault in near(away, ended.timestamp_ms, seen.until_ms)]
    return seen.until_ms < max([ended.timestamp_ms, *back]) + _HEARD_MS


def _ended_twice(case: Case) -> Iterator[Violation]:
    for what, entries in (("admission decided", case.decisions), ("turns", case.turns)):
        if len({entry.event_id for entry in entries}) > 1:
            yield case.broke("ended_twice", f"{what} more than once, under different ids", *entries)
    for seen in (*case.observations, *resumed(case.request, case.told.entries)):
        if len(seen.outcomes) > 1:
            yield case.broke("ended_twice", f"its {seen.reader} reader was told {' and '.join(seen.outcomes)}")
        elif seen.outcome is not None and seen.outcome != case.told.outcome:
            yield case.broke("ended_twice", f"{seen.outcome} for its {seen.reader} reader, {case.told.outcome} later")
        elif seen.outcome not in {None, "broken"} and seen.text != case.told.text:
            said, stands = len(tokens_of(seen.text)), len(tokens_of(case.told.text))
            yield case.broke("ended_twice", f"{said} tokens for its {seen.reader} reader, others or {stands} later")


def _outcome(case: Case) -> Iterator[Violation]:
    trouble, outcome = case.asked.turn.trouble, case.told.outcome
    fair = {
        "completed": True,
        "cancelled": trouble.cancel is not None or case.asked.turn.interrupted,
        "expired": trouble.timeout_ms is not None,
        "failed": trouble.fails_for_good,
        "rejected": case.asked.turn.if_busy == "reject" or (case.asked.turn.limited and _refused_by(case) is not None),
    }
    if outcome == "broken":
        yield case.broke("spliced", "the log lacks deltas of the attempt that stands")
    elif outcome is not None and not fair.get(outcome, False):
        yield case.broke("failed", f"{outcome}, for nothing that was done to it")
    spoke = len(tokens_of(case.told.text))
    if outcome == "completed" and spoke != case.asked.turn.tokens and not (case.stopped and spoke):
        yield case.broke("spliced", f"completed with {spoke} of {case.asked.turn.tokens} tokens")


def _text(case: Case) -> Iterator[Violation]:
    shown = {case.told.text: "every late"}
    for seen in (*case.observations, *resumed(case.request, case.told.entries)):
        for text in (seen.text, *seen.voided):
            shown.setdefault(text, seen.reader)
    for entry in case.turns:
        if isinstance(entry.said, TurnFinished):
            text = "".join(str(message.get("content") or "") for message in entry.said.reply)
            if text != case.told.text:
                yield case.broke("spliced", "its turn holds another text than its stream", entry)
            if case.told.assembly.state.undone:
                yield case.broke("ended_twice", "rolled back, and remembered as a turn", entry)
    for text, reader in shown.items():
        for fault, what in faults_of(text, case.told.joints):
            yield case.broke(fault, f"{what}, for its {reader} reader", *case.told.entries[:1])


def _redone(case: Case, stalls: Sequence[Stall]) -> Iterator[Violation]:
    ended, deadlines = case.told.ended, deadlines_of(case)
    over = [(_could_be_read_ms(case, ended), f"it was {case.told.outcome}")] if ended else []
    over += [(deadline_ms, "its deadline") for deadline_ms in deadlines[:1]]
    for call in case.calls:
        for at_ms, what in over:
            # What the kit slept through is not the worker's: the model server that dates the call is the kit's.
            late_ms = call.started_ms - at_ms - stalled_ms(stalls, at_ms, call.started_ms)
            if late_ms > GRACE_MS:
                yield case.broke("redone", f"model call {call.id} began {late_ms / 1000:.1f} s after {what}")


def _could_be_read_ms(case: Case, ended: Entry) -> float:
    """When the record that ended it could be read: its producer dates it, and brokers may be long in taking it."""
    heard = (seen.until_ms for seen in case.observations if seen.reader == "live" and seen.outcome is not None)
    return max([float(ended.timestamp_ms), *(at_ms for at_ms in heard if at_ms < inf)])


def _unfit_answers(evidence: Evidence) -> Iterator[Violation]:
    """Of all who asked, also of those that nothing was accepted of."""
    for seen in evidence.observations:
        for what in () if evidence.bare else seen.unfit:
            yield Violation("failed", seen.request, f"{what}, to its {seen.reader} reader")


# --- order -----------------------------------------------------------------------------------------------------------


def _of_conversations(cases: Mapping[RequestId, Case]) -> Iterator[Violation]:
    talks = defaultdict[Conversation, list[Case]](list)
    for case in cases.values():
        if case.published:
            talks[case.asked.conversation].append(case)
    for talk in talks.values():
        yield from _order(sorted(talk, key=lambda case: case.published[0].offset))


def _order(talk: Sequence[Case]) -> Iterator[Violation]:
    """`talk` stands in the order of the requests in the log."""
    # Of one that nobody acknowledged its client does not know when it was accepted, or whether.
    for before, case in pairwise([case for case in talk if case.acknowledged]):
        if case.asked.turn.number < before.asked.turn.number:
            yield case.broke("reordered", "published before a turn that was asked earlier", case.published[0])
    # Refusals are admission's, and wait for nobody.
    running = [case for case in talk if case.told.opened]
    for before, case in pairwise(running):
        opened, ended = case.told.opened, before.told.ended
        if opened and ended and opened.offset < ended.offset:
            yield case.broke("reordered", "opened before the turn before it had ended", opened, ended)
    told = [(case.turns[0].offset, case) for case in talk if case.turns]
    for (offset_before, _), (offset, case) in pairwise(told):
        if offset < offset_before:
            yield case.broke("reordered", "its turn stands before that of an earlier request", *case.turns)


def _waiting(cases: Mapping[RequestId, Case]) -> Iterator[Speaking]:
    """Of each request that nothing but faults of klatch can hold up: its turn to speak, its end, when it spoke."""
    free_ms = defaultdict[Conversation, int](int)
    for case in sorted((one for one in cases.values() if one.published), key=lambda one: one.published[0].offset):
        told, published = case.told, case.published[0].timestamp_ms
        if told.ended is None:
            continue
        began = max(published, free_ms[case.asked.conversation])
        free_ms[case.asked.conversation] = max(began, told.ended.timestamp_ms)
        if case.asked.turn.plain and told.spoken_ms:
            yield Speaking(case.request, began, told.ended.timestamp_ms, told.spoken_ms)
