"""What a request asks this server to do: how it replies, how fast, and how it fails.

A script comes with the request, so one server serves many tests at once: as a query behind the
model's name (`fake?tokens=20&rate=50`), or as an object in the body's `x-fake` member, which wins.
A misspelt member is answered with 400.
"""

from typing import Literal, cast
from urllib.parse import parse_qsl

import msgspec


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reply. Times are seconds, rates tokens a second of each choice (0: all at once)."""

    reply: Literal["words", "unique", "echo-user", "echo-system", "echo-messages"] = "words"
    """`unique` writes another text at each call, the call's id in every token: `<<c17:0>>`.

    A final assistant message is a partial answer, and any reply goes on behind it: call c18 behind
    `<<c17:5>>` with `<<c18:6>>`, so a text of several calls whose numbers have no hole was continued.
    """
    text: str = ""
    """Exactly this text, four characters a token, whatever `reply` says."""
    tokens: int = 16
    rate: float = 0.0

    header_delay: float = 0.0
    """Before the status line."""
    first_delay: float = 0.0
    """Between the status line and the first event."""
    keep_alive: float = 0.0
    """A comment every so often during `first_delay`; 0 is none."""
    end_delay: float = 0.0
    """Between the last event and the end of the body."""
    held: bool = False
    """What follows the last token of a stream, or breaks it off, waits for `Upstream.release` of its `user`."""

    reasoning: int = 0
    """So many tokens of `reasoning_content` before the answer."""
    refusal: bool = False
    """The answer comes as `refusal`, content stays null."""
    tool_calls: int = 0
    """So many calls, their arguments in interleaved fragments, in place of the answer."""
    big: int = 0
    """One event whose content is so many bytes, in place of the answer."""
    surrogates: bool = False
    """Each half of an emoji as a lone surrogate escape in an event of its own, after the answer."""
    finish: str = ""
    """finish_reasons by choice, separated by commas; by default what the answer implies."""

    azure: bool = False
    """Azure's first event (no choices, empty id), and an annotation-only event after the answer."""
    prompt_filtered: bool = False
    """Azure's refusal of a prompt: 400 `content_filter`, with what was found in `innererror`."""
    running_usage: bool = False
    """On every chunk what its choice has used, as vLLM's `continuous_usage_stats` sends."""
    early_usage: bool = False
    """A usage that counts nothing yet, with the chunks that open the answer."""
    newline: Literal["lf", "crlf", "cr"] = "lf"
    comments: bool = False
    """A comment before every event."""
    split: int = 0
    """Bytes a write, so that events and characters are cut anywhere; 0 is a write an event."""

    status: int = 0
    """Answer with this error status instead."""
    retry_after: str = ""
    reject_stream_options: bool = False
    ignore_stream: bool = False
    """One JSON document although a stream was asked for."""
    fault: Literal[
        "",
        "error-event",  # the bare `data: {"error": …}` of OpenAI, then the end
        "named-error-event",  # `event: error` before it and `[DONE]` after it
        "garbage",  # an event that is no JSON
        "drop",  # the connection is closed in the middle of the body
        "reset",  # the same with a TCP reset
        "stall",  # silence
        "no-finish",  # a clean end without finish_reason and `[DONE]`
        "done-without-finish",
        "no-done",  # finished, usage sent, a clean end without `[DONE]`
        "bare-done",  # `data: [DONE]` without its blank line
        "drop-after-finish",
        "stall-after-finish",
    ] = ""
    fault_after: int = -1
    """Tokens of the answer before the fault; -1 is half of them."""
    fails: int = 0
    """Only the first so many calls of the same `user` fail, by status or fault; 0: all do."""


def script_of(body: dict[str, object]) -> tuple[str, Script]:
    """The plain model name of a request and its script. Raises ValueError for a wrong script."""
    name, _, query = str(body.get("model", "")).partition("?")
    asked: dict[str, object] = dict(parse_qsl(query, keep_blank_values=True))
    extra = body.get("x-fake")
    if isinstance(extra, dict):
        asked |= cast("dict[str, object]", extra)
    return name, msgspec.convert(asked, Script, strict=False)
