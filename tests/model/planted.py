"""The bugs that the small model must find: parts of klatch with one thing wrong, and bounds that show it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from tests.model.parts import Fold, Parts
from tests.model.world import Bounds

from klatch_schemas import assembly
from klatch_schemas.assembly import Ended, Heard, Opened, Said, Spoke, Standing, StreamState
from klatch_schemas.codec import Delta
from klatch_schemas.errors import StreamBroken, Superseded
from klatch_schemas.events import StreamAttempt, StreamCancel, StreamEnd


@dataclass
class FoldingReader:
    """A reader that shows what a fold says, and no more: production's can only use production's fold."""

    fold: Fold
    after: int | None
    state: StreamState = StreamState()
    standing: list[Standing] = field(default_factory=list[Standing])
    end: StreamEnd | None = None
    live: bool = False
    voided: bool = False

    def go_live(self) -> Sequence[Standing | Ended]:
        self.live = True
        offsets = [said.offset for said in self.standing]
        if self.voided and self.after is not None and self.after not in offsets:
            raise Superseded("begin anew")
        shown: list[Standing | Ended] = [said for said in self.standing if said.offset > (self.after or -1)]
        return [*shown, Ended(self.state.status, self.end)] if self.state.status else shown

    def hear(self, offset: int, said: Said) -> Standing | Ended | None:
        self.state, heard = self.fold(self.state, said)
        match heard:
            case Spoke():
                standing = Standing(offset, self.state.attempt, heard.seq, heard.chunk)
                self.standing.append(standing)
                return standing if self.live else None
            case Opened(mode="restart"):
                if self.standing and self.live:
                    raise Superseded("begin anew")
                self.voided = self.voided or bool(self.standing)
                self.standing = []
            case Ended():
                self.end = heard.end
                return heard if self.live else None
            case assembly.Gap():
                raise StreamBroken("a hole")
            case _:
                pass
        return None


def folded_by(fold: Fold) -> Parts:
    """klatch with another fold, in its readers too."""
    return Parts(fold=fold, reader=lambda after: FoldingReader(fold, after))


# --- the bugs ---------------------------------------------------------------------------------------------------------


def _without_supersede(state: StreamState, said: Said) -> tuple[StreamState, Heard]:
    """Whoever's delta has the next `seq` counts."""
    if isinstance(said, Delta) and state.attempt:
        said = msgspec.structs.replace(said, attempt=state.attempt, writer=state.writer)
    return assembly.fold(state, said)


def _last_opening_wins(state: StreamState, said: Said) -> tuple[StreamState, Heard]:
    """Of two openings with the same number the second counts."""
    if isinstance(said, StreamAttempt) and said.attempt == state.attempt and state.status is None:
        return StreamState(said.attempt, said.writer), Opened(said.attempt, said.writer, said.mode)
    return assembly.fold(state, said)


def _last_end_wins(state: StreamState, said: Said) -> tuple[StreamState, Heard]:
    if isinstance(said, StreamEnd) and state.status is not None and said.status != state.status:
        return msgspec.structs.replace(state, status=said.status, settled=True), Ended(said.status, said)
    return assembly.fold(state, said)


def _cancel_always_wins(state: StreamState, said: Said) -> tuple[StreamState, Heard]:
    if isinstance(said, StreamCancel) and state.status not in {None, "cancelled"}:
        return msgspec.structs.replace(state, status="cancelled"), Ended("cancelled", None)
    return assembly.fold(state, said)


def _named_after_the_process(_: int, request: int, __: int) -> str:
    """The partition comes back to a process that owned it before, while that one's writes are on their way."""
    return f"process.{request}"


def _the_same_attempt_again(state: StreamState) -> int:
    return max(state.attempt, 1)


def _speaks_before_it_reads(_: int, __: bool) -> bool:
    return True


def _settled_by_whoever(owner: int, offset: int) -> str:
    return f"{owner}/{offset}/0"


def _commits_what_it_took(_: int, taken: int) -> int:
    return taken


PLANTED: dict[str, tuple[Parts, Bounds]] = {
    "the fold knows no supersede": (folded_by(_without_supersede), Bounds(takeovers=1)),
    "the last opening of a number wins": (folded_by(_last_opening_wins), Bounds(takeovers=1)),
    "the last end wins": (folded_by(_last_end_wins), Bounds(cancels=1)),
    "a cancel wins over an end": (folded_by(_cancel_always_wins), Bounds(cancels=1)),
    "writers are named after the process": (Parts(writer=_named_after_the_process), Bounds(takeovers=1)),
    "a successor uses the attempt's number again": (
        Parts(next_attempt=_the_same_attempt_again),
        Bounds(chunks=1, takeovers=1),
    ),
    "an opening is not read back before a restart": (
        Parts(may_speak=_speaks_before_it_reads),
        Bounds(chunks=1, takeovers=1, cancels=1),
    ),
    "an opening is not read back before it continues": (
        Parts(may_speak=_speaks_before_it_reads),
        Bounds(takeovers=1, continues=True),
    ),
    "settlements are named after their owner": (Parts(settlement=_settled_by_whoever), Bounds(chunks=1, takeovers=1)),
    "the offset is committed before the effects": (
        Parts(may_commit=_commits_what_it_took),
        Bounds(chunks=1, takeovers=1),
    ),
}
