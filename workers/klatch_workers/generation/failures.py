"""A model's failure in the words of the contract, and whether another try may mend it."""

from typing import cast

from klatch_agents.gateway.errors import ModelError
from klatch_schemas.chunks import Json
from klatch_schemas.events import StreamError
from klatch_streams.generation import Broken


def broken_by(error: ModelError) -> Broken:
    """What the policy is told of a failure."""
    # `retriable` is about sending the same call again; once text went out, the next attempt takes that text back.
    again = error.transient if error.spoke else error.retriable
    return Broken(said_of(error), again, error.retry_after or 0.0)


def said_of(error: ModelError) -> StreamError:
    """The server's own error object, with its HTTP `status`."""
    upstream: Json = {"status": error.status, "code": error.code, "upstream_request": error.upstream_request_id}
    if body := error.body:
        extra = cast("Json", body.extra or {})
        upstream |= {**extra, "message": body.message, "type": body.type, "param": body.param, "code": body.code}
        upstream["status"] = error.status
    retry = None if error.retry_after is None else int(error.retry_after * 1000)
    return StreamError(code="model_error", message=error.message, retry_after_ms=retry, upstream=upstream)
