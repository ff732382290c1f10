"""Every event that klatch writes or reads, frozen and versioned in its own kind.

An event's `kind` (`stream.delta.v1`) is part of its JSON value, so that a value alone, from kcat or from any
language, can be read. Models are closed where we write; the codec reads them tolerantly, so that a field added by
a newer version does not stop an older reader. Times are milliseconds since the Unix epoch, UTC.

Over 400 lines on purpose: the contract is read from top to bottom, topic by topic.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from klatch_schemas.ids import (
    ConversationField,
    LabelField,
    NameField,
    PersonField,
    RequestIdField,
    TenantField,
    WriterField,
)

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[int, Field(ge=0)]
Deadline = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""Milliseconds since the epoch, in 64 bits: clocks are floats, and there are integers that no float can hold."""
ChatBody = dict[str, JsonValue]
"""A Chat Completions request body, as the producer wrote it; unknown fields survive to the model."""


class Part(BaseModel):
    """A frozen, closed value inside an event."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Event(Part):
    """A frozen, closed event; subclasses fix `kind`."""

    KIND: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.KIND = cls.model_fields["kind"].default


# --- chat.requests -----------------------------------------------------------------------------------------------


class PromptReference(Part):
    """Which prompt of the ledger to render as the system message, and with what."""

    name: NameField
    version: Annotated[int, Field(ge=1)] | None = None
    """None: the version in force."""
    variables: Mapping[str, JsonValue] = {}


class MemoryPolicy(Part):
    """What a request may recall, and whether it may be remembered."""

    recent: Annotated[int, Field(ge=0, le=200)] = 0
    """How many finished turns of the conversation, newest first, precede the request's own messages."""
    recall: Annotated[int, Field(ge=0, le=50)] = 0
    """How many memories of the person are looked up by similarity."""
    store: bool = False
    """Whether the finished turn is embedded into the vector index."""


class RequestContext(Part):
    """What is known about the asking side; all of it optional."""

    locale: str | None = None
    consent: Mapping[str, bool] = {}
    experiments: Mapping[str, str] = {}
    """Arms forced for this request, by experiment."""
    traceparent: str | None = None


IfBusy = Literal["enqueue", "reject", "interrupt", "rollback"]
OnCrash = Literal["restart", "continue"]


class ChatRequested(Event):
    """A producer asks for a chat completion."""

    kind: Literal["chat.requested.v1"] = "chat.requested.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    person: PersonField | None = None
    use_case: NameField = "default"
    body: ChatBody
    prompt: PromptReference | None = None
    memory: MemoryPolicy = MemoryPolicy()
    skills: tuple[NameField, ...] = ()
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    """0 is served first."""
    deadline_ms: Deadline | None = None
    if_busy: IfBusy = "enqueue"
    """What to do if earlier requests of the conversation are not finished: wait for them; end `rejected`
    (`conversation_busy`); cancel them, what they said stands; or cancel them and remember nothing of their turns."""
    on_crash: OnCrash = "restart"
    """How a later attempt treats the text of an earlier one. `continue` holds where the model server can go on from a
    partial answer and the answer is one choice of plain text; anywhere else the later attempt restarts."""
    context: RequestContext = RequestContext()

    @property
    def stands_alone(self) -> bool:
        """Whether it is a conversation of its own that nothing follows: no later request recalls its turn."""
        return str(self.conversation) == str(self.request) and not (self.memory.recent or self.memory.store)


class EmbeddingRequested(Event):
    """A door asks whether a tenant may have texts embedded. The texts stay at the door: admission counts, nobody reads.

    `embedding.admitted`, or a `stream.end` that says why not, answers it, under the conversation's key.
    """

    kind: Literal["embedding.requested.v1"] = "embedding.requested.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    person: PersonField | None = None
    use_case: NameField = "default"
    model: str = ""
    tokens: Count = 0
    """How many the texts are estimated to be."""
    deadline_ms: Deadline | None = None


class Usage(Part):
    """Tokens as the model server counted them; `cached` is part of `prompt`, `reasoning` of `completion`."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count = 0
    reasoning_tokens: Count = 0
    estimated: bool = False
    """True when the server sent no count and klatch counted itself."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


