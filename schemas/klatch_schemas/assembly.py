"""The assembly rule: which records of a stream count, for every reader alike.

`fold` is the contract. It is pure and total: whatever stands in the log, in whatever order writers (zombies among
them) put it there, every reader reaches the same text and the same end. `Assembly` keeps the text that stands, and
`ReplyReader` adds what one reader, live or resumed, may be shown: text of one lineage of attempts, or an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from klatch_schemas.codec import Delta
from klatch_schemas.errors import InvalidRequest, KlatchError, StreamBroken, Superseded
from klatch_schemas.events import (
    Event,
    Status,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
    StreamError,
    StreamRetract,
)

Said = Event | Delta
"""What may stand in `chat.stream`."""

LAST = 16
"""In so many last chunks the name of their reply is found: behind it may come 15 without one, Azure's annotations."""


class StreamState(msgspec.Struct, frozen=True, gc=False):
    """How far one stream has come."""

    attempt: int = 0
    """The attempt in force; 0 before any."""
    writer: str = ""
    """Who opened it."""
    next_seq: int = 0
    """The `seq` that its next delta must have."""
    status: Status | None = None
    """How the stream ended, once it has."""
    settled: bool = False
    """Whether a `stream.end` has been accepted: after a cancel it follows the end."""
    undone: bool = False
    """Whether the cancel that ended it took the turn back: the text stands for its readers, and nobody remembers it."""


class Opened(msgspec.Struct, frozen=True, gc=False):
    """An attempt took over."""

    attempt: int
    writer: str
    mode: Literal["restart", "continue"]


class Spoke(msgspec.Struct, frozen=True, gc=False):
    """A delta that counts."""

    seq: int
    chunk: msgspec.Raw
    deployment: str = ""


class Retracted(msgspec.Struct, frozen=True, gc=False):
    """The deltas of this attempt from `from_seq` on are taken back."""

    from_seq: int


class Ended(msgspec.Struct, frozen=True, gc=False):
    """The stream is over: by a `stream.end`, or by a cancel that came first."""

    status: Status
    end: StreamEnd | None
    """The end that counts, or the one that followed a cancel, if it has been heard: it tells the usage."""

    @property
    def error(self) -> StreamError | None:
        """Why it was not completed. Not what an end says that a cancel came before: it meant another outcome."""
        return self.end.error if self.end and self.end.status == self.status else None


class Settled(msgspec.Struct, frozen=True, gc=False):
    """The `stream.end` that follows a cancel: changes nothing, tells the usage."""

    end: StreamEnd


class Gap(msgspec.Struct, frozen=True, gc=False):
    """The log lacks deltas that were written before this record."""

    expected: int
    got: int


Heard = Opened | Spoke | Retracted | Ended | Settled | Gap | None
"""What a record meant; None: nothing (late, repeated, or somebody else's)."""


def fold(state: StreamState, said: Said) -> tuple[StreamState, Heard]:
    """Take one record of a stream into account."""
    match said:
        case Delta():
            return _delta(state, said)
        case StreamAttempt():
            return _attempt(state, said)
        case StreamEnd():
            return _end(state, said)
        case StreamCancel() if state.status is None:
            return msgspec.structs.replace(state, status="cancelled", undone=said.undo), Ended("cancelled", None)
        case StreamRetract() if state.status is None and said.from_seq < state.next_seq:
            return state, Retracted(said.from_seq)
        case _:
            return state, None


def _delta(state: StreamState, said: Delta) -> tuple[StreamState, Heard]:
    if state.status is not None or said.attempt != state.attempt or said.writer != state.writer:
        return state, None
    if said.seq == state.next_seq:
        return StreamState(state.attempt, state.writer, said.seq + 1), Spoke(said.seq, said.chunk, said.deployment)
    if said.seq < state.next_seq:
        return state, None
    return state, Gap(state.next_seq, said.seq)


def _attempt(state: StreamState, said: StreamAttempt) -> tuple[StreamState, Heard]:
    if state.status is not None or said.attempt <= state.attempt:
        return state, None
    return StreamState(said.attempt, said.writer), Opened(said.attempt, said.writer, said.mode)


def _end(state: StreamState, said: StreamEnd) -> tuple[StreamState, Heard]:
    if state.settled or said.attempt != state.attempt or (state.attempt and said.writer != state.writer):
        return state, None
    if state.status is not None:
        return msgspec.structs.replace(state, settled=True), Settled(said)
    ended = msgspec.structs.replace(state, status=said.status, settled=True)
    if said.seq > state.next_seq:
        return ended, Gap(state.next_seq, said.seq)
    return ended, Ended(said.status, said)


class Standing(msgspec.Struct, frozen=True, gc=False):
    """A delta whose text stands."""

    offset: int
    attempt: int
    seq: int
    chunk: msgspec.Raw
    deployment: str = ""
    """Which deployment speaks from here on, where that is told."""


