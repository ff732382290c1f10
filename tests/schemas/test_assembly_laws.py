"""Laws of the assembly rule, on random logs with zombies, repeats, gaps, cancels, restarts and late ends.

The reference reads the whole log at once and is written from the contract's words (design, section 5), not from the
code: which openings count, where the stream is over, which deltas belong to which opening.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Ended, ReplyReader, Said, Standing, StreamState, fold
from klatch_schemas.codec import Delta
from klatch_schemas.errors import KlatchError, StreamBroken, Superseded
from klatch_schemas.events import Status, StreamAttempt, StreamCancel, StreamEnd, StreamError, StreamRetract
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer

REQUEST, ACME, TALK = RequestId("r1"), Tenant("acme"), Conversation("c1")
Mode = Literal["restart", "continue"]


@dataclass
class Writing:
    """One process that writes into the stream, and does not know what the others do."""

    name: Writer
    attempt: int = 0
    seq: int = 0


@dataclass
class Scribe:
    """Writes a log from random choices; most of them are what a healthy or a dying writer would do."""

    log: list[Said] = field(default_factory=list[Said])
    writers: dict[int, Writing] = field(default_factory=dict[int, Writing])
    attempts: int = 0
    latest: int = 0

    def open(self, who: int, mode: Mode, raise_by: int) -> None:
        self.attempts = max(1, self.attempts + raise_by)
        writing = self.writers[who] = Writing(Writer(f"w{who}"), self.attempts)
        self.latest = who
        self.log.append(
            StreamAttempt(
                request=REQUEST, tenant=ACME, conversation=TALK, attempt=writing.attempt, writer=writing.name, mode=mode
            )
        )

    def speak(self, who: int, skip: int) -> None:
        writing = self._writing(who, Writer(f"w{who}"))
        writing.seq = max(0, writing.seq + skip)
        said = b'{"text":"%d"}' % len(self.log)
        value = codec.encode_delta(
            codec.delta_prefix(REQUEST, max(1, writing.attempt), writing.name), writing.seq, said
        )
        event = codec.decode(value)
        assert isinstance(event, Delta)
        self.log.append(event)
        writing.seq += 1

    def _writing(self, who: int, unknown: Writer) -> Writing:
        return self.writers.get(self.latest if who < 0 else who) or Writing(unknown)

    def repeat(self, back: int) -> None:
        if self.log:
            self.log.append(self.log[-1 - back % len(self.log)])

    def cancel(self) -> None:
        self.log.append(StreamCancel(request=REQUEST, tenant=ACME, conversation=TALK, by="ann"))

    def retract(self, from_seq: int) -> None:
        self.log.append(StreamRetract(request=REQUEST, tenant=ACME, conversation=TALK, from_seq=from_seq))

    def end(self, who: int, lost: int) -> None:
        writing = self._writing(who, Writer("admission"))
        completed = writing.attempt > 0 and writing.seq % 2 == 0
        self.log.append(
            StreamEnd(
                request=REQUEST,
                tenant=ACME,
                conversation=TALK,
                attempt=writing.attempt,
                writer=writing.name,
                seq=writing.seq + lost,
                status="completed" if completed else "failed" if writing.attempt else "rejected",
                error=None if completed else StreamError(code="model_error", message=f"after {writing.seq}"),
            )
        )


# Most of what is written comes from the writer in force (-1), and ends are rare, or the laws would see only noise.
# Weighted by hand: `one_of` takes the same strategy only once.
_who = st.sampled_from([-1] * 8 + [0, 1])
_CHOICES: dict[str, tuple[st.SearchStrategy[object], ...]] = {
    "speak": (_who, st.sampled_from([0] * 12 + [-1, 1])),
    "open": (st.integers(0, 1), st.sampled_from(["restart", "continue"]), st.sampled_from([0, 1, 1])),
    "repeat": (st.integers(0, 8),),
    "retract": (st.integers(0, 3),),
    "end": (_who, st.sampled_from([0, 0, 0, 1])),
    "cancel": (),
}
_steps = st.sampled_from(["speak"] * 14 + ["open"] * 4 + ["repeat"] * 3 + ["retract"] * 2 + ["end", "cancel"]).flatmap(
    lambda name: st.tuples(st.just(name), *_CHOICES[name])
)
_first = st.just(("open", 0, "restart", 1))
_ends = st.lists(st.sampled_from([("cancel",), ("end", -1, 0)]), min_size=1, max_size=3)
_over = st.tuples(_first, st.lists(_steps, max_size=25), _ends).map(
    lambda steps: _written([steps[0], *steps[1], *steps[2]])
)
"""Logs of streams that have ended, most of them by a cancel and an end that raced each other."""
_logs = st.tuples(_first | _steps, st.lists(_steps, max_size=25)).map(lambda steps: _written([steps[0], *steps[1]]))


def _written(steps: Sequence[tuple[object, ...]]) -> list[Said]:
    scribe = Scribe()
    for name, *choices in steps:
        getattr(scribe, str(name))(*choices)
    return scribe.log


@dataclass
class Truth:
    """What the contract says of a whole log."""

    standing: list[int] = field(default_factory=list[int])
    """Offsets of the deltas whose text stands."""
    broken: bool = False
    over: bool = False


def truth(log: Sequence[Said]) -> Truth:
    """The contract, word by word, over a complete log."""
    found, opening, said = Truth(), (0, ""), list[tuple[int, int, int]]()
    expected = 0
    for offset, one in enumerate(log):
        match one:
            case StreamAttempt(attempt=attempt, writer=writer, mode=mode) if attempt > opening[0]:
                opening, expected = (attempt, writer), 0
                if mode == "restart":
                    said, found.broken = [], False
            case Delta(attempt=attempt, writer=writer, seq=seq) if (attempt, writer) == opening and seq == expected:
                said.append((offset, attempt, seq))
                expected += 1
            case Delta(attempt=attempt, writer=writer, seq=seq) if (attempt, writer) == opening and seq > expected:
                found.broken = True
            case StreamRetract(from_seq=from_seq):
                said = [one for one in said if one[1] != opening[0] or one[2] < from_seq]
            case StreamCancel():
                found.over = True
                break
            case StreamEnd(attempt=0) if opening[0] == 0:
                found.over, found.broken = True, found.broken or one.seq > expected
                break
            case StreamEnd(attempt=attempt, writer=writer, seq=seq) if (attempt, writer) == opening:
                found.over, found.broken = True, found.broken or seq > expected
                break
            case _:
                pass
    found.standing = [offset for offset, _, _ in said]
    return found


@dataclass
class Reader:
    """A reader as a door would be one: it joins when the log is `joined` long and then follows."""

    log: Sequence[Said]
    joined: int
    after: int | None = None
    since: int = 0
    """Where it begins to read."""
    shown: list[int] = field(default_factory=list[int])
    """Offsets of the deltas it was shown."""
    shown_at: list[int] = field(default_factory=list[int])
    """How long the log was then."""
    ended: bool = False
    outcome: tuple[Status, StreamError | None] | None = None
    """How it was told that the stream ended."""
    error: KlatchError | None = None
    failed_at: int = 0

    def read(self) -> "Reader":
        reader, at = ReplyReader(self.after), 0
        try:
            for at, said in enumerate(self.log[self.since : self.joined], start=self.since):
                assert reader.hear(at, said) is None
            self.show(reader.go_live(), self.joined)
            for at, said in enumerate(self.log[self.joined :], start=self.joined):
                heard = reader.hear(at, said)
                self.show([heard] if heard else [], at + 1)
        except KlatchError as error:
            self.error, self.failed_at = error, max(at + 1, self.joined)
        return self

    def show(self, said: Sequence[Standing | Ended], at: int) -> None:
        for one in said:
            assert not self.ended, "something was shown after the end"
            if isinstance(one, Ended):
                self.ended, self.outcome = True, (one.status, one.error)
            else:
                self.shown.append(one.offset)
                self.shown_at.append(at)


@settings(max_examples=200)
@given(_logs)
def test_a_late_reader_is_shown_what_the_contract_says(log: list[Said]) -> None:
    said, reader = truth(log), Reader(log, len(log)).read()
    assert isinstance(reader.error, StreamBroken) == said.broken
    if not said.broken:
        assert (reader.shown, reader.ended, reader.error) == (said.standing, said.over, None)


@settings(max_examples=200)
@given(_logs, st.integers(0, 26))
def test_whoever_joins_at_any_time_sees_only_text_that_stands_or_an_error(log: list[Said], joined: int) -> None:
    """The first promise: at every moment, what was shown is the text of one lineage, or the reader was told."""
    reader = Reader(log, min(joined, len(log))).read()
    for length in range(min(joined, len(log)), len(log) + 1):
        if reader.error and length >= reader.failed_at:
            return
        shown = [offset for offset, at in zip(reader.shown, reader.shown_at, strict=True) if at <= length]
        assert shown == truth(log[:length]).standing


@settings(max_examples=200)
@given(_logs, st.integers(0, 26))
def test_an_error_is_never_raised_without_its_reason(log: list[Said], joined: int) -> None:
    reader = Reader(log, min(joined, len(log))).read()
    if isinstance(reader.error, Superseded):
        standing = truth(log[: reader.failed_at]).standing
        assert reader.shown != standing[: len(reader.shown)]
    if isinstance(reader.error, StreamBroken):
        assert truth(log[: reader.failed_at]).broken


@settings(max_examples=200)
@given(_logs, st.integers(0, 26), st.data())
def test_resuming_after_whatever_was_shown_gives_exactly_the_rest(
    log: list[Said], joined: int, data: st.DataObject
) -> None:
    first = Reader(log, min(joined, len(log))).read()
    for after, seen_at in zip(first.shown, first.shown_at, strict=True):
        resumed = Reader(log, data.draw(st.integers(seen_at, len(log))), after).read()
        there = truth(log[: resumed.joined])
        if after not in there.standing:
            assert isinstance(resumed.error, Superseded)
            assert not resumed.shown
            continue
        before = first.shown[: first.shown.index(after) + 1]
        whole = truth(log)
        if resumed.error is None:
            assert before + resumed.shown == whole.standing
            assert resumed.ended == whole.over
        else:
            at_failure = truth(log[: resumed.failed_at])
            told = before + resumed.shown
            assert at_failure.broken or told != at_failure.standing[: len(told)]


@settings(max_examples=200)
@given(_logs, st.integers(0, 26))
def test_who_is_live_and_reads_again_from_the_start_is_shown_what_follows_what_it_has(
    log: list[Said], joined: int
) -> None:
    """A door sends a reader further back that began behind the beginning of its stream."""
    for after in Reader(log, min(joined, len(log))).read().shown:
        again, resumed = Reader(log, 0, after).read(), Reader(log, after + 1, after).read()
        assert (again.shown, again.ended) == (resumed.shown, resumed.ended)
        assert type(again.error) is type(resumed.error)


@settings(max_examples=400)
@given(_logs, st.integers(0, 26), st.data())
def test_who_resumes_where_the_beginning_is_gone_is_shown_the_rest_or_told(
    log: list[Said], joined: int, data: st.DataObject
) -> None:
    first = Reader(log, min(joined, len(log))).read()
    for number, after in enumerate(first.shown, start=1):
        since = data.draw(st.integers(0, after))
        resumed = Reader(log, data.draw(st.integers(since, len(log))), after, since).read()
        told = first.shown[:number] + resumed.shown
        if resumed.shown:
            assert told == truth(log[: resumed.shown_at[-1]]).standing
        if resumed.ended:
            assert told == truth(log).standing


@settings(max_examples=200)
@given(_logs)
def test_a_stream_ends_once_for_everybody(log: list[Said]) -> None:
    state, ends = StreamState(), 0
    for said in log:
        state, heard = fold(state, said)
        ends += isinstance(heard, Ended)
    assert ends <= 1
    assert (state.status is not None) == truth(log).over


@settings(max_examples=200)
@given(_over, st.integers(0, 30))
def test_whoever_joins_at_any_time_is_told_the_same_outcome(log: list[Said], joined: int) -> None:
    late, reader = Reader(log, len(log)).read(), Reader(log, min(joined, len(log))).read()
    assert late.error or reader.error or reader.outcome == late.outcome


@settings(max_examples=200)
@given(_logs)
def test_what_is_said_twice_in_a_row_is_heard_once(log: list[Said]) -> None:
    once, twice = Assembly(), Assembly()
    for offset, said in enumerate(log):
        once.hear(offset, said)
        twice.hear(2 * offset, said)
        twice.hear(2 * offset + 1, said)
    assert [said.chunk for said in once.standing] == [said.chunk for said in twice.standing]
    assert once.state == twice.state


def _told(*steps: tuple[object, ...]) -> list[Said]:
    return _written([("open", 0, "restart", 1), *steps])


SPEAK = ("speak", -1, 0)


def test_a_retraction_that_is_repeated_does_not_disturb_a_reader_who_has_nothing_of_it() -> None:
    log = _told(SPEAK, SPEAK, SPEAK, ("retract", 1), ("retract", 1))
    assert Reader(log, len(log) - 1).read().error is None


def test_a_reader_is_told_when_the_last_delta_it_has_is_retracted() -> None:
    log = _told(SPEAK, SPEAK, ("retract", 1))
    assert isinstance(Reader(log, 0).read().error, Superseded)
    assert isinstance(Reader(log, len(log), after=2).read().error, Superseded)


def test_a_reader_of_what_still_stands_goes_on_after_a_retraction() -> None:
    log = _told(SPEAK, SPEAK, ("retract", 1), SPEAK)
    assert Reader(log, len(log), after=1).read().shown == [4]


def test_a_retraction_takes_back_nothing_of_the_attempt_that_is_continued() -> None:
    log = _told(SPEAK, SPEAK, ("open", 1, "continue", 1), SPEAK, ("retract", 0))
    assert Reader(log, len(log)).read().shown == [1, 2]


def test_what_a_superseded_attempt_says_late_is_shown_to_nobody() -> None:
    log = _told(SPEAK, ("open", 1, "restart", 1), ("speak", 0, 0), SPEAK, ("end", 0, 0), ("end", 1, 0))
    reader = Reader(log, len(log)).read()
    assert (reader.shown, reader.ended) == ([4], True)


def test_of_two_openings_with_one_number_the_first_counts() -> None:
    log = _told(("open", 1, "restart", 0), ("speak", 0, 0), ("speak", 1, 0))
    assert Reader(log, len(log)).read().shown == [2]


def test_nothing_is_shown_after_a_cancel_not_even_the_end_that_follows_it() -> None:
    log = _told(SPEAK, ("cancel",), SPEAK, ("end", -1, 0))
    for joined in range(len(log) + 1):
        reader = Reader(log, joined).read()
        assert (reader.shown, reader.ended) == ([1], True)
