"""What becomes of an admitted request: the policy of generation, apart from everything it needs.

`lifecycle` is a plain generator: it yields a command, is sent the report, and never touches a clock, a model or the
log. Its only memory is the stream itself, so a successor that folds the same stream goes on where a dead owner
stopped. Every path leads to a `stream.end` that was read back, and then to `Conclude`, which may be repeated.

        Queue ──► Due ──► Prepare ──► Ready ──► Speak ──► Spoken ──► End ──► Ended ──► Conclude
          ▲ │                │          │         │ ▲                  ▲
          │ │                │          └ block ──┼─┼──────────────────┤
          │ ├ Busy ──────────┼────────────────────┼─┼──────────────────┤
          │ ├ Cancelled, Expired (also of Prepare, Speak, Pause) ──────┤
          │ │                └ Broken ────────────┼─┼──────────────────┤
          │ │                                     ├ Broken for good ───┘
          │ │                                     ├ Broken ──► Pause ──► Rested ──► Speak, the same attempt if it
          │ │                                     │                                 said nothing, else the next
          │ └ Ended ──► Conclude                  └ Superseded ──► Watch ──► Ended ──► Conclude
          └───────────────────────────────────────────────────────── Stalled
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, assert_never

from klatch_schemas.assembly import StreamState
from klatch_schemas.errors import Blocked, Expired
from klatch_schemas.errors import Busy as BusyError
from klatch_schemas.events import Decision, IfBusy, Status, StreamError

TRIES: Final = 3
"""How often one owner asks the model for one request, if the failures are such that another try may mend them."""

# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queue:
    """Wait until the conversation's earlier requests are concluded, or do at once what `if_busy` says."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Wait for the verdict; meanwhile recall, and render the prompt."""


@dataclass(frozen=True, slots=True)
class Speak:
    """Stream the model's answer into an attempt: the present one if it is ours and said nothing, else the next.

    A first attempt need not wait to start the model; any other waits until it has read its own opening back.
    """


@dataclass(frozen=True, slots=True)
class Pause:
    """Leave the model alone for a while, longer after each failure."""

    failures: int


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


Command = Queue | Prepare | Speak | Pause | Watch | End | Conclude

# --- reports -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Due:
    """It is the request's turn in its conversation."""


@dataclass(frozen=True, slots=True)
class Busy:
    """The conversation is busy, and the request is not to wait."""


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
    """Preparing or speaking failed."""

    error: StreamError
    again: bool = False
    """Whether another try may end well."""


@dataclass(frozen=True, slots=True)
class Rested:
    """The pause is over."""


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


Report = Due | Busy | Ready | Spoken | Broken | Rested | Interrupted | Stalled | Ended
Lifecycle = Generator[Command, Report, None]


def lifecycle(tries: int = TRIES) -> Lifecycle:
    """Bring a request's stream, however far it has come, to its end, and conclude."""
    failures = 0
    report = yield Queue()
    while (command := _next(report, failures, tries)) is not None:
        if isinstance(command, Pause):
            failures = command.failures
        report = yield command
    yield Conclude()


def _next(report: Report, failures: int, tries: int) -> Command | None:
    match report:
        case Due():
            return Prepare()
        case Busy():
            return End("rejected", _BUSY)
        case Ready(decision="block" | "escalate", categories=categories):
            return End("blocked", _blocked(categories))
        case Ready() | Rested():
            return Speak()
        case Stalled():
            # It may have been watched while others were still before it.
            return Queue()
        case Spoken():
            return End("completed")
        case Broken():
            return _after_failure(report, failures + 1, tries)
        case Interrupted(by):
            return _after(by)
        case Ended():
            return None


def _after_failure(broken: Broken, failures: int, tries: int) -> Command:
    if broken.again and failures < tries:
        return Pause(failures)
    return End(_ENDINGS.get(broken.error.code, "failed"), broken.error)


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


_ENDINGS: Final[Mapping[str, Status]] = {Blocked.code: "blocked", Expired.code: "expired"}
"""What a failure is that is none of the model's: its vendor's filter refused the prompt, or the time was up."""

# --- when the conversation is busy -------------------------------------------------------------------------------

WhenBusy = Literal["wait", "reject", "cancel", "undo"]
"""Wait for the earlier requests; end `rejected`; or cancel them, and forget their turns with `undo`."""


def when_met(if_busy: IfBusy, own: StreamState, busy: bool) -> WhenBusy:
    """What a request does when its owner meets it; `busy`: an earlier one of its conversation has not ended.

    Decided by what the log says, so that an owner that meets it again, or two at once, come to the same: a stream that
    has begun or ended was decided about before, and an earlier request that has ended, for whatever reason, is not
    busy any more.
    """
    if not busy or own.attempt or own.status is not None:
        return "wait"
    match if_busy:
        case "enqueue":
            return "wait"
        case "reject":
            return "reject"
        case "interrupt":
            return "cancel"
        case "rollback":
            return "undo"
    assert_never(if_busy)


_BUSY: Final = StreamError(
    code=BusyError.code,
    message="an earlier request of this conversation is not finished, and this one was not to wait: "
    "send it again later, or with another if_busy",
)
_EXPIRED: Final = StreamError(
    code="deadline_exceeded", message="the request's deadline passed before its reply was complete"
)


def _blocked(categories: tuple[str, ...]) -> StreamError:
    named = ", ".join(categories) or "its policy"
    return StreamError(code="content_filter", message=f"the request was refused by trust: {named}")
