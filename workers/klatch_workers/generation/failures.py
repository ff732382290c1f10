"""A model's failure in the words of the contract, and whether another try may mend it."""

from typing import cast

from klatch_agents.gateway.errors import ExpiredError, ModelError
from klatch_schemas.chunks import Json
from klatch_schemas.errors import Blocked, Expired
from klatch_schemas.events import StreamError
from klatch_streams.generation import Broken


def broken_by(error: ModelError) -> Broken:
    """What the policy is told of a failure."""
    if error.anew_but is not None:
        # Another attempt asks others, so that it need not wait for as long as those who did not continue wanted.
        return Broken(said_of(error), again=True)
    # What failed before it spoke was tried again by the gateway, as often as its route allows. Once text went out, only
    # another attempt can mend it, which continues that text or takes it back.
    return Broken(said_of(error), error.spoke and error.transient)


def said_of(error: ModelError) -> StreamError:
    """The server's own error object, with its HTTP `status`."""
    if isinstance(error, ExpiredError):
        return StreamError(code=Expired.code, message=error.message)
    upstream: Json = {"status": error.status, "code": error.code, "upstream_request": error.upstream_request_id}
    if body := error.body:
        extra = cast("Json", body.extra or {})
        upstream |= {**extra, "message": body.message, "type": body.type, "param": body.param, "code": body.code}
        upstream["status"] = error.status
    retry = None if error.retry_after is None else int(error.retry_after * 1000)
    # The vendor's filter refused the prompt: no failure of the model, and nothing to try elsewhere (trap 32).
    code = Blocked.code if error.code == Blocked.code else "model_error"
    return StreamError(code=code, message=error.message, retry_after_ms=retry, upstream=upstream)
