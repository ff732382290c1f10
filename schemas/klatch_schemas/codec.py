"""Between events and the bytes in the log: JSON values that an operator can read with kcat.

Reading never crashes a reader: what cannot be read raises `Unreadable` with a reason for the dead letter. A newer
version of a known kind is read as the newest version known here, if it still fits. Deltas take a short cut: their
chunk passes through as the bytes the model server sent.
"""

import json
import math
import re
from typing import Annotated, Any, Final, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from klatch_schemas.events import EVENTS, Event, Part, StreamDelta
from klatch_schemas.ids import derived_id
from klatch_schemas.records import Cause, Draft

E = TypeVar("E", bound=Event)

EVENT_ID: Final = "event-id"
KIND: Final = "kind"
TENANT: Final = "tenant"
CAUSE: Final = "cause"
TRACEPARENT: Final = "traceparent"
CONTENT_TYPE: Final = "content-type"
SEALED: Final = "sealed"
"""Names the key under which message text in the value is encrypted; no writer seals yet."""

_JSON: Final = (CONTENT_TYPE, b"application/json")
_DELTA_START: Final = b'{"kind":"stream.delta.v1"'
_DELTA_HEADERS: Final = ((KIND, StreamDelta.KIND.encode()),)
_MOST_PROBLEMS: Final = 5
_DEEPEST: Final = 6
_BRACE: Final = ord("{")
LOST: Final = "records.lost.v1"
"""The kind of what stands for records that nobody can unpack (`lost`)."""
_KNOWN: Final = {event.KIND: event for event in EVENTS}
_KIND_PATTERN: Final = re.compile(r"^(?P<name>[a-z_.]{1,80})\.v(?P<version>[0-9]{1,6})$")


def _field_names(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields)
    return names.union(*(_field_names(part) for part in model.__subclasses__()))


_FIELDS: Final = _field_names(Part)

# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace id, parent id, flags. Ids of zeros and version
# ff are invalid; versions after 00 may have more at the end.
_IDS: Final = "(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACE: Final = re.compile(f"00-{_IDS}|(?!00|ff)[0-9a-f]{{2}}-{_IDS}(?:-[!-~]{{1,200}})?")


class Unreadable(ValueError):
    """A value that is no event this reader can use; the message says why."""


_Attempt = Annotated[int, msgspec.Meta(ge=1)]
_Seq = Annotated[int, msgspec.Meta(ge=0)]


class Delta(msgspec.Struct, frozen=True, gc=False):
    """`StreamDelta` as the hot path knows it: `chunk` is the raw JSON of one `chat.completion.chunk`."""

    request: str
    # Attempt 0 is nobody's: a delta may never look as if it belonged to a stream that was not opened.
    attempt: _Attempt
    writer: str
    seq: _Seq
    chunk: msgspec.Raw
    deployment: str = ""


