"""The port behind which vector indexes stand, and whose memories a search may see.

Every search is of one person of one tenant: the `Scope` is a required argument and cannot be made without both, so
there is no call that searches across them. What an index returns is checked against the scope once more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias
from uuid import UUID

from klatch_agents.embeddings.port import Vector
from klatch_schemas.errors import KlatchError, Unavailable
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant, derived_id

NOBODY = ""
"""Stands in the index for the person of a memory whose request named none; no real person id is empty."""


class MemoryFailed(KlatchError):
    """The vector index refused; it will until somebody mends the set-up."""


class MemoryUnavailable(Unavailable, MemoryFailed):
    """The vector index cannot be asked just now; the same may work later."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose memories: one person's of one tenant, or what was said in one conversation of nobody in particular.

    Without a person there must be a conversation: what nobody in particular said never leaves its conversation.
    Ids are compared as they are, whole: there are no wildcards, and nothing is trimmed or folded.
    """

    tenant: Tenant
    person: Person | None
    conversation: Conversation | None = None

    def __post_init__(self) -> None:
        if not self.tenant or self.person == "" or self.conversation == "":
            raise ValueError("an id of a memory scope is empty: name tenant and person")
        if self.person is None and self.conversation is None:
            raise ValueError("a memory scope needs a person, or a conversation when the request named no person")

    def fields(self) -> dict[str, str]:
        """What the payload of a memory in this scope must hold, field by field."""
        fields: dict[str, str] = {"tenant": self.tenant, "person": self.person or NOBODY}
        if self.conversation is not None:
            fields["conversation"] = self.conversation
        return fields


@dataclass(frozen=True, slots=True)
class WholeTenant:
    """Everything of a tenant: for forgetting only."""

    tenant: Tenant

    def __post_init__(self) -> None:
        if not self.tenant:
            raise ValueError("the tenant to forget is empty: name it")

    def fields(self) -> dict[str, str]:
        """What the payload of every memory of the tenant holds."""
        return {"tenant": self.tenant}


Forgotten: TypeAlias = Scope | WholeTenant


@dataclass(frozen=True, slots=True)
class Memory:
    """One remembered text, a message or a part of a long one."""

    tenant: Tenant
    person: Person | None
    conversation: Conversation
    request: RequestId
    role: str
    part: int
    text: str
    at_ms: int

    @property
    def id(self) -> UUID:
        """The same for the same message of the same request, so that a turn told twice is remembered once."""
        return derived_id("memory", self.tenant, self.request, self.role, self.part)

    def payload(self, model_id: str) -> dict[str, object]:
        """What the index keeps beside the vector; `model_id` is the embedding model's."""
        return {
            "tenant": self.tenant,
            "person": self.person or NOBODY,
            "conversation": self.conversation,
            "request": self.request,
            "role": self.role,
            "part": self.part,
            "text": self.text,
            "at_ms": self.at_ms,
            "model": model_id,
        }


@dataclass(frozen=True, slots=True)
class Point:
    """A memory and its vector."""

    memory: Memory
    vector: Vector


@dataclass(frozen=True, slots=True)
class Hit:
    """A memory that a search found; `score` is the cosine of the two vectors."""

    memory: Memory
    score: float


class VectorIndex(Protocol):
    """Keeps vectors with their memories. All methods raise `MemoryFailed` or `MemoryUnavailable`."""

    async def upsert(self, points: Sequence[Point]) -> None:
        """Adds the points; a point whose id is there already takes its place. When it returns, the points
        are found, and outlive the death of any process of ours."""
        ...

    async def search(self, vector: Vector, scope: Scope, limit: int) -> list[Hit]:
        """The `limit` nearest memories of the scope, best first."""
        ...

    async def forget(self, what: Forgotten) -> None:
        """Deletes every memory of the scope or tenant; nothing of it is found afterwards."""
        ...

    async def close(self) -> None:
        """Releases files or connections; the index is not used afterwards."""
        ...


def hit_of(payload: Mapping[str, object] | None, score: float, scope: Scope) -> Hit:
    """The hit that an index answered; raises `MemoryFailed` when it is not of the scope.

    The filter has been applied by the index already. This is the wall behind it: a misconfigured index may break
    recall, and must not break the walls between people.
    """
    fields = payload or {}
    if any(fields.get(name) != value for name, value in scope.fields().items()):
        raise MemoryFailed("the vector index answered with a memory from outside the scope: do not use this index")
    person = str(fields["person"])
    memory = Memory(
        tenant=Tenant(str(fields["tenant"])),
        person=Person(person) if person != NOBODY else None,
        conversation=Conversation(str(fields["conversation"])),
        request=RequestId(str(fields["request"])),
        role=str(fields["role"]),
        part=int(str(fields["part"])),
        text=str(fields["text"]),
        at_ms=int(str(fields["at_ms"])),
    )
    return Hit(memory, score)


INDEXED = ("tenant", "person", "conversation", "request")
"""Payload fields with a keyword index: what searches filter by, and what an operator looks for."""


def vector_name(model_id: str) -> str:
    """The name of the vector that a model's embeddings are stored under, in every index.

    Named after the model, so that vectors of two models cannot meet: an index made for another model has no vector
    of this name. Readable and safe as a file name, with a hash because different ids may read alike.
    """
    readable = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in model_id)
    return f"{readable[:40]}-{derived_id('vector', model_id).hex[:8]}"
