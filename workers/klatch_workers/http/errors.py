"""From errors to answers: OpenAI's error object, a status, and the headers that clients act on.

A model server's own error object passes through unchanged (code, type, param), with klatch's view of it beside it
under `klatch`. Whatever is no error of ours becomes a 500 that says nothing about the inside.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klatch_agents.gateway.errors import ModelError
from klatch_schemas.assembly import Ended
from klatch_schemas.errors import (
    Blocked,
    Cancelled,
    Expired,
    InvalidRequest,
    KlatchError,
    LimitExceeded,
    ModelFailed,
    RequestTooLarge,
    Unavailable,
    error_of,
)
from klatch_schemas.events import Status, StreamError
from klatch_streams.log import LogError, OffsetGone, RecordTooLarge
from klatch_workers.generation.failures import said_of

Headers = list[tuple[bytes, bytes]]

_RETRY_AFTER_MS = 1_000
"""What a client is told when klatch itself is not ready: long enough for a broker to elect a leader."""

_WORTH_ANOTHER_TRY = frozenset({408, 409, 425, 429})
# OpenAI's clients wait for no longer than this, and would come again within seconds instead, in vain.
_LONGEST_WAIT_MS = 60_000


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not."""

    code, status = "method_not_allowed", 405

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"{method} is not for this path: it answers to {allowed}")
        self.allowed = allowed


class UpstreamSaid(ModelFailed):
    """A model server's error, with its own error object and, where it had one, its own status."""

    def __init__(self, message: str, upstream: Mapping[str, Any], status: int | None = None) -> None:
        """`upstream_request` among the members is the model server's id of the call."""
        super().__init__(message)
        self.upstream = {name: value for name, value in upstream.items() if name != "upstream_request"}
        self.upstream_request: str | None = upstream.get("upstream_request")
        self.upstream_status = status


class PromptFiltered(UpstreamSaid):
    """A vendor's filter refused the prompt: what trust's refusal is, with the vendor's words."""

    code, status, type, retriable = Blocked.code, Blocked.status, Blocked.type, Blocked.retriable


_ENDINGS: Mapping[Status, tuple[type[KlatchError], str]] = {
    "cancelled": (Cancelled, "the request was cancelled"),
    "blocked": (Blocked, "the content was blocked by policy"),
    "rejected": (LimitExceeded, "a limit was exceeded; try again later"),
    "expired": (Expired, "the deadline passed before the reply was complete"),
    "failed": (ModelFailed, "the model server failed"),
}


def error_of_end(ended: Ended) -> KlatchError | None:
    """The error that a stream ended with; None if it was completed."""
    if ended.status == "completed":
        return None
    error = _of_said(ended.error) if ended.error else _ENDINGS[ended.status][0](_ENDINGS[ended.status][1])
    error.ended = ended.status
    # Live readers are told of a cancel before the end that follows it: what that says is told to no other either.
    error.deployment = ended.end.deployment if ended.end and ended.status != "cancelled" else ""
    return error


def _of_said(said: StreamError) -> KlatchError:
    return _of_upstream(said, said.upstream) if said.upstream else error_of(said)


def _of_upstream(said: StreamError, upstream: Mapping[str, Any]) -> KlatchError:
    status = upstream.get("status")
    own = {name: value for name, value in upstream.items() if name != "status"}
    # Whatever else stands there, a client gets a status that tells of an error.
    kind = PromptFiltered if said.code == Blocked.code else UpstreamSaid
    mapped = kind(said.message, own, status if isinstance(status, int) and 400 <= status < 600 else None)
    mapped.retry_after_ms = said.retry_after_ms
    return mapped


