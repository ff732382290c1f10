"""The names things go by, as types.

An id of anything that klatch creates is derived (`uuid5`) from its cause, so two owners of a partition, or one
owner twice, create the same thing. Only what enters from outside is named by outsiders, and it is checked here.
"""

from typing import Annotated, NewType
from uuid import NAMESPACE_URL, UUID, uuid5

from pydantic import StringConstraints

Tenant = NewType("Tenant", str)
Person = NewType("Person", str)
Conversation = NewType("Conversation", str)
RequestId = NewType("RequestId", str)
Writer = NewType("Writer", str)

# Tenants and requests end up in headers, paths and file names; people and conversations are only ever values.
_NAME = StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_TOKEN = StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")
_LABEL = StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")

TenantField = Annotated[Tenant, _NAME]
PersonField = Annotated[Person, _LABEL]
ConversationField = Annotated[Conversation, _LABEL]
RequestIdField = Annotated[RequestId, _TOKEN]
WriterField = Annotated[Writer, _TOKEN]
NameField = Annotated[str, _NAME]
LabelField = Annotated[str, _LABEL]

_KLATCH = uuid5(NAMESPACE_URL, "https://klatch.dev/ids")


def derived_id(*parts: str | int) -> UUID:
    """The uuid5 of `parts`, length-prefixed so that no two lists of parts collide."""
    text = "".join(f"{len(part)}:{part}" for part in map(str, parts))
    return uuid5(_KLATCH, text)


def request_id_for_key(tenant: Tenant, idempotency_key: str) -> RequestId:
    """The request that an `Idempotency-Key` names within its tenant."""
    return RequestId(str(derived_id("idempotency-key", tenant, idempotency_key)))