_REFUSED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a value that `loads` may still read, or else names the fault of."""


class _Kind(msgspec.Struct):
    kind: str


_read_delta: Final = msgspec.json.Decoder(Delta).decode
_read_kind: Final = msgspec.json.Decoder(_Kind).decode


def dumps(value: Any) -> bytes:
    """JSON bytes of plain Python data; lone surrogates stay escapes, as a model server may split a pair."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def loads(value: bytes) -> Any:
    """Plain Python data of JSON bytes; raises Unreadable."""
    try:
        return msgspec.json.decode(value)
    except _REFUSED:
        # msgspec refuses lone surrogates, which are legal in JSON text; whatever else is wrong, json refuses too.
        try:
            return json.loads(value, parse_constant=_refuse_constant, parse_float=_finite)
        except ValueError as error:
            raise Unreadable(f"the value is not JSON: {error}") from error
        except RecursionError as error:
            raise Unreadable("the value is nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        # It would be written again as null, or as no JSON at all.
        raise ValueError("a number is too large")
    return number


def encode(event: Event) -> bytes:
    """The record value of an event."""
    return dumps(event.model_dump(mode="python"))


def encode_delta(prefix: bytes, seq: int, chunk: bytes, deployment: str = "") -> bytes:
    """The record value of a delta; `prefix` comes from `delta_prefix`, `chunk` is one JSON object."""
    if deployment:
        return b'%b%d,"deployment":%b,"chunk":%b}' % (prefix, seq, msgspec.json.encode(deployment), chunk)
    return b'%b%d,"chunk":%b}' % (prefix, seq, chunk)


def delta_prefix(request: str, attempt: int, writer: str) -> bytes:
    """What all deltas of an opening begin with."""
    return b'%b,"request":%b,"attempt":%d,"writer":%b,"seq":' % (
        _DELTA_START,
        msgspec.json.encode(request),
        attempt,
        msgspec.json.encode(writer),
    )


def decode(value: bytes | None) -> Event | Delta:
    """Read one event; raises Unreadable. Deltas come as `Delta`, everything else as its model."""
    if value is None:
        raise Unreadable("the record has no value: a tombstone means nothing here")
    if value.startswith(_DELTA_START):
        return _decode_delta(value)
    kind = _kind_of(value)
    model = _model_of(kind)
    if model is StreamDelta:
        return _decode_delta(value)
    return _validate(model, kind, loads(value))


def lost(first: int, last: int, size: int, reason: str) -> bytes:
    """The value that stands for records whose batch, of `size` bytes, no reader can unpack: `Unreadable` to all."""
    return dumps({"kind": LOST, "first": first, "last": last, "bytes": size, "reason": reason})


def decode_as(model: type[E], value: bytes | None) -> E:
    """Read an event that must be of one kind; raises Unreadable."""
    event = decode(value)
    if not isinstance(event, model):
        raise Unreadable(f"expected {model.KIND}, got {event.KIND if isinstance(event, Event) else StreamDelta.KIND}")
    return event


def _decode_delta(value: bytes) -> Delta:
    try:
        # The decoder does not look into a raw chunk: what is no UTF-8 would be found by readers, too late.
        str(value, "utf-8")
        delta = _read_delta(value)
    except _REFUSED:
        delta = _decode_unusual_delta(loads(value))
    if memoryview(delta.chunk)[0] != _BRACE:
        raise Unreadable(f"not a {StreamDelta.KIND}: the chunk is not an object")
    return delta


def _decode_unusual_delta(fields: Any) -> Delta:
    try:
        delta = msgspec.convert({**fields, "chunk": None}, _DeltaFields)
        return Delta(
            delta.request,
            delta.attempt,
            delta.writer,
            delta.seq,
            msgspec.Raw(dumps(fields["chunk"])),
            delta.deployment,
        )
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise Unreadable(f"not a {StreamDelta.KIND}: {error}") from error


class _DeltaFields(msgspec.Struct):
    request: str
    attempt: _Attempt
    writer: str
    seq: _Seq
    deployment: str = ""


def _kind_of(value: bytes) -> str:
    try:
        return _read_kind(value).kind
    except _REFUSED:
        fields = loads(value)
    try:
        return msgspec.convert(fields, _Kind).kind
    except msgspec.ValidationError as error:
        raise Unreadable('the value has no "kind": add one, such as "chat.requested.v1"') from error


def _model_of(kind: str) -> type[Event]:
    if known := _KNOWN.get(kind):
        return known
    if kind == LOST:
        raise Unreadable("it stands for records that could not be unpacked; its value tells which, and why")
    match = _KIND_PATTERN.match(kind)
    older = [
        model
        for known, model in _KNOWN.items()
        if match and known.rsplit(".v", 1)[0] == match["name"] and _version(known) < int(match["version"])
    ]
    if not older:
        raise Unreadable(f"unknown kind {kind!r}" if match else "its kind is no name, such as chat.requested.v1")
    return max(older, key=lambda model: _version(model.KIND))


def _version(kind: str) -> int:
    return int(kind.rsplit(".v", 1)[1])


def _validate(model: type[E], kind: str, fields: Any) -> E:
    try:
        return model.model_validate({**fields, "kind": model.KIND}, extra="ignore")
    except ValidationError as error:
        raise Unreadable(f"not a {kind}: {explain(error, hide_names=True)}") from error


def explain(error: ValidationError, *, hide_names: bool = False) -> str:
    """A validation error as one line that names fields, and never repeats their values.

    With `hide_names`, names that are not the contract's own are `*`: in a body or a mapping they are the producer's,
    and may be anybody's text.
    """
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    said = [f"{_place(problem['loc'], hide_names)}: {problem['msg']}" for problem in problems[:_MOST_PROBLEMS]]
    more = len(problems) - len(said)
    return "; ".join([*said, f"and {more} more"] if more else said)


def _place(path: tuple[int | str, ...], hide_names: bool) -> str:
    steps = ["*" if hide_names and isinstance(step, str) and step not in _FIELDS else str(step) for step in path]
    return ".".join(steps[:_DEEPEST]) or "value"


def trace_of(said: bytes | str | None) -> str | None:
    """`said` if it is a W3C traceparent; whatever else a producer wrote there names no trace, and is left out."""
    text = said.decode("latin-1") if isinstance(said, bytes) else said
    return text if text and _TRACE.fullmatch(text) else None


def draft(
    topic: str,
    key: str,
    event: Event,
    *,
    cause: Cause | None = None,
    traceparent: bytes | str | None = None,
    partition: int | None = None,
) -> Draft:
    """An event ready to be written, with its headers; a `traceparent` that is none is left out.

    Its event id is derived from its cause; an event that enters from outside has none, and is its own.
    """
    value = encode(event)
    origin = str(cause) if cause else value.decode(errors="replace")
    headers = [
        (EVENT_ID, str(derived_id("event", event.KIND, origin)).encode()),
        (KIND, event.KIND.encode()),
        _JSON,
    ]
    if tenant := getattr(event, TENANT, None):
        headers.append((TENANT, str(tenant).encode()))
    if cause:
        headers.append((CAUSE, str(cause).encode()))
    if trace := trace_of(traceparent):
        headers.append((TRACEPARENT, trace.encode()))
    return Draft(topic, key.encode(), value, headers, partition)


def delta_draft(topic: str, key: bytes | None, partition: int | None, value: bytes) -> Draft:
    """A delta ready to be written. Its only header is its kind: its opening carries the rest."""
    return Draft(topic, key, value, _DELTA_HEADERS, partition)
