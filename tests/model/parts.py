"""What the small model is made of: production's own deciders, fold and readers, each of which a test may plant wrongly.

`Parts()` is what klatch does. `tests/model/planted.py` has variants with one thing wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from klatch_schemas import assembly
from klatch_schemas.assembly import Ended, Heard, ReplyReader, Said, Standing, StreamState


class Broken(AssertionError):
    """A promise does not hold in a state that can be reached."""


class Saved(NamedTuple):
    """The snapshot of the conversation's partition (`generation.state`)."""

    applied: int = 0
    """All before this offset of chat.admitted is concluded."""
    floor: int = 0
    """The first offset of chat.stream that a successor needs."""
    seen: int = -1
    """The last request, by offset on chat.requests, whose admission was taken before `applied`."""


Fold = Callable[[StreamState, Said], tuple[StreamState, Heard]]


class Reader(Protocol):
    """A reader of one stream, as `ReplyReader` is."""

    def go_live(self) -> Sequence[Standing | Ended]: ...

    def hear(self, offset: int, said: Said) -> Standing | Ended | None: ...


def _writer(owner: int, request: int, attempt: int) -> str:
    return f"owner{owner}.{request}.{attempt}"


def _next_attempt(state: StreamState) -> int:
    return state.attempt + 1


def _may_speak(attempt: int, has_read_its_opening: bool) -> bool:
    return attempt == 1 or has_read_its_opening


def _settlement(_: int, cause: int) -> str:
    return f"{cause}/0"


def _may_commit(concluded: int, _: int) -> int:
    return concluded


@dataclass(frozen=True)
class Parts:
    """One function for each thing that a bug may be planted in."""

    fold: Fold = assembly.fold
    reader: Callable[[int | None], Reader] = ReplyReader
    writer: Callable[[int, int, int], str] = _writer
    """The name that an owner signs an attempt of a request with."""
    next_attempt: Callable[[StreamState], int] = _next_attempt
    may_speak: Callable[[int, bool], bool] = _may_speak
    """Whether an attempt, whose opening may have been read back, may call the model."""
    settlement: Callable[[int, int], str] = _settlement
    """The id of an owner's settlement of the request at an offset of chat.admitted."""
    may_commit: Callable[[int, int], int] = _may_commit
    """The offset to commit, of those concluded and taken."""
