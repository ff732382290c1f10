"""`POST /v1/embeddings`: admitted and settled in the tenant's log like a chat completion, answered by the door itself.

The texts stay here: the log gets their estimated tokens, and later what they really were. What fails is settled with
nothing, what its client or its deadline cut short with the estimate, if a server had been asked by then; a door that
dies before it settles leaves a reservation that expires.
"""

import asyncio
import base64
import struct
import time
from typing import Final, NamedTuple, Protocol

import msgspec
import structlog
from pydantic import BaseModel, ConfigDict, JsonValue

from klatch_agents.gateway.errors import ExpiredError, ModelError
from klatch_agents.gateway.port import Embedded, ModelCall
from klatch_schemas import codec
from klatch_schemas.assembly import Ended
from klatch_schemas.errors import Expired, InvalidRequest, KlatchError, NotFound, Unavailable
from klatch_schemas.events import (
    EmbeddingAdmitted,
    EmbeddingRequested,
    ModelRouted,
    Status,
    StreamEnd,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, NameField, PersonField
from klatch_streams.admission import HOLD_MS
from klatch_streams.estimate import Estimate
from klatch_streams.log import LogError
from klatch_workers.generation.conclude import cost_micros
from klatch_workers.http.auth import tenant_of
from klatch_workers.http.call import DEPLOYMENT, Call, Disconnected, header_value
from klatch_workers.http.clock import now_ms
from klatch_workers.http.door import Embeddings, TextEmbedder
from klatch_workers.http.envelope import DeadlineFields, checked, read_json, without_klatch
from klatch_workers.http.errors import error_of_end
from klatch_workers.http.intake import RETRY_AFTER_MS
from klatch_workers.http.rate_limits import rate_limit_headers, rate_limits_in
from klatch_workers.http.reader import Reader, Stream
from klatch_workers.http.runtime import Runtime

log = structlog.get_logger("klatch.http.embeddings")

_ESTIMATE: Final = Estimate()


class EmbeddingFields(DeadlineFields):
    """`"klatch": {...}` of a request body: whom it counts for, and until when."""

    person: PersonField | None = None
    use_case: NameField = "default"


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    input: JsonValue
    model: str = ""
    klatch: EmbeddingFields = EmbeddingFields()


class _Paid(NamedTuple):
    """What a call came to."""

    status: Status = "failed"
    usage: Usage = Usage()
    deployment: str = ""


async def embeddings(runtime: Runtime, call: Call) -> None:
    """Answer a request for embeddings. Raises KlatchError, ModelError, LogError, Disconnected."""
    call.tenant = tenant_of(call.header(b"authorization"), runtime.door.keys)
    if (embedder := runtime.door.embeddings) is None:
        raise NotFound("this klatch serves no embeddings: start it with an embedding model")
    terms = runtime.door.terms
    body = await read_json(await call.body(terms.max_body_bytes), terms.off_loop_bytes)
    asked = checked(_Asked, body)
    now = now_ms()
    until_ms = _until(asked.klatch, now)
    event = _event(call, asked, min(until_ms, now + int(terms.admission_timeout_s * 1_000)))
    admitted = await _admitted(runtime, call, event, until_ms)
    began, making = time.monotonic(), _Making(call, event.tokens)
    model_call = ModelCall(
        without_klatch(body),
        request=call.request,
        tenant=call.tenant,
        weight=admitted.weight,
        priority=admitted.priority,
        deadline=until_ms / 1_000,
        before_send=making.sent,
        failed=making.failed,
    )
    try:
        embedded = await making.made(embedder, model_call)
        told = [(DEPLOYMENT, header_value(embedded.deployment))] if embedded.deployment else None
        await call.answer(200, embedded.answer, told)
    finally:
        await _settle(runtime, event, making.paid, int((time.monotonic() - began) * 1_000))


def _until(fields: EmbeddingFields, now: int) -> int:
    deadline_ms = fields.deadline(now)
    # None outlasts its reservation.
    return now + HOLD_MS if deadline_ms is None else min(deadline_ms, now + HOLD_MS)


class _Making:
    """A model's call for a client that may leave before the answer, and what the call comes to."""

    def __init__(self, call: Call, estimated: int) -> None:
        self.paid = _Paid()
        self._call = call
        self._estimated = estimated
        self._asked: str | None = None

    async def sent(self, deployment: str) -> None:
        """See `ModelCall.before_send`."""
        self._asked = deployment

    def failed(self, _: ModelError) -> None:
        """See `ModelCall.failed`."""
        self._asked = None

    async def made(self, embedder: Embeddings, asked: ModelCall) -> Embedded:
        """The answer. Raises KlatchError, ModelError; Expired at the deadline, Disconnected when the client is gone."""
        assert asked.deadline is not None  # noqa: S101 - set above
        making = asyncio.ensure_future(embedder.embed(asked))
        self._call.watch(making.cancel)
        patience = asyncio.timeout(asked.deadline - time.time())
        try:
            async with patience:
                embedded = await making
        except (ExpiredError, TimeoutError) as late:
            if isinstance(late, TimeoutError) and not patience.expired():
                raise
            self._cut("expired")
            raise _too_late() from None
        except asyncio.CancelledError:
            if not self._call.gone:
                raise
            self._cut("cancelled")
            raise Disconnected from None
        self.paid = _Paid("completed", _usage(embedded, self._estimated), embedded.deployment)
        return embedded

    def _cut(self, status: Status) -> None:
        # A server that was asked has read the texts, whoever waits for what it makes of them.
        if self._asked is None:
            self.paid = _Paid(status)
        else:
            self.paid = _Paid(status, Usage(prompt_tokens=self._estimated, estimated=True), self._asked)


def _too_late() -> Expired:
    return Expired("the deadline passed before there was an answer")


def _event(call: Call, asked: _Asked, decided_by_ms: int) -> EmbeddingRequested:
    return EmbeddingRequested(
        request=call.request,
        tenant=call.tenant,
        conversation=Conversation(call.request),
        person=asked.klatch.person,
        use_case=asked.klatch.use_case,
        model=asked.model,
        tokens=_ESTIMATE.of_input(asked.input),
        # What is decided later is decided for nobody.
        deadline_ms=decided_by_ms,
    )


async def _admitted(runtime: Runtime, call: Call, event: EmbeddingRequested, until_ms: int) -> EmbeddingAdmitted:
    partition = runtime.partition(event.conversation)
    async with runtime.intake.turn(partition):
        reader = await runtime.hub.open(Stream(event.tenant, event.request), partition)
    try:
        draft = codec.draft(runtime.request_topic, event.tenant, event, traceparent=call.header(b"traceparent"))
        await runtime.intake.append(draft, runtime.requests_of(event.tenant))
        decided = await _decided(runtime, call, event, reader, until_ms)
    finally:
        await reader.close()
    if isinstance(decided, EmbeddingAdmitted):
        return decided
    raise error_of_end(Ended(decided.status, decided)) or _too_late()


async def _decided(
    runtime: Runtime, call: Call, event: EmbeddingRequested, reader: Reader, until_ms: int
) -> EmbeddingAdmitted | StreamEnd:
    by_ms = event.deadline_ms or until_ms
    try:
        async with asyncio.timeout(by_ms / 1_000 - time.time()):
            return await _decision(call, reader)
    except BaseException as error:
        # It may be let in all the same, for nobody: what settles it stands behind it in the tenant's log.
        late = isinstance(error, TimeoutError) and by_ms == until_ms
        await _settle(runtime, event, _Paid("expired" if late else "failed"), 0)
        if not isinstance(error, TimeoutError):
            raise
        if late:
            raise _too_late() from None
        raise Unavailable("no admission worker answers; try again", retry_after_ms=RETRY_AFTER_MS) from None


async def _decision(call: Call, reader: Reader) -> EmbeddingAdmitted | StreamEnd:
    while True:
        heard = await reader.read()
        if limits := rate_limits_in(heard):
            call.rate_limits = rate_limit_headers(limits)
        for _, said in heard:
            if isinstance(said, EmbeddingAdmitted | StreamEnd):
                return said


async def _settle(runtime: Runtime, event: EmbeddingRequested, paid: _Paid, total_ms: int) -> None:
    settled = UsageSettled(
        request=event.request,
        tenant=event.tenant,
        person=event.person,
        use_case=event.use_case,
        model=event.model,
        deployment=paid.deployment,
        status=paid.status,
        usage=paid.usage,
        cost_micros=cost_micros(paid.usage, runtime.door.prices(event.model, paid.deployment)),
        total_ms=total_ms,
    )
    draft = codec.draft(runtime.request_topic, event.tenant, settled)
    try:
        await runtime.intake.append(draft, runtime.requests_of(event.tenant))
    except (KlatchError, LogError, TimeoutError) as error:
        # Its reservation expires, and the estimate stands as its cost.
        log.warning("settlement.failed", request=event.request, error=str(error))


# --- what was used ------------------------------------------------------------------------------------------------


class _Counted(msgspec.Struct):
    prompt_tokens: int = 0


class _Answer(msgspec.Struct):
    usage: _Counted | None = None


_read: Final = msgspec.json.Decoder(_Answer).decode


def _usage(embedded: Embedded, estimated: int) -> Usage:
    """What the server counted; the estimate where it did not."""
    try:
        counted = _read(embedded.answer).usage
    except msgspec.DecodeError:
        counted = None
    if counted is None or counted.prompt_tokens <= 0:
        return Usage(prompt_tokens=estimated, estimated=True)
    return Usage(prompt_tokens=counted.prompt_tokens, estimated=embedded.estimated)


# --- who embeds ---------------------------------------------------------------------------------------------------


class TextEmbeddings:
    """`Embeddings` by a local model that turns texts into vectors."""

    def __init__(self, model: str, embed: TextEmbedder) -> None:
        self._model = model
        self._embed = embed

    async def embed(self, call: ModelCall) -> Embedded:
        """See `Embeddings.embed`. Raises InvalidRequest."""
        body = call.body
        texts, encoded = _texts(body.get("input")), _encoded(body.get("encoding_format"))
        if call.before_send:
            await call.before_send(call.deployment)
        vectors = await self._embed(texts)
        if body.get("dimensions") not in (None, size := len(vectors[0])):
            raise InvalidRequest(
                f"dimensions: vectors of this model have {size} numbers, always; ask for {size}, or leave it out",
                param="dimensions",
            )
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if encoded else vector}
            for index, vector in enumerate(vectors)
        ]
        # The model does not say how many tokens it read.
        tokens = _ESTIMATE.of_input(texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = codec.dumps({"object": "list", "model": self._model, "data": data, "usage": usage})
        return Embedded(answer, estimated=True)


class Routes(Protocol):
    """The routes of model names."""

    def find(self, alias: str) -> ModelRouted | None:
        """The route of a model name."""
        ...


class RoutedEmbeddings:
    """`Embeddings` of the model that a request names, if it has a route; else of klatch's own, whatever it names."""

    def __init__(self, routes: Routes, routed: Embeddings, own: Embeddings | None) -> None:
        self._routes = routes
        self._routed = routed
        self._own = own

    async def embed(self, call: ModelCall) -> Embedded:
        """See `Embeddings.embed`. Raises NotFound."""
        if self._routes.find(str(call.body.get("model") or "")):
            return await self._routed.embed(call)
        if self._own is None:
            raise NotFound("no route names this model, and this klatch has no embedding model of its own")
        return await self._own.embed(call)


def _texts(said: object) -> list[str]:
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):  # pyright: ignore[reportUnknownVariableType]
        raise InvalidRequest("input: a text, or a list of texts, none of them empty", param="input")
    return [str(text) for text in texts]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _encoded(said: object) -> bool:
    """Whether vectors are asked for as base64 of little-endian floats, as OpenAI's own client does by default."""
    if said not in (None, "float", "base64"):
        raise InvalidRequest("encoding_format: 'float' (the default) or 'base64'", param="encoding_format")
    return said == "base64"


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
