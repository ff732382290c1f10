"""The judge finds requests whose wishes were not heeded: where they can be judged, and not where a fault excuses it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.workers.honest_run import (
    ONE,
    TWO,
    admitted,
    asked,
    cancelled_late_billed,
    counts,
    delta,
    end,
    entries,
    honest,
    opening,
    rejected,
    said,
    settled,
    stream_of,
    troubled,
    with_observation,
)

from klatch_schemas.codec import Delta
from klatch_schemas.events import Event, Usage
from klatch_schemas.ids import Writer
from klatch_workers.torture.evidence import Entry, Evidence, ModelCall, Observation, Stall, Struck
from klatch_workers.torture.judge import judge

KILLED = Struck("kill generation", 1_500.0, 1_500.0)
AWAY = Struck("leaderless", 31_000.0, 31_500.0, 1_000.0)
SLEPT = Stall(1_000.0, 4_000.0)


def heeded(evidence: Evidence, sort: str) -> int:
    """How many such wishes could be judged."""
    return judge(evidence).checked[f"heeded: {sort}"]


def at(stream: Sequence[Entry], *times_ms: int) -> list[Entry]:
    """The same records at these times, the last of which goes for the rest."""
    times = [*times_ms, *(times_ms[-1:] * len(stream))]
    return [one._replace(timestamp_ms=time_ms) for one, time_ms in zip(stream, times, strict=False)]


# --- deadlines ---------------------------------------------------------------------------------------------------


def spoken_until(last_ms: int, deadline_ms: int = 100, *, called_until_ms: float = 0.0) -> Evidence:
    """The first turn had a deadline, and its last token and its end came so late."""
    evidence = honest(
        requests=entries("chat.requests", asked(ONE, deadline_ms=deadline_ms), asked(TWO), settled(ONE), settled(TWO)),
        calls=[ModelCall("c1", ONE, 0.0, called_until_ms or last_ms), ModelCall("c2", TWO, last_ms)],
    )
    stream = [*at(evidence.stream[:5], 0, 10, 20, last_ms), *at(evidence.stream[5:], last_ms + 100)]
    return troubled(replace(evidence, stream=stream), timeout_ms=100)


def test_a_request_that_goes_on_after_its_deadline_is_found() -> None:
    late = spoken_until(5_000)
    assert counts(judge(late)) == {"failed": 1, "redone": 1}
    assert {violation.what for violation in judge(late).violations} == {
        "it spoke on until 4.9 s after its deadline",
        "it was completed 4.9 s after its deadline",
        "model call c1 went on until 4.9 s after its deadline",
    }


def test_a_model_call_that_goes_on_after_the_deadline_is_found_by_itself() -> None:
    assert counts(judge(spoken_until(50, called_until_ms=9_000.0))) == {"redone": 1}


def test_a_request_may_be_a_little_late_and_its_deadline_may_be_far_away() -> None:
    assert counts(judge(spoken_until(2_900))) == {}
    assert counts(judge(spoken_until(9_000, deadline_ms=10_000))) == {}
    assert (heeded(spoken_until(2_900), "deadline"), heeded(spoken_until(50), "deadline")) == (1, 0)


@pytest.mark.parametrize("fault", [KILLED, AWAY, Struck("boundary settled/generation", 2_000.0, 2_000.0, 900.0)])
def test_a_deadline_that_a_fault_may_have_kept_from_being_heeded_is_not_judged(fault: Struck) -> None:
    disturbed = replace(spoken_until(5_000), struck=[fault])
    assert (counts(judge(disturbed)), heeded(disturbed, "deadline")) == ({}, 0)
    elsewhere = replace(spoken_until(5_000), struck=[Struck("kill admission", 1_500.0, 1_500.0)])
    assert counts(judge(elsewhere)) == {"failed": 1, "redone": 1}


def test_what_the_kit_slept_is_not_late() -> None:
    assert counts(judge(replace(spoken_until(5_000), stalls=[SLEPT]))) == {}


def expired(deadline_ms: int) -> Evidence:
    """The first turn, with this deadline, expired 300 ms after it was asked."""
    usage = Usage(prompt_tokens=5, completion_tokens=2, estimated=True)
    evidence = cancelled_late_billed(2)
    over = end(ONE, "expired", 2, usage=usage)
    requests = entries(
        "chat.requests",
        *(asked(ONE, deadline_ms=deadline_ms), asked(TWO), settled(ONE, "expired", usage), settled(TWO)),
    )
    stream = entries("chat.stream", *stream_of(ONE, "c1")[:3], over, *stream_of(TWO, "c2"))
    return troubled(replace(evidence, requests=requests, stream=stream, observations=[]), timeout_ms=300)


def test_a_request_that_expires_before_its_deadline_is_found() -> None:
    assert counts(judge(expired(300))) == {}
    assert counts(judge(expired(1_200))) == {}
    assert counts(judge(expired(2_300))) == {"failed": 1}


# --- cancels over HTTP -------------------------------------------------------------------------------------------


def test_a_cancel_that_a_door_took_and_the_log_does_not_hold_is_lost_whatever_was_struck() -> None:
    deleted = troubled(with_observation(Observation("http", ONE, "", None, left=True, deleted=True)), cancel="delete")
    assert counts(judge(deleted)) == {"lost": 1}
    assert counts(judge(replace(deleted, struck=[AWAY]))) == {"lost": 1}
    cancelled = cancelled_late_billed(2)
    taken = replace(cancelled, observations=[Observation("http", ONE, "", None, left=True, deleted=True)])
    assert (counts(judge(taken)), heeded(taken, "delete")) == ({}, 1)


def hung_up(at_ms: float, until_ms: int) -> Evidence:
    """Who asked the first turn went away, which is to cancel it; it went on until it was done."""
    seen = Observation("http", ONE, said("c1", 0), None, left=True, hung_up_ms=at_ms)
    evidence = troubled(with_observation(seen), cancel="disconnect", cancel_after=1)
    calls = [ModelCall("c1", ONE, 0.0, until_ms), ModelCall("c2", TWO, until_ms)]
    stream = [*at(evidence.stream[:5], 0, 10, 20, until_ms), *at(evidence.stream[5:], until_ms + 100)]
    return replace(evidence, stream=stream, calls=calls)


def test_a_request_that_goes_on_without_the_client_whose_going_cancels_it_is_found() -> None:
    assert counts(judge(hung_up(1_000.0, 4_200))) == {"failed": 1}
    assert counts(judge(hung_up(1_000.0, 3_900))) == {}
    assert counts(judge(replace(hung_up(1_000.0, 4_200), stalls=[SLEPT]))) == {}


@pytest.mark.parametrize("fault", [AWAY, Struck("roll http", 1_500.0, 1_600.0)])
def test_a_door_that_was_struck_need_not_have_heard_that_its_client_went_away(fault: Struck) -> None:
    assert counts(judge(replace(hung_up(1_000.0, 9_000), struck=[fault]))) == {}
    assert counts(judge(replace(hung_up(1_000.0, 9_000), struck=[KILLED]))) == {"failed": 1}


def test_what_was_asked_by_another_call_goes_on_without_the_client_of_the_first() -> None:
    evidence = hung_up(1_000.0, 9_000)
    later = [one._replace(timestamp_ms=one.timestamp_ms + 1_001) for one in evidence.requests]
    assert counts(judge(replace(evidence, requests=later))) == {}


def test_a_client_that_is_told_to_begin_anew_has_left_a_call_that_was_over() -> None:
    evidence = hung_up(1_000.0, 9_000)
    first, rest = evidence.stream[:2], evidence.stream[5:]
    again: list[Event | Delta] = [
        opening(ONE, 2, "v"),
        *(delta(ONE, number, said("c1", number), 2, "v") for number in range(3)),
        end(ONE, attempt=2, writer=Writer("v")),
    ]
    superseded = [*first, *at(entries("chat.stream", *again), 9_000), *at(rest, 9_100)]
    numbered = [one._replace(offset=offset) for offset, one in enumerate(superseded)]
    assert counts(judge(replace(evidence, stream=numbered, observations=[evidence.observations[-1]]))) == {}


# --- busy conversations ------------------------------------------------------------------------------------------


def busy(ends_ms: int, *, opened_ms: int = 0) -> Evidence:
    """The second turn, which is not to wait, is admitted after 100 ms, and answered behind the first."""
    evidence = honest(calls=[ModelCall("c1", ONE, 0.0, ends_ms), ModelCall("c2", TWO, ends_ms)])
    stream = [*at(evidence.stream[:5], opened_ms, ends_ms), *at(evidence.stream[5:], ends_ms + 100)]
    known = evidence.asked[TWO]
    hurried = replace(known, turn=replace(known.turn, if_busy="reject"))
    return replace(evidence, stream=stream, asked={**evidence.asked, TWO: hurried})


def test_a_request_that_was_answered_in_its_turn_and_was_not_to_wait_is_found() -> None:
    assert counts(judge(busy(3_300))) == {"failed": 1}
    assert counts(judge(busy(3_000))) == {}
    assert counts(judge(replace(busy(3_300), stalls=[SLEPT]))) == {}
    assert heeded(busy(3_300), "reject") == 1


def test_who_is_met_by_an_owner_that_has_just_taken_the_earlier_request_over_is_not_judged_by_the_time_before() -> None:
    assert counts(judge(busy(3_300, opened_ms=1_000))) == {}


def test_who_is_admitted_first_has_nobody_to_wait_for() -> None:
    evidence = busy(3_300)
    assert counts(judge(replace(evidence, admitted=entries("chat.admitted", admitted(TWO), admitted(ONE))))) == {}


@pytest.mark.parametrize("fault", [KILLED, AWAY])
def test_a_busy_conversation_is_not_judged_where_its_owner_was_struck(fault: Struck) -> None:
    assert counts(judge(replace(busy(9_000), struck=[fault]))) == {}
    assert counts(judge(replace(busy(9_000), struck=[Struck("kill http", 1_500.0, 1_500.0)]))) == {"failed": 1}


def test_who_was_rejected_as_it_wished_is_counted_as_heeded() -> None:
    evidence = rejected(if_busy="reject")
    stream = [*at(evidence.stream[:5], 0, 3_300), *evidence.stream[5:]]
    assert (counts(judge(replace(evidence, stream=stream))), heeded(replace(evidence, stream=stream), "reject")) == (
        {},
        1,
    )


def test_a_system_that_heeds_nothing_is_not_asked_to() -> None:
    assert "failed" not in counts(judge(replace(busy(3_300), bare=True)))
