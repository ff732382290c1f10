"""What a gateway reads from a chunk beside passing its bytes on.

Unknown members are skipped, never lost: the raw bytes travel. Typed decoding takes about a
microsecond; what does not fit the types (a list as content, a lone surrogate, which msgspec
refuses) is read again by the standard library, tolerantly. What is no JSON object at all is a
ValueError.
"""

import json
from typing import cast

import msgspec

from klatch_agents.gateway.errors import ErrorBody
from klatch_agents.gateway.port import Chunk, Usage

_ABSENT = msgspec.Raw(b"")
_SAYING_NOTHING = frozenset({b"", b"null", b"[]", b"{}", b'""'})
_SPEAKING = (
    *("content", "refusal", "reasoning_content", "reasoning"),
    *("tool_calls", "function_call", "audio"),
)
_ONLY_CHOICE_0 = (0,)


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = _ABSENT
    function_call: msgspec.Raw = _ABSENT
    audio: msgspec.Raw = _ABSENT

    def calls(self) -> bool:
        return self.tool_calls is not _ABSENT and _says(self.tool_calls)

    def speaks(self) -> bool:
        return bool(
            self.content
            or self.reasoning_content
            or self.reasoning
            or self.refusal
            or self.calls()
            or (self.function_call is not _ABSENT and _says(self.function_call))
            or (self.audio is not _ABSENT and _says(self.audio))
        )


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Wire(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT
    object: str | None = None


class _EmbeddingsWire(msgspec.Struct):
    data: list[msgspec.Raw]
    error: msgspec.Raw = _ABSENT


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _UsageWire(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


_decode = msgspec.json.Decoder(_Wire).decode
_decode_embeddings = msgspec.json.Decoder(_EmbeddingsWire).decode
_decode_usage = msgspec.json.Decoder(_UsageWire).decode


def read_chunk(data: bytes, event: bytes = b"") -> Chunk | ErrorBody:
    """One event's data as a chunk, or as the error that it reports (`event: error`, an `error`
    member, or vLLM's older `object: "error"`). Raises ValueError for what is neither."""
    try:
        wire = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_slowly(data, event)
    if event == b"error" or wire.object == "error" or _says(wire.error):
        return read_error(data)
    usage = _usage(bytes(wire.usage)) if _says(wire.usage) else None
    choices = wire.choices
    if not choices:
        return Chunk(data, usage_only=usage is not None, usage=usage)
    if len(choices) == 1 and choices[0].index == 0:
        choice = choices[0]
        return Chunk(
            data,
            speaks=choice.delta is not None and choice.delta.speaks(),
            choices=_ONLY_CHOICE_0,
            finishes=((0, choice.finish_reason),) if choice.finish_reason else (),
            usage=usage,
            calls=_ONLY_CHOICE_0 if choice.delta is not None and choice.delta.calls() else (),
        )
    return Chunk(
        data,
        speaks=any(c.delta is not None and c.delta.speaks() for c in choices),
        choices=tuple(c.index for c in choices),
        finishes=tuple((c.index, c.finish_reason) for c in choices if c.finish_reason),
        usage=usage,
        calls=tuple(c.index for c in choices if c.delta is not None and c.delta.calls()),
    )


def read_error(raw: bytes) -> ErrorBody:
    """The error in a body or an event, in whichever of the shapes in use: OpenAI's `error` object,
    a bare string there, FastAPI's `detail`, or an object with a `message`. Else the text itself."""
    try:
        whole: object = json.loads(raw)
    except (ValueError, RecursionError):
        return ErrorBody(raw[:500].decode("utf-8", "replace").strip() or "no explanation was given")
    outer = _object(whole)
    said = outer.get("error") or outer.get("detail") or whole
    error = _object(said)
    code, kind, param = error.get("code"), error.get("type"), error.get("param")
    message = error.get("message", said)
    return ErrorBody(
        message=message if isinstance(message, str) else json.dumps(said)[:500],
        type=kind if isinstance(kind, str) else None,
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str | int) else None,
        extra={k: v for k, v in error.items() if k not in _ERROR_MEMBERS},
    )


def are_embeddings(answer: bytes) -> bool:
    """Whether a 200 holds a list of embeddings, and no error; what they are is the caller's to read."""
    try:
        wire = _decode_embeddings(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return not _says(wire.error)


_ERROR_MEMBERS = frozenset({"message", "type", "param", "code"})


def _says(raw: msgspec.Raw) -> bool:
    return raw is not _ABSENT and bytes(raw) not in _SAYING_NOTHING


def _usage(raw: bytes) -> Usage | None:
    """Wrong types in a usage object are worth no reply: such an object counts as absent."""
    try:
        wire = _decode_usage(raw)
    except msgspec.DecodeError:
        return None
    prompt, completion = wire.prompt_tokens or 0, wire.completion_tokens or 0
    cached = wire.prompt_tokens_details and wire.prompt_tokens_details.cached_tokens
    reasoning = wire.completion_tokens_details and wire.completion_tokens_details.reasoning_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=wire.total_tokens or prompt + completion,
        cached_tokens=cached or 0,
        reasoning_tokens=reasoning or 0,
        raw=raw,
    )


def _read_slowly(data: bytes, event: bytes) -> Chunk | ErrorBody:
    try:
        whole = _object(json.loads(data))
    except RecursionError as error:
        raise ValueError("a chunk that is nested past all bounds") from error
    if not whole:
        raise ValueError("a chunk is a JSON object with members")
    if event == b"error" or whole.get("object") == "error" or whole.get("error"):
        return read_error(data)
    listed = whole.get("choices")
    choices = [_object(c) for c in cast("list[object]", listed)] if isinstance(listed, list) else []
    usage = _usage(json.dumps(whole["usage"]).encode()) if whole.get("usage") else None
    return Chunk(
        data,
        speaks=any(_object(c.get("delta")).get(m) for c in choices for m in _SPEAKING),
        usage_only=usage is not None and not choices,
        choices=tuple(_index(c) for c in choices),
        finishes=tuple((_index(c), str(c["finish_reason"])) for c in choices if _finishes(c)),
        usage=usage,
        calls=tuple(_index(c) for c in choices if _object(c.get("delta")).get("tool_calls")),
    )


def _object(value: object) -> dict[str, object]:
    """The members of a JSON object; none of what is no object."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _finishes(choice: dict[str, object]) -> bool:
    return bool(choice.get("finish_reason"))


def _index(choice: dict[str, object]) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0
