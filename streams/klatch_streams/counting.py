"""Klatch's own count of a reply's tokens, where the model's server sent none.

A chunk that says something is a token, as servers usually send them. One of more than `LONGEST` bytes of text holds
several: a token for each `BYTES` of them. Text is content, reasoning, refusals and what tools are called with; a role,
a finish or an annotation is none. A running count that the server sent with a chunk (`continuous_usage_stats`) replaces
what was counted before: the last stands, and is never added to another (trap 27). Of a reply with several choices it is
a floor: vLLM's is that of the chunk's own choice alone.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from klatch_schemas import codec
from klatch_schemas.chunks import objects_in
from klatch_schemas.codec import Unreadable

LONGEST: Final = 16
BYTES: Final = 4
_TEXTS: Final = ("content", "reasoning_content", "reasoning", "refusal")


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


_read: Final = msgspec.json.Decoder(_Chunk).decode


class Count:
    """Tokens of the chunks heard so far."""

    __slots__ = ("_several", "tokens")

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens
        self._several = False
        """Whether more than one choice was heard of."""

    def after(self, chunk: bytes) -> int:
        """How many it would be with this chunk."""
        try:
            read = _read(chunk)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._tolerantly(chunk)
        size = 0
        for choice in read.choices or ():
            self._several |= choice.index > 0
            size += _size(choice.delta) if choice.delta else 0
        counted = read.usage.completion_tokens if read.usage else None
        if counted is None or self._several:
            return max(counted or 0, self.tokens + _tokens(size))
        return counted

    def hear(self, chunk: bytes) -> None:
        """Count a chunk."""
        self.tokens = self.after(chunk)

    def _tolerantly(self, chunk: bytes) -> int:
        # What does not fit the types, a list as content or half a surrogate pair, is text all the same.
        try:
            choices = codec.loads(chunk).get("choices")
        except Unreadable:
            return self.tokens + 1
        deltas = objects_in([choice.get("delta") for choice in objects_in(choices)])
        return self.tokens + _tokens(sum(map(_any_text, deltas)))


def tokens_in(chunks: Iterable[bytes]) -> int:
    """The tokens of these chunks together."""
    count = Count()
    for chunk in chunks:
        count.hear(chunk)
    return count.tokens


def _tokens(size: int) -> int:
    return -(-size // BYTES) if size > LONGEST else min(size, 1)


def _size(delta: _Delta) -> int:
    size = 0
    for text in (delta.content, delta.reasoning_content, delta.reasoning, delta.refusal):
        size += _length(text) if text else 0
    functions = [call.function for call in delta.tool_calls or ()]
    for function in (*functions, delta.function_call):
        if function:
            size += _length(function.name or "") + _length(function.arguments or "")
    return size


def _length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _any_text(delta: Mapping[str, object]) -> int:
    said = {name: value for name, value in delta.items() if name in _TEXTS or name in {"tool_calls", "function_call"}}
    return len(codec.dumps(list(said.values()))) - 2 if any(said.values()) else 0