Status = Literal["completed", "cancelled", "blocked", "rejected", "expired", "failed"]


class UsageSettled(Event):
    """What a request really used, however it ended: settles its reservation."""

    kind: Literal["usage.settled.v1"] = "usage.settled.v1"
    request: RequestIdField
    tenant: TenantField
    person: PersonField | None = None
    use_case: NameField = "default"
    model: str = ""
    deployment: str = ""
    """As in `stream.end`."""
    status: Status
    usage: Usage
    first_token_ms: Milliseconds | None = None
    """From the request's timestamp in the log to its first delta."""
    total_ms: Milliseconds = 0
    cost_micros: Count = 0
    """In millionths of a US dollar, by the price of the deployment that served; 0 where no price is known."""


class UsageRunning(Event):
    """A reply has nearly used up what it was granted: admission answers with `stream.budget`."""

    kind: Literal["usage.running.v1"] = "usage.running.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    tokens: Count
    """Completion tokens so far, as klatch counts them."""
    granted: Count
    """The grant that the asker knows of; one that is lower than admission's is only told the present one."""


class Limits(Part):
    """What one scope may use; None is no limit. Days and months are UTC's; micros are millionths of a US dollar."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    concurrent_requests: Count | None = None
    tokens_per_month: Count | None = None
    cost_micros_per_day: Count | None = None
    cost_micros_per_month: Count | None = None
    burst_requests: Count | None = None
    """How many requests a minute may have beyond `requests_per_minute`, as long as no hour has over 60 times that."""
    burst_tokens: Count | None = None
    """The same for `tokens_per_minute`."""


Subject = LabelField
"""One use case, person or model by its name, or `*`: each of them by itself."""


class LimitRule(Part):
    """Limits of a part of a tenant's requests: of those that match all that is named.

    Of several rules over the same dimensions the one that names most (rather than `*`) applies, and it alone. A rule
    that names nothing limits nothing: the tenant's own limits stand in `limits`.
    """

    use_case: Subject | None = None
    person: Subject | None = None
    model: Subject | None = None
    """The model as it is asked for."""
    limits: Limits = Limits()


class TokenPrice(Part):
    """Millionths of a US dollar for a million tokens: what $2.50 a million costs is 2500000."""

    prompt: Count = 0
    completion: Count = 0


Weight = Annotated[float, Field(ge=0.01, le=100)]
PriorityClass = Annotated[int, Field(ge=0, le=9)]


class QuotaLimitSet(Event):
    """An operator sets all of a tenant's limits, in the tenant's own log, so that every decision has one order."""

    kind: Literal["quota.limit_set.v1"] = "quota.limit_set.v1"
    tenant: TenantField
    limits: Limits
    rules: Annotated[tuple[LimitRule, ...], Field(max_length=500)] = ()
    weight: Weight = 1.0
    """The tenant's share where a model's capacity is the bottleneck."""
    priority: PriorityClass = 0
    """The best priority that the tenant's requests get, whatever they ask for."""
    prices: Mapping[str, TokenPrice] = {}
    """By model as it is asked for, the highest price that it may cost: what reservations of money go by."""
    by: str = ""


# --- chat.admitted -----------------------------------------------------------------------------------------------


class Reservation(Part):
    """What admission set aside for a request until its usage is settled."""

    tokens: Count
    expires_ms: Milliseconds
    cost_micros: Count = 0
    granted: Count | None = None
    """How many completion tokens the reply may have before it asks for more (`usage.running`); None: no need to ask."""
    limit: str | None = None
    """The budget that bounds the grant."""


class RateLimit(Part):
    """Where a request stands with a limit, itself counted."""

    name: str
    """As in `Limits`."""
    limit: Count
    remaining: Count
    reset_ms: Milliseconds
    """From the request's decision until nothing of it would be used, if nothing else came."""


class RateLimits(Part):
    """Of all limits that a request counts against, those with the least left."""

    requests: RateLimit | None = None
    tokens: RateLimit | None = None


