"""The policy of generation: whatever is reported to it, a request comes to its end and is concluded, once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas.assembly import StreamState
from klatch_schemas.events import IfBusy, StreamError
from klatch_streams.generation import (
    TRIES,
    Broken,
    Busy,
    Command,
    Conclude,
    Due,
    End,
    Ended,
    Interrupted,
    Pause,
    Prepare,
    Queue,
    Ready,
    Report,
    Rested,
    Speak,
    Spoken,
    Stalled,
    Watch,
    WhenBusy,
    lifecycle,
    when_met,
)

ERROR = StreamError(code="model_error", message="no")
INTERRUPTIONS = st.sampled_from(["cancelled", "expired", "superseded", "ended"]).map(Interrupted)  # type: ignore[arg-type]
FAILURES = st.builds(Broken, st.just(ERROR), st.booleans())
ANSWERS: dict[type[Command], st.SearchStrategy[Report]] = {
    Queue: st.one_of(st.just(Due()), st.just(Busy()), INTERRUPTIONS),
    Prepare: st.one_of(
        st.sampled_from(["allow", "redact", "block", "escalate"]).map(Ready),  # type: ignore[arg-type]
        st.just(Broken(ERROR)),
        INTERRUPTIONS,
    ),
    Speak: st.one_of(st.just(Spoken()), FAILURES, INTERRUPTIONS),
    Pause: st.one_of(st.just(Rested()), INTERRUPTIONS),
    Watch: st.one_of(st.just(Stalled()), st.just(Ended()), st.just(Interrupted("cancelled"))),
    End: st.one_of(st.just(Ended()), st.just(Interrupted("superseded"))),
}
DROPPED = Broken(ERROR, again=True)


def run(*reports: Report) -> list[Command]:
    """The commands that the policy gives when it is told `reports`."""
    policy = lifecycle()
    return [next(policy), *(policy.send(report) for report in reports)]


def told(data: st.DataObject, most: int = 50) -> list[tuple[Command, Report | None]]:
    """Commands with what was reported of them, up to the conclusion."""
    policy, story = lifecycle(), list[tuple[Command, Report | None]]()
    command = next(policy)
    while not isinstance(command, Conclude) and len(story) < most:
        report = data.draw(ANSWERS[type(command)])
        story.append((command, report))
        command = policy.send(report)
    return [*story, (command, None)]


@given(st.data())
def test_whatever_is_reported_a_request_is_brought_to_its_end_before_it_is_concluded(data: st.DataObject) -> None:
    *story, (last, _) = told(data)
    if isinstance(last, Conclude):
        assert story[-1][1] in (Ended(), Interrupted("ended"))


@given(st.data())
def test_nothing_is_prepared_or_said_before_it_is_the_requests_turn(data: st.DataObject) -> None:
    story = told(data)
    for at, (command, _) in enumerate(story):
        if isinstance(command, Prepare):
            assert story[at - 1] == (Queue(), Due())
        if isinstance(command, Speak):
            assert isinstance(story[at - 1][1], Ready | Rested)


@given(st.data())
def test_a_model_that_fails_again_and_again_is_asked_three_times_and_left_alone_between(data: st.DataObject) -> None:
    story = told(data)
    failures = [at for at, (_, report) in enumerate(story) if isinstance(report, Broken)]
    pauses = [command for command, _ in story if isinstance(command, Pause)]
    assert len(pauses) <= TRIES - 1
    assert [pause.failures for pause in pauses] == list(range(1, len(pauses) + 1))
    for at in failures:
        broken, after = story[at][1], story[at + 1][0]
        assert isinstance(broken, Broken)
        if isinstance(after, Pause):
            assert broken.again
        else:
            assert after == End("failed", ERROR)


@given(st.data())
def test_a_blocked_request_never_speaks(data: st.DataObject) -> None:
    policy = lifecycle()
    assert isinstance(next(policy), Queue)
    assert isinstance(policy.send(Due()), Prepare)
    command = policy.send(Ready(data.draw(st.sampled_from(["block", "escalate"])), ("secret",)))
    assert isinstance(command, End)
    assert command.status == "blocked"


def test_an_answer_that_is_complete_is_ended_and_concluded() -> None:
    commands = run(Due(), Ready("allow"), Spoken(), Ended())
    assert commands == [Queue(), Prepare(), Speak(), End("completed"), Conclude()]


def test_an_answer_that_broke_off_is_asked_for_again_after_a_pause() -> None:
    commands = run(Due(), Ready("allow"), DROPPED, Rested(), DROPPED, Rested(), DROPPED, Ended())
    assert commands == [
        *(Queue(), Prepare(), Speak(), Pause(1), Speak(), Pause(2), Speak()),
        *(End("failed", ERROR), Conclude()),
    ]


def test_a_pause_ends_with_whatever_interrupts_it() -> None:
    assert run(Due(), Ready("allow"), DROPPED, Interrupted("cancelled"))[-1] == End("cancelled")


def test_a_failure_that_no_other_try_mends_is_the_end() -> None:
    assert run(Due(), Ready("allow"), Broken(ERROR))[-1] == End("failed", ERROR)


def test_a_superseded_answer_is_watched_and_succeeded_in_its_turn_when_it_stalls() -> None:
    commands = run(Due(), Ready("allow"), Interrupted("superseded"), Stalled(), Due(), Ready("allow"), Spoken())
    assert commands == [
        *(Queue(), Prepare(), Speak(), Watch()),
        *(Queue(), Prepare(), Speak(), End("completed")),
    ]


def test_an_end_that_lost_against_an_opening_is_not_the_end() -> None:
    commands = run(Due(), Ready("allow"), Spoken(), Interrupted("superseded"), Ended())
    assert commands == [Queue(), Prepare(), Speak(), End("completed"), Watch(), Conclude()]


def test_a_successor_of_a_stream_that_ended_only_concludes() -> None:
    assert run(Interrupted("ended")) == [Queue(), Conclude()]


def test_a_cancelled_stream_is_settled_without_its_turn_and_without_a_model() -> None:
    assert run(Interrupted("cancelled"), Ended()) == [Queue(), End("cancelled"), Conclude()]


def test_a_request_that_is_not_to_wait_is_rejected_with_what_helps() -> None:
    end = run(Busy())[-1]
    assert isinstance(end, End)
    assert end.error is not None
    assert (end.status, end.error.code) == ("rejected", "conversation_busy")


FREE, SAID, CANCELLED = StreamState(), StreamState(1, "w"), StreamState(status="cancelled")


@pytest.mark.parametrize(
    ("if_busy", "own", "busy", "does"),
    [
        ("enqueue", FREE, True, "wait"),
        ("reject", FREE, True, "reject"),
        ("interrupt", FREE, True, "cancel"),
        ("rollback", FREE, True, "undo"),
        *((if_busy, FREE, False, "wait") for if_busy in ("enqueue", "reject", "interrupt", "rollback")),
        # It was decided about before, by an owner who has died since.
        *((if_busy, SAID, True, "wait") for if_busy in ("enqueue", "reject", "interrupt", "rollback")),
        *((if_busy, CANCELLED, True, "wait") for if_busy in ("enqueue", "reject", "interrupt", "rollback")),
    ],
)
def test_what_a_request_does_when_its_conversation_is_busy(
    if_busy: IfBusy, own: StreamState, busy: bool, does: WhenBusy
) -> None:
    assert when_met(if_busy, own, busy) == does
