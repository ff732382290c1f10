"""Whether klatch did what requests asked for: to be cancelled, to end at a deadline, not to wait for others.

Text and ends that are in order by themselves can be what nobody wanted any more. All of it is judged with a margin of
seconds, less what the kit slept, and only where no fault kept klatch from hearing in time; but for what it has
acknowledged, which no fault excuses.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple, get_args

from klatch_schemas.events import ChatAdmitted, ChatRequested, StreamCancel
from klatch_schemas.ids import Conversation
from klatch_workers.torture.case import Case
from klatch_workers.torture.disturbance import disturbed
from klatch_workers.torture.evidence import Entry, Evidence
from klatch_workers.torture.report import Broken, Violation
from klatch_workers.torture.stalls import stalled_ms

LATE_MS: Final = 3_000.0
"""How long klatch may take to do what was asked: what it promises are tenths of a second, on a machine with time."""
EARLY_MS: Final = 1_000.0
"""By how much clocks of one machine may differ."""

Sort = Literal["deadline", "expired", "delete", "disconnect", "reject"]


class Wish(NamedTuple):
    """What a request asked for, where it can be judged."""

    sort: Sort
    broken: Sequence[Violation] = ()


def wishes(cases: Sequence[Case], evidence: Evidence) -> Iterator[Wish]:
    """Every wish that can be judged; none of a system that is only requests and streams."""
    if evidence.bare:
        return
    talks: dict[tuple[str, Conversation], list[Case]] = {}
    for case in cases:
        talks.setdefault((case.asked.tenant, case.asked.conversation), []).append(case)
        yield from _deadline(case, evidence)
        yield from _expired(case)
        yield from _deleted(case)
        yield from _disconnected(case, evidence)
    for talk in talks.values():
        yield from _rejected(talk, evidence)


def deadlines_of(case: Case) -> list[int]:
    """Its deadline, more than one if it was asked more than once over HTTP; the first counts."""
    asked = [entry.said for entry in case.published if isinstance(entry.said, ChatRequested)]
    return [said.deadline_ms for said in asked if said.deadline_ms is not None]


# --- deadlines -------------------------------------------------------------------------------------------------------


def _deadline(case: Case, evidence: Evidence) -> Iterator[Wish]:
    """Nothing is said, completed or paid for long after the deadline."""
    told, deadlines = case.told, deadlines_of(case)
    if not (deadlines and told.opened):
        return
    deadline_ms = deadlines[0]
    completed = told.ended.timestamp_ms if told.ended and told.outcome == "completed" else 0
    last: list[tuple[Broken, str, float]] = [
        ("failed", "it spoke on until", max(told.spoken_ms, default=0)),
        ("failed", "it was completed", completed),
        # Those that began after it are counted where they are.
        *(
            ("redone", f"model call {call.id} went on until", call.ended_ms or float("inf"))
            for call in case.calls
            if call.started_ms <= deadline_ms
        ),
    ]
    over_ms = max(at_ms for _, _, at_ms in last)
    if over_ms < deadline_ms or disturbed(evidence.struck, ("generation",), deadline_ms, over_ms):
        return
    broken = list[Violation]()
    for kind, what, at_ms in last:
        late_ms = at_ms - deadline_ms - stalled_ms(evidence.stalls, deadline_ms, at_ms)
        if late_ms > LATE_MS:
            said = f"{what} {late_ms / 1000:.1f} s after its deadline"
            broken.append(case.broke(kind, said, *case.published[:1]))
    yield Wish("deadline", broken)


def _expired(case: Case) -> Iterator[Wish]:
    """Nobody's time is up before it is."""
    ended, deadlines = case.told.ended, deadlines_of(case)
    if case.told.outcome != "expired" or ended is None or not deadlines:
        return
    early_ms = min(deadlines) - ended.timestamp_ms
    what = f"expired {early_ms / 1000:.1f} s before its deadline"
    yield Wish("expired", [case.broke("failed", what, *case.published[:1])] if early_ms > EARLY_MS else [])


# --- cancels over HTTP -----------------------------------------------------------------------------------------------


def _cancelled(case: Case) -> bool:
    return any(isinstance(entry.said, StreamCancel) for entry in case.told.entries)


def _deleted(case: Case) -> Iterator[Wish]:
    """A cancel that a door took is in the log: it has been acknowledged there."""
    if any(seen.deleted for seen in case.observations):
        what = "a door took its DELETE, and the log has no cancel of it"
        yield Wish("delete", [] if _cancelled(case) else [case.broke("lost", what, *case.published[:1])])


def _disconnected(case: Case, evidence: Evidence) -> Iterator[Wish]:
    """Who goes away, and said that this is to cancel, is cancelled."""
    hung_up_ms = max((seen.hung_up_ms for seen in case.observations), default=0.0)
    # What was written later may be another call's, and a client that was just being told to begin anew has left a call
    # that was over.
    asked_before = any(entry.timestamp_ms <= hung_up_ms for entry in case.published)
    if not (hung_up_ms and asked_before and case.told.opened) or case.told.attempts > 1:
        return
    went_on_ms = float(case.told.ended.timestamp_ms) if case.told.ended else float("inf")
    late_ms = went_on_ms - hung_up_ms - stalled_ms(evidence.stalls, hung_up_ms, went_on_ms)
    if _cancelled(case):
        yield Wish("disconnect")
    elif late_ms > LATE_MS and not disturbed(evidence.struck, ("http",), hung_up_ms - LATE_MS, hung_up_ms + LATE_MS):
        what = f"it went on for {late_ms / 1000:.1f} s after its client had gone away, which was to cancel it"
        yield Wish("disconnect", [case.broke("failed", what, *case.published[:1])])


# --- busy conversations ----------------------------------------------------------------------------------------------


def _rejected(talk: Sequence[Case], evidence: Evidence) -> Iterator[Wish]:
    """Who is not to wait does not: it is met right behind an earlier request that speaks for seconds more."""
    for case in talk:
        if case.asked.turn.if_busy == "reject" and any(_met_busy(before, case, evidence) for before in talk):
            answered = case.told.opened and case.told.outcome != "rejected"
            what = "answered, though its conversation was busy and it was not to wait"
            yield Wish("reject", [case.broke("failed", what, case.told.opened)] if answered else [])


def _met_busy(before: Case, case: Case, evidence: Evidence) -> bool:
    first, then = _admission(before), _admission(case)
    if not (first and then and before.told.ended and before.told.reopened):
        return False
    if first.partition != then.partition or first.offset >= then.offset:
        return False
    # Whoever opened the earlier one last met the two one right after the other.
    since_ms = max(then.timestamp_ms, before.told.reopened.timestamp_ms)
    until_ms = before.told.ended.timestamp_ms
    busy_ms = until_ms - since_ms - stalled_ms(evidence.stalls, since_ms, until_ms)
    return busy_ms > LATE_MS and not disturbed(evidence.struck, ("generation",), since_ms, since_ms + LATE_MS)


def _admission(case: Case) -> Entry | None:
    return next((entry for entry in case.decisions if isinstance(entry.said, ChatAdmitted)), None)


def checked(found: Sequence[Wish]) -> Mapping[str, int]:
    """How many of each sort could be judged."""
    return {f"heeded: {sort}": sum(one.sort == sort for one in found) for sort in get_args(Sort)}