class ChatAdmitted(Event):
    """Admission let a request through."""

    kind: Literal["chat.admitted.v1"] = "chat.admitted.v1"
    request: ChatRequested
    requested_ms: Milliseconds
    """The request's timestamp in the log: latencies count from here."""
    reservation: Reservation
    weight: Weight = 1.0
    """The tenant's share where a model's capacity is the bottleneck."""
    rate_limits: RateLimits | None = None


class Refusal(Part):
    """Why admission refused, and when to try again."""

    code: Literal["rate_limit_exceeded", "deadline_exceeded"]
    limit: str | None = None
    """The name of the limit that refused, as in `Limits`."""
    scope: str | None = None
    """What it limits, if not the whole tenant: dimensions such as `person` or `use_case+model`."""
    message: str
    retry_after_ms: Milliseconds | None = None


class ChatRefused(Event):
    """Admission refused a request; its stream has ended with the same words."""

    kind: Literal["chat.refused.v1"] = "chat.refused.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    use_case: NameField = "default"
    model: str = ""
    refusal: Refusal


# --- trust.verdicts ----------------------------------------------------------------------------------------------


class Finding(Part):
    """Something a judge found in a passage of the body."""

    category: NameField
    path: tuple[str | int, ...]
    """Where the passage stands in the body: `("messages", 2, "content")`."""
    start: Count
    end: Count
    """Half-open range in Unicode code points of the passage."""
    replacement: str | None = None
    """What a redaction puts in its place."""


Decision = Literal["allow", "redact", "block", "escalate"]


class TrustVerdict(Event):
    """What screening decided about a request's text. Never holds the text itself."""

    kind: Literal["trust.verdict.v1"] = "trust.verdict.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    stage: Literal["input", "stream", "tool_result", "output"]
    decision: Decision
    categories: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    policy: str
    """The version of the policy that decided."""
    degraded: bool = False
    """True when a judge failed and the policy's `on_judge_failure` decided."""


# --- chat.stream -------------------------------------------------------------------------------------------------


class StreamAttempt(Event):
    """Opens attempt `attempt`: supersedes all lower ones from its own log position on."""

    kind: Literal["stream.attempt.v1"] = "stream.attempt.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    attempt: Annotated[int, Field(ge=1)]
    writer: WriterField
    mode: Literal["restart", "continue"] = "restart"
    rate_limits: RateLimits | None = None


class StreamDelta(Event):
    """One chunk of a reply, as the model server sent it."""

    kind: Literal["stream.delta.v1"] = "stream.delta.v1"
    request: RequestIdField
    attempt: Annotated[int, Field(ge=1)]
    writer: WriterField
    seq: Count
    """Contiguous from 0 within an attempt."""
    chunk: dict[str, JsonValue]
    """A `chat.completion.chunk` object, its bytes untouched in the log."""
    deployment: str = ""
    """Of an attempt's first delta: which deployment answers; `default` where no route names the model."""


class StreamCancel(Event):
    """Anyone who may write may cancel, at any time; the first of cancel and end in the log wins."""

    kind: Literal["stream.cancel.v1"] = "stream.cancel.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    by: str
    reason: str = ""
    undo: bool = False
    """Whether the turn is not to be remembered either: `chat.turns` gets no record of it."""


class StreamError(Part):
    """Why a stream ended other than by completion; `code` is one of `klatch_schemas.errors`."""

    code: str
    message: str
    retry_after_ms: Milliseconds | None = None
    limit: str | None = None
    upstream: Mapping[str, JsonValue] | None = None
    """The model server's own error object, passed through."""


class StreamEnd(Event):
    """Closes a stream. Exactly one counts: the first of the current attempt, or of no attempt (0)."""

    kind: Literal["stream.end.v1"] = "stream.end.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    attempt: Count = 0
    writer: WriterField
    seq: Count = 0
    """How many deltas the attempt wrote: a reader that has fewer has lost some."""
    status: Status
    finish_reason: str | None = None
    """Of choice 0; each choice's own stands in its last delta."""
    model: str = ""
    deployment: str = ""
    """Which deployment answered last, or, where a reply was cut before its first word, was asked last; `default` where
    no route names the model, empty when none was asked, or all that were asked failed."""
    usage: Usage | None = None
    trailer: tuple[dict[str, JsonValue], ...] = ()
    """Chunks without choices that followed the last one, such as the usage chunk."""
    upstream_request: str | None = None
    """The model server's own id of the call: the handle for a ticket with its vendor."""
    error: StreamError | None = None
    rate_limits: RateLimits | None = None
    stopped_by: str | None = None
    """The budget that was spent, for a reply that was cut there (`finish_reason: length`)."""


