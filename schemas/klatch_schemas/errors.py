"""Every error a caller can meet, in one place, the same on every door.

    KlatchError
    ├── InvalidRequest        the caller's doing: mend the request          invalid_request
    │   └── RequestTooLarge                                                 request_too_large
    ├── Unauthorized          no key, or a wrong one                        invalid_api_key
    ├── NotFound              nothing of that name, or another tenant's     not_found
    ├── Blocked               trust or the vendor's filter refused it       content_filter
    ├── LimitExceeded         a quota refused; try again later              rate_limit_exceeded
    ├── Expired               the deadline passed first                     deadline_exceeded
    ├── Cancelled             somebody cancelled the request                cancelled
    ├── Busy                  the conversation is busy: if_busy is reject   conversation_busy
    ├── ModelFailed           the model server failed, or said no           model_error
    ├── Superseded            the text read so far was taken back           superseded
    ├── LogMoved              the log no longer holds what was asked for    log_moved
    ├── StreamBroken          the log holds a gap where text should be      stream_broken
    └── Unavailable           klatch cannot accept or answer just now       unavailable

Over HTTP they take OpenAI's error shape, over Kafka they stand in `stream.end.error`.
"""

from typing import ClassVar

from klatch_schemas.events import Status, StreamError


class KlatchError(Exception):
    """The root. `status` is HTTP's, `type` is OpenAI's, `retriable` answers "may I send the same again?"."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    retriable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_ms: int | None = None,
        limit: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms
        self.limit = limit
        self.deployment = ""
        """Which deployment of a model answered so, if one did."""
        self.ended: Status | None = None
        """How the request's stream ended, if this is its end: asking for the same stream again brings the same."""


class InvalidRequest(KlatchError):
    """The request itself is wrong; `param` names the field."""

    code, status, type = "invalid_request", 400, "invalid_request_error"


class RequestTooLarge(InvalidRequest):
    """The body is larger than a record may be."""

    code, status = "request_too_large", 413


class Unauthorized(KlatchError):
    """No API key, or one that no tenant has."""

    code, status, type = "invalid_api_key", 401, "authentication_error"


class NotFound(KlatchError):
    """Nothing of that name that this tenant may see."""

    code, status, type = "not_found", 404, "invalid_request_error"


class Blocked(KlatchError):
    """Trust, or the model vendor's own filter, refused the text."""

    code, status, type = "content_filter", 400, "invalid_request_error"


class LimitExceeded(KlatchError):
    """A quota refused; `limit` names it, `retry_after_ms` says when to try again."""

    code, status, type, retriable = "rate_limit_exceeded", 429, "rate_limit_error", True


class Expired(KlatchError):
    """The request's deadline passed before its reply was complete."""

    code, status, type = "deadline_exceeded", 504, "timeout_error"


class Cancelled(KlatchError):
    """Somebody cancelled the request."""

    code, status, type = "cancelled", 409, "invalid_request_error"


class Busy(KlatchError):
    """An earlier request of the conversation was not finished, and this one was not to wait (`if_busy: reject`)."""

    code, status, type, retriable = "conversation_busy", 409, "invalid_request_error", True


class ModelFailed(KlatchError):
    """The model server failed; its own words stand in `stream.end.error.upstream`."""

    code, status, type, retriable = "model_error", 502, "server_error", True


class Superseded(KlatchError):
    """A newer attempt took back text that this reader had; read the stream again from its start."""

    code, status, type, retriable = "superseded", 409, "server_error", True


class LogMoved(KlatchError):
    """The log no longer holds the position asked for."""

    code, status, type = "log_moved", 410, "server_error"


class StreamBroken(KlatchError):
    """The log holds a gap where the reply's text should be."""

    code, status, type = "stream_broken", 502, "server_error"


class Unavailable(KlatchError):
    """Klatch cannot accept or answer just now."""

    code, status, type, retriable = "unavailable", 503, "server_error", True


ERRORS: dict[str, type[KlatchError]] = {
    error.code: error
    for error in (
        KlatchError,
        InvalidRequest,
        RequestTooLarge,
        Unauthorized,
        NotFound,
        Blocked,
        LimitExceeded,
        Expired,
        Cancelled,
        Busy,
        ModelFailed,
        Superseded,
        LogMoved,
        StreamBroken,
        Unavailable,
    )
}


def error_of(said: StreamError) -> KlatchError:
    """The exception for what a `stream.end` said; a code from a newer klatch becomes the root."""
    error = ERRORS.get(said.code, KlatchError)
    return error(said.message, retry_after_ms=said.retry_after_ms, limit=said.limit)
