"""What can go wrong between us and a model server, by who must act on it.

    ModelError
    ├── ConnectError       no answer at all: refused, unresolved, closed before the status line
    ├── RefusedError       an HTTP status of 400 or more, or one that an error event told in place of a first word
    ├── MisconfiguredError the call cannot even be made: a key is missing, a URL is none
    ├── UnroutableError    no deployment may be called: no route, or all of it cools down
    ├── ExpiredError       the deadline passed while the call waited for its turn
    └── BrokenReplyError   it had answered 200, then
        ├── StalledError       nothing came for longer than the call allows (also before the status)
        ├── TruncatedError     the stream ended, or was cut, before every choice had finished
        ├── StreamError        the stream carried an error event
        └── MalformedError     what came is no Chat Completions reply

Every error answers the caller's questions: `code` for machines, `status` to show a client,
`retriable` (another try may succeed; true only while no text went out), `transient` (once text went
out: another answer, begun anew or continued, may come to its end), `retry_after` in seconds,
`upstream_request_id` for a ticket with the vendor. Messages never hold a key.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

CONTENT_FILTER = "content_filter"
"""The code by which OpenAI, Azure and others say that a filter refused."""


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The `error` object of OpenAI's API as the server sent it, unknown members kept in `extra`."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None
    extra: Mapping[str, object] | None = None


class ModelError(Exception):
    """A call to a model failed."""

    code: str = "model_error"
    status: int = 502
    retriable: bool = False
    transient: bool = False

    def __init__(
        self,
        message: str,
        *,
        upstream_request_id: str | None = None,
        spoke: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.upstream_request_id = upstream_request_id
        self.spoke = spoke
        self.retry_after: float | None = None
        self.body: ErrorBody | None = None
        self.anew_but: frozenset[str] | None = None
        """Of a call with a `prefix` that no deployment went on from: those that can, where the same call without it may
        be answered by others of their route; else None."""
        if spoke:  # text went out: a second try would repeat its beginning
            self.retriable = False

    @property
    def filtered(self) -> bool:
        """Whether the vendor's filter refused the content, in whatever shape it said so."""
        return self.code == CONTENT_FILTER


class ConnectError(ModelError):
    """The server gave no answer: nothing of the call has been seen to happen."""

    code = "model_unreachable"
    status = 502
    retriable = True


class RefusedError(ModelError):
    """The server answered with an error status, or told of one within a 200; nothing was generated.

    `status`, `retry_after` and `body` are the server's own and `code` is the body's where it has
    one, so that a client can be told the same. Statuses 408, 409, 425, 429 and 5xx are retriable.
    """

    code = "model_refused"

    def __init__(
        self,
        status: int,
        body: ErrorBody,
        *,
        retry_after: float | None = None,
        upstream_request_id: str | None = None,
        said: bytes = b"",
    ) -> None:
        """`said` is the whole of the server's answer, without keys, where messages are cut."""
        super().__init__(body.message, upstream_request_id=upstream_request_id)
        self.status = status
        self.body = body
        self.said = said
        self.retry_after = retry_after
        self.retriable = status in _RETRIABLE or status >= 500
        if isinstance(body.code, str) and body.code:
            self.code = body.code


class MisconfiguredError(ModelError):
    """The call cannot be made as things are set up; the message says what to mend. No secret is in it."""

    code = "model_misconfigured"
    status = 502


class UnroutableError(ModelError):
    """There is no deployment to call, now (503, with `retry_after` where it is known) or ever (404)."""

    code = "model_unavailable"

    def __init__(self, message: str, *, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.retriable = status == 503
        if status == 404:
            self.code = "model_not_found"


class ExpiredError(ModelError):
    """The request's deadline passed before its turn at the model came."""

    code = "deadline_exceeded"
    status = 504


class BrokenReplyError(ModelError):
    """A reply that began, or was promised, and did not come to its end."""

    retriable = True


class StalledError(BrokenReplyError):
    """Silence for longer than the call allows, before the first token or between two events."""

    code = "model_stalled"
    status = 504
    transient = True


class TruncatedError(BrokenReplyError):
    """The reply ended before every choice had its finish_reason: it is half an answer."""

    code = "model_reply_truncated"
    transient = True


class StreamError(BrokenReplyError):
    """The stream carried an error; `body` is the server's own.

    A filter that refuses by an event, or by a 200 that is no stream, is told as one that answers 400.
    """

    code = "model_stream_error"

    def __init__(self, body: ErrorBody, *, upstream_request_id: str | None = None, spoke: bool = False) -> None:
        super().__init__(body.message, upstream_request_id=upstream_request_id, spoke=spoke)
        self.body = body
        self.transient = _is_servers_fault(body)
        if isinstance(body.code, str) and body.code:
            self.code = body.code
        if self.filtered:
            self.status, self.retriable = 400, False


def told_in_a_good_answer(
    body: ErrorBody, *, upstream_request_id: str | None = None, spoke: bool = False
) -> RefusedError | StreamError:
    """The error that an event told, or a 200 that is no stream. Before a word was said, a status as its code is as good
    as one on the status line, and so is the type of a request that is at fault: servers that have begun their answer
    before they looked at the request have no other."""
    status = _status_of(body)
    if status is None and body.type == "invalid_request_error" and not _is_servers_fault(body):
        status = _STATUS_OF_NAME.get(str(body.code), 400)
    if spoke or status is None or not 400 <= status < 600:
        return StreamError(body, upstream_request_id=upstream_request_id, spoke=spoke)
    return RefusedError(status, body, upstream_request_id=upstream_request_id)


class MalformedError(BrokenReplyError):
    """What came is no Chat Completions reply. The server, or its URL, is the wrong one."""

    code = "model_reply_malformed"
    retriable = False


_STATUS = re.compile("[0-9]{3}")
_STATUS_OF_NAME = {"invalid_api_key": 401, "model_not_found": 404, "insufficient_quota": 429}
"""OpenAI's codes of the same type that are no fault of the request."""
_RETRIABLE = frozenset({408, 409, 425, 429})
_SERVERS_FAULTS = frozenset(
    {"server_error", "api_error", "internal_error", "internal_server_error", "internalservererror"}
    | {"overloaded_error", "rate_limit_error", "rate_limit_exceeded", "timeout_error", "service_unavailable"}
)


def _status_of(body: ErrorBody) -> int | None:
    """The number that stands as an error's code, if one does. As text, what is not three digits is a name."""
    if isinstance(body.code, str):
        return int(body.code) if _STATUS.fullmatch(body.code) else None
    return body.code


def _is_servers_fault(body: ErrorBody) -> bool:
    """Whether an error event tells of a server in trouble: by a status as code, else by its type. What
    says neither came from a server that could not say more."""
    status = _status_of(body)
    if status is not None:
        return status >= 500 or status in _RETRIABLE
    named = [str(name).lower() for name in (body.code, body.type) if name]
    return not named or any(name in _SERVERS_FAULTS for name in named)
