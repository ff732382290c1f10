"""How `klatch tail` shows what it reads: as text for a person, as objects for a program, or as it stands in the log.

For a person one stream is shown live at a time, and the others wait until it ends or pauses, since tokens of several
replies mixed together are nobody's text. What is shown follows the contract's assembly rule: of a stream whose
opening was not read, nothing can be said to stand.
"""

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import click

from klatch_schemas import codec
from klatch_schemas.assembly import Ended, Gap, Opened, Retracted, Settled, Spoke, StreamState, fold
from klatch_schemas.client import Shown
from klatch_schemas.codec import Delta
from klatch_schemas.errors import LogMoved
from klatch_schemas.events import StreamAttempt, StreamCancel, StreamEnd
from klatch_schemas.records import Record
from klatch_streams.log import OffsetGone
from klatch_workers.cli.context import say_json
from klatch_workers.cli.replies import StreamEvent

_PAUSE_MS: Final = 1_000
"""A stream that is silent for so long, in the log's time, gives way to one that speaks."""

_REMEMBERED: Final = 1_000
"""How many ended streams are known, lest the late word of one looks like a stream of its own."""

Said = StreamEvent | Delta


class View(Protocol):
    """Shows records in the order in which they are read."""

    def show(self, record: Record, said: Said) -> None:
        """A record of a stream that is followed."""
        ...

    def unreadable(self, record: Record, reason: str) -> None:
        """A record that no reader of this version can use."""
        ...

    def moved(self, gone: OffsetGone) -> None:
        """The log has moved past the reader: records in between are gone."""
        ...


def moved(gone: OffsetGone) -> str:
    """The log has moved past a reader, in words."""
    place = f"{gone.partition.topic}/{gone.partition.number}"
    return f"the log has moved on: {place} begins at {gone.first}, and {gone.offset} was next"


class RawView:
    """Record values, each on a line."""

    def show(self, record: Record, said: Said) -> None:  # noqa: ARG002 - see `View`
        """See `View`."""
        click.echo(record.value or b"")

    def unreadable(self, record: Record, reason: str) -> None:  # noqa: ARG002 - see `View`
        """See `View`."""
        click.echo(record.value or b"")

    def moved(self, gone: OffsetGone) -> None:
        """See `View`."""
        click.echo(moved(gone), err=True)


class JsonView:
    """Each record as an object: where it stands, its kind and its fields."""

    def show(self, record: Record, said: Said) -> None:
        """See `View`."""
        if isinstance(said, Delta):
            chunk: Any = codec.loads(bytes(said.chunk))
            fields = {"request": said.request, "attempt": said.attempt, "writer": said.writer, "seq": said.seq}
            say_json({**_place(record), "kind": "stream.delta.v1", **fields, "chunk": chunk})
        else:
            say_json({**_place(record), **said.model_dump(mode="json")})

    def unreadable(self, record: Record, reason: str) -> None:
        """See `View`."""
        say_json({**_place(record), "unreadable": reason})

    def moved(self, gone: OffsetGone) -> None:
        """See `View`."""
        where = {"partition": gone.partition.number, "offset": gone.offset, "first": gone.first}
        say_json({"error": moved(gone), "code": LogMoved.code, **where})


def _place(record: Record) -> dict[str, Any]:
    return {"partition": record.partition.number, "offset": record.offset, "timestamp_ms": record.timestamp_ms}


@dataclass(slots=True)
class _Stream:
    request: str
    conversation: str
    state: StreamState = field(default_factory=StreamState)
    unshown: list[str] = field(default_factory=list[str])
    """What waits for its turn."""
    spoke_ms: int = 0
    headed: bool = False


class TextView:
    """Text as it is put together, under the id of its request."""

    def __init__(self) -> None:
        self._streams = dict[str, _Stream]()
        self._ended = deque[str](maxlen=_REMEMBERED)
        self._live: _Stream | None = None
        self._column = 0

    def show(self, record: Record, said: Said) -> None:
        """See `View`."""
        stream = self._stream(said)
        if stream is None:
            return
        stream.state, heard = fold(stream.state, said)
        match heard:
            case Spoke(_, chunk):
                self._speak(stream, Shown(record.offset, codec.loads(bytes(chunk))).text, record.timestamp_ms)
            case Opened(attempt, _, mode) if attempt > 1:
                self._speak(stream, _note(f"\n── attempt {attempt}: {_MODES[mode]}\n"), record.timestamp_ms)
            case Retracted(from_seq):
                self._speak(stream, _note(f"\n── taken back from delta {from_seq} on\n"), record.timestamp_ms)
            case Gap(expected, got):
                self._speak(stream, _note(f"\n── deltas {expected} to {got - 1} are missing\n"), record.timestamp_ms)
                if stream.state.status:
                    self._end(stream, stream.state.status, None)
            case Ended(status, end):
                self._end(stream, status, end)
            case Settled() | Opened() | None:
                pass

    def unreadable(self, record: Record, reason: str) -> None:
        """See `View`."""
        place = f"{record.partition.topic}/{record.partition.number} @{record.offset}"
        click.echo(f"{place} cannot be read: {reason}", err=True)

    def moved(self, gone: OffsetGone) -> None:
        """See `View`."""
        click.echo(moved(gone), err=True)

    def _stream(self, said: Said) -> _Stream | None:
        """The stream that `said` belongs to; None of one whose opening was not read."""
        if isinstance(said, Delta) or said.request in self._streams:
            return self._streams.get(said.request)
        # A stream begins with an opening, or is refused or cancelled before it has one.
        begins = isinstance(said, StreamAttempt | StreamCancel) or (isinstance(said, StreamEnd) and not said.attempt)
        if not begins or said.request in self._ended:
            return None
        stream = self._streams[said.request] = _Stream(said.request, said.conversation)
        return stream

    def _speak(self, stream: _Stream, text: str, now_ms: int) -> None:
        live = self._live
        if live is not stream and (live is None or now_ms - live.spoke_ms > _PAUSE_MS):
            self._turn_to(stream)
        stream.spoke_ms = now_ms
        if self._live is stream:
            self._write(text)
        else:
            stream.unshown.append(text)

    def _turn_to(self, stream: _Stream) -> None:
        self._new_line()
        self._write(_note(f"── {stream.request}  {stream.conversation}{'  (goes on)' if stream.headed else ''}\n"))
        stream.headed, self._live = True, stream
        self._write("".join(stream.unshown))
        stream.unshown.clear()

    def _end(self, stream: _Stream, status: str, end: StreamEnd | None) -> None:
        if self._live is not stream:
            self._turn_to(stream)
        self._new_line()
        color = "green" if status == "completed" else "yellow" if status == "cancelled" else "red"
        tokens = f", {end.usage.completion_tokens} tokens" if end and end.usage else ""
        why = f": {end.error.message}" if end and end.error else ""
        self._write(click.style(f"── {status}", fg=color) + _note(f"{tokens}{why}\n"))
        del self._streams[stream.request]
        self._ended.append(stream.request)
        waiting = [one for one in self._streams.values() if one.unshown]
        self._live = None
        if waiting:
            self._turn_to(min(waiting, key=lambda one: one.spoke_ms))

    def _new_line(self) -> None:
        if self._column:
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            click.echo(text, nl=False)
            sys.stdout.flush()
            last = click.unstyle(text).rpartition("\n")[2]
            self._column = len(last) if "\n" in text else self._column + len(last)


_MODES: Final = {"restart": "what was said before is void", "continue": "goes on"}


def _note(text: str) -> str:
    return click.style(text, dim=True)
