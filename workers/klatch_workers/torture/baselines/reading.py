"""How consumers read what a baseline says, told in the words of klatch's stream log, so that one judge reads both.

`Usual` is how streaming over Kafka is commonly read: text is appended as it arrives, until the record that says that
the reply is done. `Careful` reads the same records as a consumer may that was written with redelivery in mind: a
delivery that was not seen before begins the reply anew, what an earlier delivery still says is dropped, and a record
that comes twice counts once. Both stop at the first end that they accept.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import msgspec

from klatch_schemas import codec
from klatch_schemas.assembly import Said
from klatch_schemas.codec import Delta
from klatch_schemas.events import StreamAttempt, StreamEnd
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Record

_NOBODY = Tenant("baseline")
_USUAL = Writer("whoever")


class Line(msgspec.Struct, frozen=True):
    """One record, as `protocol` writes it."""

    request: Annotated[str, msgspec.Meta(min_length=1)]
    delivery: Annotated[str, msgspec.Meta(min_length=1)]
    seq: Annotated[int, msgspec.Meta(ge=0)]
    text: str = ""
    done: bool = False


_line_of = msgspec.json.Decoder(Line).decode
"""Raises DecodeError."""


class _Place(NamedTuple):
    request: RequestId
    conversation: Conversation


@dataclass(slots=True)
class Usual:
    """One reply as it is usually read."""

    heard: int = 0

    def hear(self, place: _Place, line: Line) -> Sequence[Said]:
        """What a record means."""
        opened = [] if self.heard else [_opening(place, 1, _USUAL)]
        if line.done:
            return [*opened, _end(place, 1, _USUAL, self.heard)]
        self.heard += 1
        return [*opened, _delta(place, 1, _USUAL, self.heard - 1, line.text)]


@dataclass(slots=True)
class Careful:
    """One reply as a careful consumer reads it."""

    deliveries: dict[str, int] = field(default_factory=dict[str, int])
    """By the order in which each was first seen: the last one counts."""

    def hear(self, place: _Place, line: Line) -> Sequence[Said]:
        """What a record means."""
        known = line.delivery in self.deliveries
        attempt = self.deliveries.setdefault(line.delivery, len(self.deliveries) + 1)
        opened = [] if known else [_opening(place, attempt, Writer(line.delivery))]
        if line.done:
            return [*opened, _end(place, attempt, Writer(line.delivery), line.seq)]
        return [*opened, _delta(place, attempt, Writer(line.delivery), line.seq, line.text)]


def reading(reader: Callable[[], Usual | Careful]) -> Callable[[Record], Sequence[Said]]:
    """A reader of the stream topic, to be given every record once, in log order within a partition."""
    replies = defaultdict[str, Usual | Careful](reader)

    def read(record: Record) -> Sequence[Said]:
        try:
            line = _line_of(record.value or b"")
        except msgspec.DecodeError:
            return []
        place = _Place(RequestId(line.request), Conversation((record.key or b"").decode(errors="replace") or "none"))
        return replies[line.request].hear(place, line)

    return read


def _opening(place: _Place, attempt: int, writer: Writer) -> StreamAttempt:
    return StreamAttempt(
        request=place.request, tenant=_NOBODY, conversation=place.conversation, attempt=attempt, writer=writer
    )


def _delta(place: _Place, attempt: int, writer: Writer, seq: int, text: str) -> Delta:
    chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
    return Delta(place.request, attempt, writer, seq, msgspec.Raw(chunk))


def _end(place: _Place, attempt: int, writer: Writer, seq: int) -> StreamEnd:
    return StreamEnd(
        request=place.request,
        tenant=_NOBODY,
        conversation=place.conversation,
        attempt=attempt,
        writer=writer,
        seq=seq,
        status="completed",
    )
