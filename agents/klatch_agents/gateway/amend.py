"""Where a vendor's chunk is put into the words of OpenAI's API, because clients act on it; all else passes as it came.

Only the chunks in question are read and written again, with every member they had. A reply of OpenAI's own never is.
"""

import json
from collections.abc import Collection
from typing import cast

import msgspec

_ABOUT_THE_REPLY = ("id", "created", "model", "system_fingerprint", "service_tier")
_STOPPED = frozenset({"stop", "STOP", "end_turn"})
"""What vendors say of a finished reply although it calls tools; a reply that was cut off stays cut off."""


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

    `usage` is the total as it stands there.
    """
    head, _, tail = raw.rpartition(usage)
    if head.rstrip().endswith(b":") and head.rstrip()[:-1].rstrip().endswith(b'"usage"'):
        return head + b"null" + tail
    return _written({**_members(raw), "usage": None})


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
