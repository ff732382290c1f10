"""What a gateway reads from a chunk beside passing its bytes on.

The raw bytes travel, and whatever is passed on can be read in the log. A chunk whose members are all known is read,
and thereby looked through to its last number, in less than a microsecond. Any other (a member that is not named here,
a list as content, a lone surrogate, which msgspec refuses) takes two more, or the standard library where need be. What
the log could not hold is put right: bytes that are no UTF-8, and numbers that are none; and a usage that is no count of
tokens is null. What is no JSON object at all is a ValueError.
"""

import json
import math
from typing import cast

import msgspec

from klatch_agents.gateway.amend import without_usage
from klatch_agents.gateway.errors import ErrorBody
from klatch_agents.gateway.port import Chunk, Usage
from klatch_schemas import codec

_ABSENT = msgspec.Raw(b"")
_SAYING_NOTHING = frozenset({b"", b"null", b"[]", b"{}", b'""'})
_LONGEST_NOTHING = len(b"null")
_ONLY_CHOICE_0 = (0,)
_MOST = 2**53
"""Tokens: what every reader of JSON has as a whole number."""
_NAMING = frozenset({"role", "name", "id", "type", "index"})
"""Members of a delta that say nothing."""
_Members = dict[str, object]
_List = list[object]
_REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


