"""Where a vendor's chunk is put into the words of OpenAI's API, because clients act on it; all else passes as it came.

Only the chunks in question are read and written again, with every member they had. A reply of OpenAI's own never is.
"""

import json
import re
from collections.abc import Collection
from typing import cast

import msgspec

_ABOUT_THE_REPLY = ("id", "created", "model", "system_fingerprint", "service_tier")
_STOPPED = frozenset({"stop", "STOP", "end_turn"})
"""What vendors say of a finished reply although it calls tools; a reply that was cut off stays cut off."""


class _Top(msgspec.Struct):
    usage: object = None


_read = msgspec.json.Decoder(_Top).decode
# A string, with its colon if it is a name, or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"(?:\s*:\s*)?|[][{}]', re.DOTALL)
_OPENING, _CLOSING, _NAME = (b"{", b"["), (b"}", b"]"), re.compile(rb'"usage"\s*:')


def finish_of_calls(reason: str) -> str:
    """The finish_reason of a choice that called tools: clients run tools on `tool_calls` only."""
    return "tool_calls" if reason in _STOPPED else reason


def with_finishes(raw: bytes, indexes: Collection[int]) -> bytes:
    """A chunk whose choices of these indexes finish with what `finish_of_calls` says."""
    chunk = _members(raw)
    for choice in cast("list[dict[str, object]]", chunk["choices"]):
        if choice.get("index", 0) in indexes and (reason := choice.get("finish_reason")):
            choice["finish_reason"] = finish_of_calls(str(reason))
    return _written(chunk)


def without_usage(raw: bytes, usage: bytes) -> bytes:
    """A chunk whose running total is null: clients add up the totals that they see.

    `usage` is the total, in the bytes that stand there unless the chunk was written again.
    """
    # Mostly the last that says so is the chunk's own: to look whether it is costs a tenth of looking for it.
    at = raw.rfind(usage)
    if at < 0 or not _is_without(amended := _null(raw, at, usage)):
        at = _own_usage(raw, usage)
        amended = _null(raw, at, usage) if at >= 0 else _written({**_members(raw), "usage": None})
    return amended


def _null(raw: bytes, at: int, usage: bytes) -> bytes:
    return raw[:at] + b"null" + raw[at + len(usage) :]


def _is_without(raw: bytes) -> bool:
    try:
        return _read(raw).usage is None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _own_usage(raw: bytes, usage: bytes) -> int:
    """Where the chunk's own `usage` begins, the last if there are several; -1 if it is not written so."""
    at, depth = -1, 0
    for token in _TOKEN.finditer(raw):
        said = token[0]
        if said in _OPENING:
            depth += 1
        elif said in _CLOSING:
            depth -= 1
        elif depth == 1 and _NAME.match(said) and raw.startswith(usage, token.end()):
            at = token.end()
    return at


def usage_chunk(carrier: bytes, usage: bytes) -> bytes:
    """The accounting chunk of a reply whose total came on `carrier`, a chunk with choices."""
    said = _members(carrier)
    named = {name: said[name] for name in _ABOUT_THE_REPLY if name in said}
    return _written({**named, "object": "chat.completion.chunk", "choices": [], "usage": json.loads(usage)})


def _members(raw: bytes) -> dict[str, object]:
    return cast("dict[str, object]", json.loads(raw))


def _written(chunk: dict[str, object]) -> bytes:
    try:
        return msgspec.json.encode(chunk)
    except UnicodeEncodeError:  # lone surrogates travel as escapes
        return json.dumps(chunk, separators=(",", ":")).encode()
