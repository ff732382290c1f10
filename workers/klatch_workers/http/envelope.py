"""From the body of a chat completion request to `chat.requested`.

The body is passed on as it came, minus `klatch`, whose fields are klatch's own and are checked strictly: a
misspelt one is an error that names it. Of the rest only what klatch itself acts on is checked.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.errors import InvalidRequest
from klatch_schemas.events import ChatRequested, Deadline, MemoryPolicy, PromptReference, RequestContext
from klatch_schemas.ids import Conversation, ConversationField, NameField, PersonField, RequestId, Tenant
from klatch_workers.http.clock import now_ms

M = TypeVar("M", bound=BaseModel)

_TURNS, _MEMORIES = 20, 4
_DAY_MS = 86_400_000
_MOST_CHOICES = 128
"""As at OpenAI."""


class DeadlineFields(BaseModel):
    """Until when an answer is worth something, in `"klatch": {...}` of a request body."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deadline_ms: Deadline | None = None
    """Milliseconds since the epoch."""
    timeout_ms: Annotated[int, Field(gt=0, le=_DAY_MS)] | None = None
    """The same, from now on."""

    @model_validator(mode="after")
    def _one_deadline(self) -> Self:
        if self.deadline_ms is not None and self.timeout_ms is not None:
            raise ValueError("give deadline_ms or timeout_ms, not both")
        return self

    def deadline(self, now_ms: int) -> int | None:
        """It as milliseconds since the epoch; None if there is none."""
        return self.deadline_ms if self.timeout_ms is None else now_ms + self.timeout_ms


class KlatchFields(DeadlineFields):
    """`"klatch": {...}` of a chat completion's body."""

    conversation: ConversationField | None = None
    """None: the request is a conversation of its own."""
    person: PersonField | None = None
    use_case: NameField = "default"
    prompt: PromptReference | None = None
    memory: MemoryPolicy | None = None
    """None: nothing without a conversation, else its last turns, and what is known of a person who is named."""
    skills: tuple[NameField, ...] = ()
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    if_busy: Literal["enqueue", "reject", "interrupt", "rollback"] = "enqueue"
    on_crash: Literal["restart", "continue"] = "restart"
    on_disconnect: Literal["cancel", "continue"] | None = None
    """None: a client that goes away cancels, unless an `Idempotency-Key` says that it means to ask again."""
    context: RequestContext = RequestContext()

    @property
    def policy(self) -> MemoryPolicy:
        """The memory policy, by default or as given."""
        if self.memory is not None:
            return self.memory
        if self.conversation is None:
            return MemoryPolicy()
        return MemoryPolicy(recent=_TURNS, store=True, recall=_MEMORIES if self.person else 0)


class StreamOptions(BaseModel):
    """What klatch acts on in `stream_options`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    include_usage: bool | None = None


class ChatFields(BaseModel):
    """What klatch acts on in a request body; everything else is the model server's to judge."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    klatch: KlatchFields = KlatchFields()

    @property
    def include_usage(self) -> bool:
        """Whether the client wants the usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Asked(BaseModel):
    """A request body that was read and checked."""

    model_config = ConfigDict(frozen=True)

    body: dict[str, JsonValue]
    fields: ChatFields

    def event(self, request: RequestId, tenant: Tenant, traceparent: str | None) -> ChatRequested:
        """What is published."""
        ours = self.fields.klatch
        context = ours.context
        if traceparent and not context.traceparent:
            context = context.model_copy(update={"traceparent": traceparent})
        return ChatRequested(
            request=request,
            tenant=tenant,
            conversation=ours.conversation or Conversation(request),
            person=ours.person,
            use_case=ours.use_case,
            body=self.body,
            prompt=ours.prompt,
            memory=ours.policy,
            skills=ours.skills,
            priority=ours.priority,
            deadline_ms=ours.deadline(now_ms()),
            if_busy=ours.if_busy,
            on_crash=ours.on_crash,
            context=context,
        )


async def read_json(raw: bytes, off_loop_bytes: int) -> dict[str, Any]:
    """A JSON object; large ones are parsed in a thread. Raises InvalidRequest."""
    try:
        parsed = await asyncio.to_thread(codec.loads, raw) if len(raw) > off_loop_bytes else codec.loads(raw)
    except Unreadable as error:
        raise InvalidRequest(f"the request body is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest("the request body must be a JSON object")
    return parsed  # pyright: ignore[reportUnknownVariableType]


def asked_in(body: Mapping[str, Any]) -> Asked:
    """Check a body. Raises InvalidRequest, naming the field."""
    return Asked.model_construct(body=without_klatch(body), fields=checked(ChatFields, body))


def checked(fields: type[M], body: Mapping[str, Any]) -> M:
    """What klatch acts on in a body. Raises InvalidRequest, naming the field."""
    try:
        return fields.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from error


def without_klatch(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of a body is the model server's."""
    return {name: value for name, value in body.items() if name != "klatch"}


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first problem of a body, named by its field."""
    problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
    field = ".".join(map(str, problem["loc"]))
    return InvalidRequest(f"{field or 'body'}: {problem['msg']}", param=field or None)
