"""What the memory worker is asked, by its client and its service alike."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from klatch_schemas.ids import ConversationField, PersonField, TenantField

MOST_TEXTS: Final = 2_048
"""Of one request for embeddings, as OpenAI's."""


class RecallAsked(BaseModel):
    """`POST /recall`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: TenantField
    person: PersonField | None
    conversation: ConversationField | None = None
    text: Annotated[str, Field(max_length=100_000)]
    most: Annotated[int, Field(ge=1, le=50)]


class EmbedAsked(BaseModel):
    """`POST /embed`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
