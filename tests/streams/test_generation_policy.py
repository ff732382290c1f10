"""The policy of generation: whatever is reported to it, a request comes to its end and is concluded, once."""

from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas.assembly import StreamState
from klatch_schemas.events import StreamError
from klatch_streams.generation import (
    Broken,
    Command,
    Conclude,
    End,
    Ended,
    Interrupted,
    Prepare,
    Ready,
    Report,
    Speak,
    Spoken,
    Stalled,
    Watch,
    lifecycle,
)

ERROR = StreamError(code="model_error", message="no")
INTERRUPTIONS = st.sampled_from(["cancelled", "expired", "superseded", "ended"]).map(Interrupted)  # type: ignore[arg-type]
ANSWERS: dict[type[Command], st.SearchStrategy[Report]] = {
    Prepare: st.one_of(
        st.sampled_from(["allow", "redact", "block", "escalate"]).map(Ready),  # type: ignore[arg-type]
        st.just(Broken(ERROR)),
        INTERRUPTIONS,
    ),
    Speak: st.one_of(st.just(Spoken()), st.just(Broken(ERROR)), INTERRUPTIONS),
    Watch: st.one_of(st.just(Stalled()), st.just(Ended()), st.just(Interrupted("cancelled"))),
    End: st.one_of(st.just(Ended()), st.just(Interrupted("superseded"))),
}


def run(state: StreamState, *reports: Report) -> list[Command]:
    """The commands that the policy gives when it is told `reports`."""
    policy = lifecycle(state)
    return [next(policy), *(policy.send(report) for report in reports)]


@given(st.data())
def test_whatever_is_reported_a_request_is_brought_to_its_end_before_it_is_concluded(data: st.DataObject) -> None:
    policy = lifecycle(StreamState())
    command, told = next(policy), list[Report]()
    while not isinstance(command, Conclude) and len(told) < 50:
        told.append(data.draw(ANSWERS[type(command)]))
        command = policy.send(told[-1])
    if isinstance(command, Conclude):
        assert told[-1] in (Ended(), Interrupted("ended"))


@given(st.data())
def test_a_blocked_request_never_speaks(data: st.DataObject) -> None:
    policy = lifecycle(StreamState())
    assert isinstance(next(policy), Prepare)
    command = policy.send(Ready(data.draw(st.sampled_from(["block", "escalate"])), ("secret",)))
    assert isinstance(command, End)
    assert command.status == "blocked"


def test_an_answer_that_is_complete_is_ended_and_concluded() -> None:
    commands = run(StreamState(), Ready("allow"), Spoken(), Ended())
    assert commands == [Prepare(), Speak(), End("completed"), Conclude()]


def test_a_superseded_answer_is_watched_and_succeeded_when_it_stalls() -> None:
    commands = run(StreamState(), Ready("allow"), Interrupted("superseded"), Stalled(), Spoken(), Ended())
    assert commands == [Prepare(), Speak(), Watch(), Speak(), End("completed"), Conclude()]


def test_an_end_that_lost_against_an_opening_is_not_the_end() -> None:
    commands = run(StreamState(), Ready("allow"), Spoken(), Interrupted("superseded"), Ended())
    assert commands == [Prepare(), Speak(), End("completed"), Watch(), Conclude()]


def test_a_successor_of_a_stream_that_ended_only_concludes() -> None:
    assert run(StreamState(1, "w", 3, "completed", settled=True)) == [Conclude()]


def test_a_successor_of_a_cancelled_stream_settles_it_without_a_model() -> None:
    assert run(StreamState(1, "w", 3, "cancelled"), Ended()) == [End("cancelled"), Conclude()]
