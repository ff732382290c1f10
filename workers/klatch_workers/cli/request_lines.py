"""From lines of JSON to chat requests, in the three forms in which people write them.

A line with a `kind` is a whole `chat.requested` event. A line with `klatch` is what the HTTP door takes: a Chat
Completions body with klatch's own fields in that object. Any other line is such a body with klatch's fields beside
its own, and may name its `request` and `tenant`. What is wrong is said by field, without the field's text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast
from uuid import uuid4

from pydantic import ValidationError

from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.errors import InvalidRequest
from klatch_schemas.events import ChatRequested
from klatch_schemas.ids import RequestId, Tenant, derived_id
from klatch_workers.http.envelope import KlatchFields, asked_in

_OURS: Final = frozenset(KlatchFields.model_fields)
_ENVELOPE: Final = _OURS | {"request", "tenant"}


class BadLine(ValueError):
    """A line that is no request; the message names the field."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What lines need not say."""

    tenant: Tenant | None = None
    model: str | None = None
    batch: str | None = None
    """Names the file: its n-th line has the same request id whenever it is published."""

    def request_id(self, number: int) -> RequestId:
        """The id of a request on line `number` that has none of its own."""
        return RequestId(str(derived_id("publish", self.batch, number) if self.batch else uuid4()))


def request_of(line: bytes, number: int, defaults: Defaults) -> ChatRequested:
    """The request on line `number`. Raises BadLine."""
    try:
        fields: object = codec.loads(line)
    except Unreadable as error:
        raise BadLine(str(error)) from error
    if not isinstance(fields, dict):
        raise BadLine("a line is one JSON object")
    said = cast("dict[str, Any]", fields)
    try:
        return _whole_event(said) if "kind" in said else _from_body(said, number, defaults)
    except ValidationError as error:
        raise BadLine(codec.explain(error)) from error
    except RecursionError as error:
        raise BadLine("the line is nested too deeply") from error


def _whole_event(said: Mapping[str, Any]) -> ChatRequested:
    if said["kind"] != ChatRequested.KIND:
        raise BadLine(f"kind: only {ChatRequested.KIND} can be published")
    return ChatRequested.model_validate(said)


def _from_body(said: Mapping[str, Any], number: int, defaults: Defaults) -> ChatRequested:
    nested = "klatch" in said
    request = defaults.request_id(number) if nested else said.get("request") or defaults.request_id(number)
    tenant = defaults.tenant if nested else said.get("tenant", defaults.tenant)
    body = said if nested else _nested(said)
    if tenant is None:
        raise BadLine('tenant: nobody said whose request it is; add "tenant" to the line, --tenant, or KLATCH_TENANT')
    if defaults.model is not None:
        body = {"model": defaults.model, **body}
    try:
        return asked_in(body).event(request, tenant, None)
    except InvalidRequest as error:
        raise BadLine(error.message if nested else error.message.removeprefix("klatch.")) from error


def _nested(said: Mapping[str, Any]) -> dict[str, Any]:
    ours = {name: value for name, value in said.items() if name in _OURS}
    if isinstance(ours.get("prompt"), str):
        ours["prompt"] = {"name": ours["prompt"]}
    return {**{name: value for name, value in said.items() if name not in _ENVELOPE}, "klatch": ours}