@dataclass(slots=True)
class Assembly:
    """One stream as far as it was read: its state, and the text that stands."""

    state: StreamState = StreamState()
    standing: list[Standing] = field(default_factory=list[Standing])
    voided_before: int = 0
    """Deltas at lower offsets that do not stand were taken back by a restart or a retraction."""
    end: StreamEnd | None = None
    gap: Gap | None = None
    """Deltas that the attempt in force lacks."""

    def hear(self, offset: int, said: Said) -> Heard:
        """Fold the record at `offset`."""
        self.state, heard = fold(self.state, said)
        match heard:
            case Spoke(seq, chunk, deployment):
                self.standing.append(Standing(offset, self.state.attempt, seq, chunk, deployment))
            case Opened(mode="restart"):
                self.gap = None
                self._void(offset, keep=lambda _: False)
            case Retracted(from_seq):
                attempt = self.state.attempt
                self._void(offset, keep=lambda said: said.attempt != attempt or said.seq < from_seq)
            case Ended(end=end) | Settled(end):
                self.end = end
            case Gap():
                self.gap = self.gap or heard
            case _:
                pass
        return heard

    def _void(self, offset: int, keep: Callable[[Standing], bool]) -> None:
        kept = [said for said in self.standing if keep(said)]
        if len(kept) < len(self.standing):
            self.standing, self.voided_before = kept, offset


class ReplyReader:
    """What one reader of one stream is shown, in order: standing deltas, then the end.

    Feed it every record of the stream from its first on. Until `go_live` nothing is shown, so that a reader that
    comes late never sees text that a later attempt has already taken back.
    """

    def __init__(self, after: int | None = None, *, param: str = "after") -> None:
        """`after` is the offset of the last delta that a resuming reader has; `param` is what named it."""
        self._assembly = Assembly()
        self._has = -1 if after is None else after
        self._place = after if after is not None and after >= 0 else None
        """Where a reader resumes, until a record that counts was heard there: it is shown nothing before."""
        self._param = param
        self._begun_anew = False
        """Whether an attempt began anew behind that place."""
        self._last: Standing | None = None
        """The last delta that the reader has, which stands."""
        self._live = False
        self.had: Sequence[Standing] = ()
        """The last deltas that a resuming reader has, at most `LAST`; known once it is live."""
        self.deployment = ""
        """Which deployment made the last of them."""

    @property
    def state(self) -> StreamState:
        """How far the stream has come."""
        return self._assembly.state

    def go_live(self) -> Sequence[Standing | Ended]:
        """Show what stands beyond what the reader has. Raises Superseded, StreamBroken, InvalidRequest."""
        self._live = True
        past, self._assembly.standing = self._assembly.standing, []
        if 0 <= self._has < self._assembly.voided_before and self._has not in {said.offset for said in past}:
            raise _superseded()
        if self._assembly.gap:
            raise _broken(self._assembly.gap)
        shown: list[Standing | Ended] = [said for said in past if said.offset > self._has]
        had = [said for said in past if said.offset <= self._has]
        self.had = had[-LAST:]
        self.deployment = next((said.deployment for said in reversed(had) if said.deployment), "")
        if past:
            self._last = past[-1]
            self._has = max(self._has, past[-1].offset)
        if status := self.state.status:
            shown.append(Ended(status, self._assembly.end))
        if shown:
            self._check_place()
        return shown

    def hear(self, offset: int, said: Said) -> Standing | Ended | None:
        """Take the record at `offset`; returns what the reader is shown. Raises as `go_live`."""
        if not self._live:
            self._meet(offset, self._assembly.hear(offset, said))
            return None
        self._assembly.state, heard = fold(self._assembly.state, said)
        self._meet(offset, heard)
        match heard:
            case Spoke(seq, chunk, deployment):
                self._last = Standing(offset, self.state.attempt, seq, chunk, deployment)
                # Who reads again from further back is shown nothing twice.
                shown = self._last if offset > self._has else None
                self._has = max(self._has, offset)
                if shown:
                    self._check_place()
                return shown
            case Ended():
                self._check_place()
                return heard
            case _ if offset <= self._has:
                return None
            case Opened(mode="restart") if self._last or self._begun_anew:
                raise _superseded()
            case Retracted(from_seq) if self._last and self._takes_back(self._last, from_seq):
                raise _superseded()
            case Gap():
                raise _broken(heard)
            case _:
                return None

    def _meet(self, offset: int, heard: Heard) -> None:
        if self._place is None or heard is None:
            return
        if offset == self._place:
            self._place = None
        elif offset > self._place and isinstance(heard, Opened):
            self._begun_anew = self._begun_anew or (heard.mode == "restart" and heard.attempt > 1)

    def _check_place(self) -> None:
        """Who reads from behind an opening, or resumes where the stream has nothing, would join what never was one."""
        if self._place is not None:
            raise _superseded() if self._begun_anew else no_place(self._param)

    def _takes_back(self, said: Standing, from_seq: int) -> bool:
        return said.attempt == self.state.attempt and said.seq >= from_seq


def check_place(after: int, end: int, *, param: str) -> None:
    """Raise InvalidRequest for a place that a partition up to `end` does not hold: a reader that resumed there would
    be shown nothing of what comes before it, and be told of a whole reply."""
    if after >= end:
        raise no_place(param)


def no_place(param: str) -> KlatchError:
    """Why nobody resumes at a place where the stream has no event; `param` is what named it."""
    return InvalidRequest(
        f"{param} is the place of no event of this stream: leave it out to read from the beginning", param=param
    )


def _superseded() -> KlatchError:
    return Superseded("a newer attempt took back text that was already read; read the stream again from its start")


def _broken(gap: Gap) -> KlatchError:
    return StreamBroken(f"the log lacks deltas {gap.expected} to {gap.got - 1} of this reply; ask again")
