"""From an admitted request to the call of a model: verdict, redaction, prompt, recent turns, recalled memories.

Recalling and reading recent turns start on admission, beside screening; nothing of it reaches a model before the
verdict. Recall that fails or is too slow is left out, and said so in the log: a reply without a memory is better
than none. A reply that has forgotten its conversation is not: recent turns that the log does not give are waited for,
as long as a verdict. A prompt that does not exist or does not render fails the request, with the words that mend it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import structlog

from klatch_agents.gateway.port import ModelCall, Timeouts
from klatch_agents.prompts import PromptFailed, Prompts, compose_messages
from klatch_agents.trust.redact import redact
from klatch_schemas import codec
from klatch_schemas.chunks import Json, objects_in
from klatch_schemas.codec import Unreadable
from klatch_schemas.errors import Unavailable
from klatch_schemas.events import ChatAdmitted, ChatRequested, PromptPublished, StreamError, TrustVerdict, TurnFinished
from klatch_streams.generation import Ready
from klatch_streams.log import LogError
from klatch_workers.generation.conclude import Asked
from klatch_workers.generation.table import Tracked
from klatch_workers.generation.turns import Conversations

log = structlog.get_logger(__name__)


class Memory(NamedTuple):
    """Something remembered of a person."""

    id: str
    text: str


class Recaller(Protocol):
    """Looks up what a person said before."""

    async def recall(self, tenant: str, person: str, text: str, most: int) -> Sequence[Memory]:
        """The memories nearest to `text`, of this tenant's person only. Raises RecallFailed."""
        ...


class RecallFailed(Exception):
    """Nothing could be recalled just now."""


class PromptBook(Protocol):
    """The prompts in force."""

    def find(self, tenant: str, name: str, version: int | None) -> PromptPublished | None:
        """A tenant's prompt, or everybody's; without a version, the one in force."""
        ...


class PreparingFailed(Exception):
    """The request cannot be sent to a model, for the reason said."""

    def __init__(self, said: StreamError) -> None:
        super().__init__(said.message)
        self.said = said


_AGAIN_MS: Final = 5_000
"""When to ask again for what failed on a part of klatch that did not answer for minutes."""

_NOT_JUDGED: Final = StreamError(
    code=Unavailable.code,
    message="trust did not judge the request in time; nothing was sent to a model: try again",
    retry_after_ms=_AGAIN_MS,
)
_NOT_READ: Final = StreamError(
    code=Unavailable.code,
    message="the conversation's turns could not be read in time; nothing was sent to a model: try again",
    retry_after_ms=_AGAIN_MS,
)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
"""Between tries to read turns; doubled by each failure."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a model is to be asked."""

    ready: Ready
    call: ModelCall
    model: str = ""
    messages: tuple[Json, ...] = ()
    prompt_version: int | None = None
    recalled: tuple[str, ...] = ()

    def asked(self, spoke: bool) -> Asked:
        """What concluding needs to know of it."""
        return Asked(self.messages, self.prompt_version, self.recalled, spoke)