class StreamRetract(Event):
    """Takes back the deltas of the current attempt from `from_seq` on (a late trust verdict)."""

    kind: Literal["stream.retract.v1"] = "stream.retract.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    from_seq: Count
    reason: str = ""


class StreamBudget(Event):
    """Admission's answer to `usage.running`: how far the reply may go. Nothing to readers."""

    kind: Literal["stream.budget.v1"] = "stream.budget.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    granted: Count
    """Completion tokens in all; never less than before."""
    limit: str | None = None
    """The budget that is spent: there will be no more."""


class EmbeddingAdmitted(Event):
    """Admission's answer to `embedding.requested`: the door may have the texts embedded. Nothing to readers."""

    kind: Literal["embedding.admitted.v1"] = "embedding.admitted.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    weight: Weight = 1.0
    """The tenant's share where a model's capacity is the bottleneck."""
    priority: PriorityClass = 5
    rate_limits: RateLimits | None = None


# --- chat.turns, memory ------------------------------------------------------------------------------------------


class TurnFinished(Event):
    """One finished turn: what was new in it, and what it was made with."""

    kind: Literal["chat.turn.v1"] = "chat.turn.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    person: PersonField | None = None
    use_case: NameField = "default"
    status: Status
    messages: tuple[dict[str, JsonValue], ...]
    """The request's own messages as the model saw them (redacted), without history and recalled text."""
    reply: tuple[dict[str, JsonValue], ...]
    """The assistant's message of each choice, as far as it got."""
    model: str = ""
    prompt: PromptReference | None = None
    usage: Usage
    arms: Mapping[str, str] = {}
    recalled: tuple[str, ...] = ()
    """Ids of the memories the prompt held."""
    store: bool = False
    attempt: Count
    started_ms: Milliseconds
    finished_ms: Milliseconds
    previous: int | None = None
    """Offset, in this partition, of the conversation's previous turn."""


class ExperienceLearned(Event):
    """A preference or fact about a person, with where it came from."""

    kind: Literal["memory.experience.v1"] = "memory.experience.v1"
    tenant: TenantField
    person: PersonField
    name: NameField
    text: str
    requests: tuple[RequestIdField, ...] = ()


# --- ledgers -----------------------------------------------------------------------------------------------------


class PromptPublished(Event):
    """A version of a prompt; the highest version in the ledger is in force. Versions are immutable."""

    kind: Literal["prompt.published.v1"] = "prompt.published.v1"
    tenant: TenantField | None = None
    """None: for all tenants."""
    name: NameField
    version: Annotated[int, Field(ge=1)]
    template: str
    by: str = ""


class SkillRegistered(Event):
    """A skill that a downstream service offers."""

    kind: Literal["skill.registered.v1"] = "skill.registered.v1"
    name: NameField
    version: Annotated[int, Field(ge=1)]
    description: str
    parameters: dict[str, JsonValue]
    """JSON Schema of the arguments."""