def as_klatch_error(error: Exception) -> KlatchError:
    """Any error as one that a client may see."""
    match error:
        case KlatchError():
            return error
        case RecordTooLarge():
            return RequestTooLarge(f"{error}: send a smaller request")
        case OffsetGone():
            return Unavailable("the log is being cut off; try again", retry_after_ms=_RETRY_AFTER_MS)
        case LogError() | TimeoutError() | OSError():
            return Unavailable("the log does not answer; try again", retry_after_ms=_RETRY_AFTER_MS)
        case ModelError():
            # As the end of a stream would tell it.
            return _of_said(said_of(error))
        case _:
            return KlatchError("an error of klatch's own; the log of the door names it by this request id")


@dataclass(frozen=True, slots=True)
class Answered:
    """What is known of a request that an error answers."""

    request: str
    resume: str | None = None
    """Where its reply is read on."""
    accepted: bool = False
    """Whether it stands in the log, so that it is brought to its end whoever reads."""
    keyed: bool = False
    """Whether asking again names the same request, by an `Idempotency-Key` or by its id."""

    def repeated_by(self, error: KlatchError) -> bool:
        """Whether a client may send the same again by itself.

        What is accepted and runs is found again by its key, and without one there would be a second request. What
        has ended tells the same again under its key, and is done with without one.
        """
        ended = error.ended is not None
        return _retriable(error) and not (self.accepted and self.keyed == ended)

    def goes_on(self, error: KlatchError) -> bool:
        """Whether only its answer was lost, and asking again would make a second request."""
        return self.accepted and not self.keyed and error.ended is None and isinstance(error, Unavailable)


def error_body(error: KlatchError, asked: Answered) -> bytes:
    """The JSON of an error, as OpenAI's clients read it; `klatch` has what they have no place for."""
    message = error.message
    if asked.goes_on(error):
        # In place of what there is to do about the error.
        message = (
            f"{message.partition(';')[0]}; the request goes on, asking again makes another: read on at {asked.resume}"
        )
    said: dict[str, Any] = {"message": message, "type": error.type, "param": error.param, "code": error.code}
    if isinstance(error, UpstreamSaid):
        said |= {name: value for name, value in error.upstream.items() if value is not None}
    ours = {
        "code": error.code,
        "status": error.ended,
        "request": asked.request,
        "resume": asked.resume,
        "limit": error.limit,
        "retry_after_ms": error.retry_after_ms,
        "upstream_request": error.upstream_request if isinstance(error, UpstreamSaid) else None,
        "deployment": error.deployment or None,
    }
    said["klatch"] = {name: value for name, value in ours.items() if value is not None}
    return json.dumps({"error": said}, separators=(",", ":")).encode()


def status_of(error: KlatchError) -> int:
    """The HTTP status of an error."""
    return error.upstream_status or error.status if isinstance(error, UpstreamSaid) else error.status


def _retriable(error: KlatchError) -> bool:
    if isinstance(error, UpstreamSaid) and error.upstream_status:
        return error.upstream_status in _WORTH_ANOTHER_TRY or error.upstream_status >= 500
    if isinstance(error, LimitExceeded):
        return error.retry_after_ms is not None and error.retry_after_ms <= _LONGEST_WAIT_MS
    return error.retriable


def error_headers(error: KlatchError, asked: Answered) -> Headers:
    """`retry-after` in seconds and milliseconds, the limit that refused, and whether to try again at all.

    `x-should-retry` is what OpenAI's clients ask first: they would repeat a 409 or a 502 that must not be repeated.
    """
    headers: Headers = [(b"x-should-retry", b"true" if asked.repeated_by(error) else b"false")]
    if error.retry_after_ms is not None:
        headers.append((b"retry-after", b"%d" % max(1, -(-error.retry_after_ms // 1000))))
        headers.append((b"retry-after-ms", b"%d" % error.retry_after_ms))
    if isinstance(error, LimitExceeded) and error.limit and not error.limit.startswith("cost"):
        what = b"requests" if "requests" in error.limit else b"tokens"
        headers.append((b"x-ratelimit-remaining-" + what, b"0"))
        headers.append((b"x-ratelimit-reset-" + what, b"%dms" % (error.retry_after_ms or 0)))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    return headers
