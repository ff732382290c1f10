"""What becomes of an admitted request: the policy of generation, apart from everything it needs.

`lifecycle` is a plain generator: it yields a command, is sent the report, and never touches a clock, a model or the
log. Its only memory is the stream itself, so a successor that folds the same stream goes on where a dead owner
stopped. Every path leads to a `stream.end` that was read back, and then to `Conclude`, which may be repeated.

        Prepare ──► Ready ──► Speak ──► Spoken ──► End ──► Ended ──► Conclude
           │          │         │                   ▲
           │          └ block ──┼───────────────────┤
           ├ Cancelled, Expired ┼───────────────────┤
           └ Broken ────────────┤                   │
                                ├─ Broken ──────────┘
                                └─ Superseded ──► Watch ──► Stalled ──► Speak, the next attempt
                                                    └─────► Ended
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from klatch_schemas.assembly import StreamState
from klatch_schemas.events import Decision, Status, StreamError

# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    """Wait for the verdict; meanwhile recall, and render the prompt."""


@dataclass(frozen=True, slots=True)
class Speak:
    """Open the next attempt and stream the model's answer into it.

    A first attempt need not wait to start the model; any other waits until it has read its own opening back.
    """


@dataclass(frozen=True, slots=True)
class Watch:
    """Somebody else's attempt is in force: follow it until it ends, or says nothing for too long."""


@dataclass(frozen=True, slots=True)
class End:
    """Write a `stream.end` for the attempt in force, and read it back."""

    status: Status
    error: StreamError | None = None


@dataclass(frozen=True, slots=True)
class Conclude:
    """The stream has ended, as the log tells: settle the usage, append the turn. Repeating it changes nothing."""


Command = Prepare | Speak | Watch | End | Conclude

# --- reports -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The verdict has come and the prompt is rendered."""

    decision: Decision
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Spoken:
    """The model's answer is complete and its deltas stand in the log."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Preparing or speaking failed for good."""

    error: StreamError


Interruption = Literal["cancelled", "expired", "superseded", "ended"]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The command was left, because of what the log or the clock said meanwhile."""

    by: Interruption


@dataclass(frozen=True, slots=True)
class Stalled:
    """The attempt that was watched says nothing any more."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The log holds the end."""


Report = Ready | Spoken | Broken | Interrupted | Stalled | Ended
Lifecycle = Generator[Command, Report, None]


def lifecycle(state: StreamState) -> Lifecycle:
    """Bring the stream that stands at `state` to its end, and conclude."""
    if state.status is None:
        yield from _to_its_end((yield Prepare()))
    elif not state.settled:
        yield from _to_its_end(Interrupted("cancelled"))
    yield Conclude()


def _to_its_end(report: Report) -> Lifecycle:
    while (command := _next(report)) is not None:
        report = yield command


def _next(report: Report) -> Command | None:
    match report:
        case Ready(decision="block" | "escalate", categories=categories):
            return End("blocked", _blocked(categories))
        case Ready() | Stalled():
            return Speak()
        case Spoken():
            return End("completed")
        case Broken(error):
            return End("failed", error)
        case Interrupted(by):
            return _after(by)
        case Ended():
            return None


def _after(interruption: Interruption) -> Command | None:
    match interruption:
        case "cancelled":
            return End("cancelled")
        case "expired":
            return End("expired", _EXPIRED)
        case "superseded":
            return Watch()
        case "ended":
            return None


_EXPIRED = StreamError(code="deadline_exceeded", message="the request's deadline passed before its reply was complete")


def _blocked(categories: tuple[str, ...]) -> StreamError:
    named = ", ".join(categories) or "its policy"
    return StreamError(code="content_filter", message=f"the request was refused by trust: {named}")