Share = Annotated[float, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


class Prices(Part):
    """US dollars a million tokens."""

    prompt: Share = 0.0
    cached: Share | None = None
    """Of those prompt tokens that the server had cached; None: the same as the others."""
    completion: Share = 0.0


class Deployment(Part):
    """A model on a server. It never holds a secret: `key` names one that workers are given apart."""

    name: NameField
    """What answers, logs and settlements call it. Routes that name the same deployment share its health and slots."""
    kind: Literal["openai", "azure", "vllm", "openai-compatible", "local"] = "openai-compatible"
    """`local` is the server that each worker's own `KLATCH_MODEL_URL` names."""
    url: str = ""
    """With its `/v1`; of Azure the resource, `https://NAME.openai.azure.com`."""
    model: str | None = None
    """What the server calls it: a model, a LoRA adapter, an Azure deployment; None: the route's alias."""
    key: NameField | None = None
    auth: Literal["key", "token"] = "key"
    """Azure takes a key as `api-key`, an Entra token as `Authorization: Bearer`; all others take both as the latter."""
    api_version: str | None = None
    """Azure's."""
    weight: Share = 1.0
    """Its share among the deployments of its tier; 0 takes it out."""
    tier: Count = 0
    """A tier is used while none of a lower one can be."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Calls under way at once, per process that calls; None: no limit."""
    priority: bool = False
    """vLLM: pass the request's priority on, which needs `--scheduling-policy priority`."""
    continues: Literal["none", "vllm", "prefill"] | None = None
    """How it goes on with an answer that broke off; None: vLLM in its own way, others do not."""
    prices: Prices | None = None


class RouteTimeouts(Part):
    """The longest silences of a call; there is none for a whole reply."""

    connect_s: Seconds = 10.0
    first_token_s: Seconds = 300.0
    idle_s: Seconds = 60.0


class CircuitBreaker(Part):
    """When a deployment is left alone for a while."""

    failures: Count = 5
    """After so many calls in a row that failed; 0: never."""
    cool_down_s: Seconds = 10.0
    """For so long; then one call tries it, and doubles this, up to eight times, if it fails again."""


class ModelRouted(Event):
    """Where requests for a model name go."""

    kind: Literal["model.routed.v1"] = "model.routed.v1"
    alias: LabelField
    """The model name that clients ask for."""
    deployments: tuple[Deployment, ...]
    timeouts: RouteTimeouts = RouteTimeouts()
    tries: Annotated[int, Field(ge=1, le=20)] = 3
    """Calls that one request may cost before its first token."""
    breaker: CircuitBreaker = CircuitBreaker()
    by: str = ""


class ExperimentSet(Event):
    """An experiment's arms and their weights; buckets are hashes of the person."""

    kind: Literal["experiment.set.v1"] = "experiment.set.v1"
    name: NameField
    arms: Mapping[str, Annotated[float, Field(ge=0)]]


class ApiKey(Part):
    """An API key, known only by its hash."""

    id: NameField
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TenantConfigured(Event):
    """A tenant, who may speak for it, and what it may use."""

    kind: Literal["tenant.configured.v1"] = "tenant.configured.v1"
    tenant: TenantField
    keys: tuple[ApiKey, ...] = ()
    limits: Limits = Limits()
    rules: Annotated[tuple[LimitRule, ...], Field(max_length=500)] = ()
    weight: Weight = 1.0
    priority: PriorityClass = 0
    prices: Mapping[str, TokenPrice] = {}
    """As in `quota.limit_set`, which holds what is in force."""


class SkillCalled(Event):
    """A model asked for a skill."""

    kind: Literal["skill.called.v1"] = "skill.called.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    call: str
    """Idempotency key of the call."""
    skill: NameField
    arguments: str


class SkillReturned(Event):
    """What a skill answered."""

    kind: Literal["skill.returned.v1"] = "skill.returned.v1"
    request: RequestIdField
    tenant: TenantField
    conversation: ConversationField
    call: str
    content: str
    failed: bool = False


# --- state -------------------------------------------------------------------------------------------------------


class Snapshot(Event):
    """A decider's state for one key, with the input offset that it has applied.

    Restoring takes the record with the highest `applied` of a key, not the last: a zombie may write late.
    """

    kind: Literal["state.snapshot.v1"] = "state.snapshot.v1"
    key: str
    applied: int
    state: JsonValue


EVENTS: tuple[type[Event], ...] = (
    ChatRequested,
    EmbeddingRequested,
    UsageSettled,
    UsageRunning,
    QuotaLimitSet,
    ChatAdmitted,
    ChatRefused,
    TrustVerdict,
    StreamAttempt,
    StreamDelta,
    StreamCancel,
    StreamEnd,
    StreamRetract,
    StreamBudget,
    EmbeddingAdmitted,
    TurnFinished,
    ExperienceLearned,
    PromptPublished,
    SkillRegistered,
    ModelRouted,
    ExperimentSet,
    TenantConfigured,
    SkillCalled,
    SkillReturned,
    Snapshot,
)