# At a member that a struct does not name nothing would look, and the log must hold no number past all bounds: what has
# others is refused here, and read slowly. Those named are OpenAI's, Azure's, vLLM's, SGLang's and OpenRouter's.
class _Delta(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: object = None
    function_call: object = None
    audio: object = None
    annotations: object = None
    reasoning_details: object = None


class _Token(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    token: str
    logprob: float | None = None
    bytes: list[int] | None = None
    top_logprobs: "list[_Token] | None" = None


class _Logprobs(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    content: list[_Token] | None = None
    refusal: list[_Token] | None = None


class _Choice(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    stop_reason: object = None
    matched_stop: object = None
    token_ids: object = None
    native_finish_reason: str | None = None
    content_filter_results: object = None
    content_filter_offsets: object = None


class _Wire(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _ABSENT
    error: object = None
    object: str | None = None
    id: str | None = None
    created: int | float | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    obfuscation: str | None = None
    provider: str | None = None
    prompt_token_ids: "list[int] | None" = None


_NAMED = frozenset(_Wire.__struct_fields__)


class _UsageOf(msgspec.Struct):
    usage: msgspec.Raw


class _EmbeddingsWire(msgspec.Struct):
    data: list[msgspec.Raw]
    error: msgspec.Raw = _ABSENT


class _UsageWire(msgspec.Struct):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    total_tokens: object = None
    prompt_tokens_details: object = None
    completion_tokens_details: object = None


_decode = msgspec.json.Decoder(_Wire).decode
_decode_any = msgspec.json.Decoder().decode
_decode_embeddings = msgspec.json.Decoder(_EmbeddingsWire).decode
_decode_usage_of = msgspec.json.Decoder(_UsageOf).decode
_decode_usage = msgspec.json.Decoder(_UsageWire).decode


def read_chunk(data: bytes, event: bytes = b"") -> Chunk | ErrorBody:
    """One event's data as a chunk, or as the error that it reports (`event: error`, whose data may be any text, an
    `error` member, or vLLM's older `object: "error"`). Raises ValueError for what is neither."""
    try:
        wire = _decode(data)
        said = _looked_through(wire.usage) if len(wire.usage) > _LONGEST_NOTHING else b""
    except _REFUSED:
        return _read_slowly(data, event)
    if event == b"error" or wire.error or wire.object == "error":
        return read_error(data)
    usage = _usage(said) if said else None
    uncounted = usage is None and said.startswith(b"{")
    if uncounted:
        data = without_usage(data, said)
    choices = wire.choices
    if not choices:
        return Chunk(data, usage_only=uncounted or usage is not None, usage=usage)
    if len(choices) == 1 and choices[0].index == 0:
        choice = choices[0]
        return Chunk(
            data,
            speaks=choice.delta is not None and _speaks(choice.delta),
            choices=_ONLY_CHOICE_0,
            finishes=((0, choice.finish_reason),) if choice.finish_reason else (),
            usage=usage,
            calls=_ONLY_CHOICE_0 if choice.delta is not None and choice.delta.tool_calls else (),
        )
    return Chunk(
        data,
        speaks=any(c.delta is not None and _speaks(c.delta) for c in choices),
        choices=tuple(c.index for c in choices),
        finishes=tuple((c.index, c.finish_reason) for c in choices if c.finish_reason),
        usage=usage,
        calls=tuple(c.index for c in choices if c.delta is not None and c.delta.tool_calls),
    )


def _speaks(delta: _Delta) -> bool:
    return bool(
        delta.content
        or delta.tool_calls
        or delta.reasoning_content
        or delta.reasoning
        or delta.refusal
        or delta.function_call
        or delta.audio
        or delta.annotations
        or delta.reasoning_details
    )


def read_error(raw: bytes) -> ErrorBody:
    """The error in a body or an event, in whichever of the shapes in use: OpenAI's `error` object,
    a bare string there, FastAPI's `detail`, or an object with a `message`. Else the text itself."""
    try:
        whole = _put_right(raw)
    except ValueError:
        return ErrorBody(raw[:500].decode("utf-8", "replace").strip() or "no explanation was given")
    outer = _object(whole)
    said = outer.get("error") or outer.get("detail") or whole
    error = _object(said)
    code, kind, param = error.get("code"), error.get("type"), error.get("param")
    if code is None and _is_telling(outer.get("code")):
        code = outer.get("code")
    message = error.get("message", said)
    return ErrorBody(
        message=message if isinstance(message, str) else json.dumps(said)[:500],
        type=kind if isinstance(kind, str) else None,
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str | int) else None,
        extra={k: v for k, v in error.items() if k not in _ERROR_MEMBERS},
    )


def _is_telling(code: object) -> bool:
    """Whether what stands beside an error is a name, or a status of one; some say 0 or 200 there."""
    return isinstance(code, str) or (isinstance(code, int) and 400 <= code < 600)


def are_embeddings(answer: bytes) -> bool:
    """Whether a 200 holds a list of embeddings, and no error; what they are is the caller's to read."""
    try:
        wire = _decode_embeddings(answer)
    except _REFUSED:
        return False
    return not _says(wire.error)


_ERROR_MEMBERS = frozenset({"message", "type", "param", "code"})


def _says(raw: msgspec.Raw) -> bool:
    return raw is not _ABSENT and bytes(raw) not in _SAYING_NOTHING


def _looked_through(raw: msgspec.Raw) -> bytes:
    said = bytes(raw)
    _decode_any(said)
    return said


def _usage(raw: bytes) -> Usage | None:
    """None if it counts neither prompt nor completion, or has no number of tokens there: that is worth no reply.
    Of the rest what is no number is not told."""
    try:
        wire = _decode_usage(raw)
    except msgspec.DecodeError:
        return None
    prompt, completion = _count(wire.prompt_tokens), _count(wire.completion_tokens)
    if prompt is None or completion is None or (wire.prompt_tokens is None and wire.completion_tokens is None):
        return None
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=_count(wire.total_tokens) or prompt + completion,
        cached_tokens=_count(_object(wire.prompt_tokens_details).get("cached_tokens")) or 0,
        reasoning_tokens=_count(_object(wire.completion_tokens_details).get("reasoning_tokens")) or 0,
        raw=raw,
    )


def _count(value: object) -> int | None:
    """A number of tokens, 0 where none is told; None if it cannot be one."""
    if value is None:
        return 0
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(cast("float", value)) if whole and 0 <= cast("float", value) <= _MOST else None


def _read_slowly(data: bytes, event: bytes) -> Chunk | ErrorBody:
    if event == b"error":
        return read_error(data)
    try:
        said: object = _decode_any(data)
    except _REFUSED:
        data, said = _as_logged(data)
    whole = _object(said)
    if not whole:
        raise ValueError("a chunk is a JSON object with members")
    if whole.get("object") == "error" or whole.get("error"):
        return read_error(data)
    said_usage = _usage_in(data, whole)
    usage = _usage(said_usage) if said_usage else None
    if said_usage and usage is None:
        data = without_usage(data, said_usage)
    listed = whole.get("choices")
    if not listed or not isinstance(listed, list):
        # One that counts nothing is nobody's, unless the chunk says something else.
        return Chunk(data, usage_only=usage is not None or (bool(said_usage) and whole.keys() <= _NAMED), usage=usage)
    speaks = False
    indexes: list[int] = []
    finishes: list[tuple[int, str]] = []
    calls: list[int] = []
    for choice in map(_object, cast("_List", listed)):
        index, delta = _index(choice), _object(choice.get("delta"))
        speaks = speaks or any(value for member, value in delta.items() if member not in _NAMING)
        indexes.append(index)
        if reason := choice.get("finish_reason"):
            finishes.append((index, str(reason)))
        if delta.get("tool_calls"):
            calls.append(index)
    return Chunk(data, speaks, choices=tuple(indexes), finishes=tuple(finishes), usage=usage, calls=tuple(calls))


def _usage_in(data: bytes, whole: dict[str, object]) -> bytes:
    """The usage object as it stands in a chunk; empty if there is none."""
    if not _object(whole.get("usage")):
        return b""
    try:
        return bytes(_decode_usage_of(data).usage)
    except _REFUSED:
        return json.dumps(whole["usage"]).encode()


def _as_logged(data: bytes) -> tuple[bytes, object]:
    """A chunk as the log can hold it, and what it says: as it came, if `codec.loads` would read it there."""
    try:
        str(data, "utf-8")
        # Within a record: by itself it could be UTF-16, and in a record two chunks.
        said: list[object] = codec.loads(b"[%b]" % data)
    except (UnicodeDecodeError, codec.Unreadable):
        whole = _put_right(data)
        return codec.dumps(whole), whole
    if len(said) != 1:
        raise ValueError("a chunk is one JSON object")
    return data, said[0]


def _put_right(data: bytes) -> object:
    try:
        text = data.decode("utf-8-sig", "surrogatepass")  # pairs of halves, as some write them, are a character
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", "replace")
    try:
        return json.loads(text, parse_constant=_nothing, parse_float=_finite, parse_int=_finite_integer)
    except RecursionError as error:
        raise ValueError("a chunk that is nested past all bounds") from error


def _nothing(_: str) -> None:
    """What NaN and Infinity are."""


def _finite(digits: str) -> float | None:
    number = float(digits)
    return None if math.isinf(number) else number


def _finite_integer(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:  # longer than Python reads
        return None


def _object(value: object) -> dict[str, object]:
    """The members of a JSON object; none of what is no object."""
    return cast("_Members", value) if isinstance(value, dict) else {}


def _index(choice: dict[str, object]) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0