@dataclass(frozen=True, slots=True)
class Preparer:
    """Prepares requests; one a process."""

    prompts: PromptBook
    recaller: Recaller | None = None
    model: str | None = None
    """Asked for instead of the request's own model, if set."""
    timeouts: Timeouts = Timeouts()
    recall_patience_s: float = 1.0
    verdict_patience_s: float = 300.0
    """How long screening may take for a request whose turn it is: without a verdict nothing reaches a model.

    And how long the log may take to give the conversation's turns.
    """
    renderer: Prompts = field(default_factory=Prompts)

    async def prepare(self, admitted: ChatAdmitted, tracked: Tracked, conversations: Conversations) -> Prepared:
        """Wait for the verdict and make the call. Raises PreparingFailed."""
        request = admitted.request
        gathering = asyncio.ensure_future(self._gather(request, conversations))
        # What it fails with is of interest only if somebody gets as far as to await it.
        gathering.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await self._judged(tracked)
            assert tracked.verdict  # noqa: S101 - awaited just now
            ready = Ready(tracked.verdict.decision, tracked.verdict.categories)
            body = redacted(request, tracked.verdict)
            if ready.decision in {"block", "escalate"}:
                return Prepared(ready, ModelCall(body))
            return self._compose(admitted, ready, body, *await gathering)
        finally:
            gathering.cancel()

    async def _judged(self, tracked: Tracked) -> None:
        try:
            async with asyncio.timeout(self.verdict_patience_s):
                await tracked.until(lambda: tracked.verdict is not None)
        except TimeoutError:
            log.warning("verdict.missing", request=tracked.request, waited_s=self.verdict_patience_s)
            raise PreparingFailed(_NOT_JUDGED) from None

    async def _gather(
        self, request: ChatRequested, conversations: Conversations
    ) -> tuple[Sequence[Memory], Sequence[TurnFinished]]:
        return await asyncio.gather(self._recall(request), self._recent(request, conversations))

    async def _recall(self, request: ChatRequested) -> Sequence[Memory]:
        text = last_user_text(request.body)
        if not (request.memory.recall and request.person and text):
            return ()
        try:
            if self.recaller is None:
                raise RecallFailed("no memory worker is configured: set KLATCH_MEMORY_URL")
            async with asyncio.timeout(self.recall_patience_s):
                return await self.recaller.recall(request.tenant, request.person, text, request.memory.recall)
        except (RecallFailed, TimeoutError) as error:
            log.warning("recall.skipped", request=request.request, reason=str(error) or "too slow")
            return ()

    async def _recent(self, request: ChatRequested, conversations: Conversations) -> Sequence[TurnFinished]:
        if not request.memory.recent:
            return ()
        try:
            async with asyncio.timeout(self.verdict_patience_s):
                return await _read(request, conversations)
        except TimeoutError:
            log.warning("turns.missing", request=request.request, waited_s=self.verdict_patience_s)
            raise PreparingFailed(_NOT_READ) from None

    def _compose(
        self,
        admitted: ChatAdmitted,
        ready: Ready,
        body: Mapping[str, object],
        recalled: Sequence[Memory],
        recent: Sequence[TurnFinished],
    ) -> Prepared:
        request, own = admitted.request, _messages(body)
        prompt, system = self._system(request)
        if system or recalled or recent:
            past = [message for turn in recent for message in (*_said(turn), *turn.reply[:1])]
            composed = compose_messages(own, system, [memory.text for memory in recalled], past)
            body = {**body, "messages": composed}
        return Prepared(
            ready=ready,
            call=self._call(admitted, body),
            model=self.model or str(body.get("model") or ""),
            messages=tuple(own),
            prompt_version=prompt.version if prompt else None,
            recalled=tuple(memory.id for memory in recalled),
        )

    def _call(self, admitted: ChatAdmitted, body: Mapping[str, object]) -> ModelCall:
        request = admitted.request
        return ModelCall(
            body,
            model=self.model,
            timeouts=self.timeouts,
            headers=_headers(request),
            request=request.request,
            tenant=request.tenant,
            weight=admitted.weight,
            priority=request.priority,
            deadline=None if request.deadline_ms is None else request.deadline_ms / 1000,
        )

    def _system(self, request: ChatRequested) -> tuple[PromptPublished | None, str]:
        wanted = request.prompt
        if wanted is None:
            return None, ""
        prompt = self.prompts.find(request.tenant, wanted.name, wanted.version)
        if prompt is None:
            version = "" if wanted.version is None else f" version {wanted.version}"
            raise PreparingFailed(
                StreamError(
                    code="invalid_request",
                    message=f"prompt {wanted.name!r}{version} is not in the ledger: publish it, or name another",
                )
            )
        try:
            return prompt, self.renderer.render(prompt, wanted.variables)
        except PromptFailed as error:
            raise PreparingFailed(StreamError(code=error.code, message=error.message)) from error


def _said(turn: TurnFinished) -> list[Json]:
    # Instructions are this request's to give: those of earlier ones would pile up, and contradict.
    return [message for message in turn.messages if message.get("role") not in {"system", "developer"}]


async def _read(request: ChatRequested, conversations: Conversations) -> Sequence[TurnFinished]:
    """The conversation's recent turns, however long it takes; none if one of them cannot be read by anybody."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await conversations.recent(request.tenant, request.conversation, request.memory.recent)
        except Unreadable as error:
            log.warning("turns.skipped", request=request.request, reason=str(error))
            return ()
        except LogError as error:
            log.warning("turns.awaited", request=request.request, reason=str(error), pause_s=pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def redacted(request: ChatRequested, verdict: TrustVerdict) -> Mapping[str, object]:
    """The request's body as trust lets it through."""
    if verdict.decision != "redact":
        return request.body
    return redact(request.body, verdict.findings)


def asked_before(request: ChatRequested, verdict: TrustVerdict | None) -> Asked:
    """What an earlier owner asked with, as far as its turn needs it; without a verdict nothing is repeated."""
    messages = _messages(redacted(request, verdict)) if verdict else []
    return Asked(tuple(messages), spoke=True)


def last_user_text(body: Mapping[str, object]) -> str:
    """The text of the last user message: what memories are looked up by."""
    for message in reversed(_messages(body)):
        if message.get("role") == "user":
            return _text_of(message.get("content"))
    return ""


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in objects_in(content)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _messages(body: Mapping[str, object]) -> list[Json]:
    return objects_in(body.get("messages"))


def _headers(request: ChatRequested) -> dict[str, str]:
    headers = {"x-request-id": str(request.request)}
    if trace := codec.trace_of(request.context.traceparent):
        headers["traceparent"] = trace
    return headers
