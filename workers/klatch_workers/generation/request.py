"""Carries out the policy of generation for one request: commands in, reports out, effects between.

Whatever a command is waiting for, a cancel, a deadline or somebody else's attempt ends the wait at once: leaving
the model's reply closes its connection. Nothing is decided here; see `klatch_streams.generation`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final, assert_never, cast

import structlog

from klatch_agents.gateway.errors import ModelError
from klatch_agents.gateway.port import Gateway
from klatch_schemas import codec
from klatch_schemas.chunks import Json
from klatch_schemas.events import ChatAdmitted, Event, StreamAttempt, StreamEnd, StreamError, Usage
from klatch_schemas.ids import Writer
from klatch_schemas.records import Cause, Draft, Partition
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS, Namespace, Topic
from klatch_streams.batches import Batches
from klatch_streams.dead_letters import describe
from klatch_streams.generation import (
    Broken,
    Command,
    Conclude,
    End,
    Ended,
    Interrupted,
    Prepare,
    Report,
    Speak,
    Spoken,
    Stalled,
    Watch,
    lifecycle,
)
from klatch_streams.log import Log, LogError, RecordTooLarge
from klatch_workers.generation.conclude import Asked, Timing, settlement, turn, usage_without_count
from klatch_workers.generation.prepare import Prepared, Preparer, PreparingFailed, asked_before
from klatch_workers.generation.speak import Attempt
from klatch_workers.generation.table import Table, Tracked
from klatch_workers.generation.turns import Conversations

log = structlog.get_logger(__name__)

# The numbers of a request's effects: an effect is named by its cause, and is the same one when it is repeated.
_SETTLED: Final = 0
_TURN: Final = 1
_END: Final = 2
_OPENING: Final = 3
"""Ends and openings are numbered by attempt from here, in steps of two."""

_INTERNAL: Final = StreamError(code="internal", message="klatch failed on this request; the worker's log tells why")

STALL_S: Final = 10.0
"""How long somebody else's attempt may say nothing before it is superseded: a group's session time-out."""


@dataclass(frozen=True, slots=True)
class Means:
    """What a request needs of its process and of its partition."""

    log: Log
    namespace: Namespace
    partition: int
    table: Table
    conversations: Conversations
    batches: Batches
    gateway: Gateway
    preparer: Preparer
    owner: str
    """Unique to this owner of the partition: writers are named after it."""


@dataclass(slots=True)
class RequestUnderWay:
    """One admitted request, from taken to concluded."""

    means: Means
    admitted: ChatAdmitted
    cause: Cause
    """What its effects are named after."""
    position: int
    """Where its record stands on chat.admitted: only for a redriven one is that not its cause."""
    traceparent: str | None
    tracked: Tracked
    prepared: Prepared | None = None
    attempt: Attempt | None = None
    first_token_ms: int | None = None
    spoke: bool = False
    given_up: int = 0
    """Attempts up to this one are nobody's any more: their owner is succeeded, or said nothing for too long."""

    async def run(self) -> None:
        """Bring the request to its end and conclude it. Raises LogError."""
        self.given_up = self.tracked.assembly.state.attempt
        policy = lifecycle(self.tracked.assembly.state)
        command: Command = next(policy)
        while True:
            report = await self._carry_out(command)
            try:
                command = policy.send(report)
            except StopIteration:
                return

    async def _carry_out(self, command: Command) -> Report:
        match command:
            case Prepare():
                return await self._unless_interrupted(self._or_broken(self._prepare))
            case Speak():
                return await self._unless_interrupted(self._or_broken(self._speak))
            case Watch():
                return await self._watch()
            case End():
                return await self._end(command)
            case Conclude():
                return await self._conclude()
        assert_never(command)

    # --- prepare and speak

    async def _prepare(self) -> Report:
        try:
            self.prepared = await self.means.preparer.prepare(self.admitted, self.tracked, self.means.conversations)
        except PreparingFailed as error:
            return Broken(error.said)
        return self.prepared.ready

    async def _speak(self) -> Report:
        if self.prepared is None:
            # A successor comes here after watching, without having prepared.
            report = await self._prepare()
            if isinstance(report, Broken):
                return report
        assert self.prepared  # noqa: S101 - just made
        attempt = await self._open()
        if attempt is None:
            return Interrupted("superseded")
        self.spoke = True
        try:
            await attempt.stream(self.means.gateway, self.prepared.call)
        except ModelError as error:
            log.info("model.failed", request=self.admitted.request.request, code=error.code, seq=attempt.seq)
            return Broken(said_of(error))
        except RecordTooLarge as error:
            return Broken(StreamError(code="model_error", message=f"the model sent what the log cannot hold: {error}"))
        return Spoken()

    async def _open(self) -> Attempt | None:
        request, means = self.admitted.request, self.means
        number = self.tracked.assembly.state.attempt + 1
        opening = StreamAttempt(
            request=request.request,
            tenant=request.tenant,
            conversation=request.conversation,
            attempt=number,
            writer=Writer(f"{means.owner}.{self.cause.partition.number}.{self.position}.{number}"),
            mode="restart",
        )
        draft = self._draft(_OPENING + 2 * number, CHAT_STREAM, request.conversation, opening)
        self.attempt = Attempt(opening, means.batches, draft)
        if number == 1:
            # Nothing can stand yet that the model would have to know: it starts while the opening is on its way.
            return self.attempt
        await means.table.passed(await self.attempt.opened.durable())
        log.info("attempt.opened", request=request.request, attempt=number)
        return self.attempt if self._in_force() else None

    def _is_anothers(self) -> bool:
        state = self.tracked.assembly.state
        return state.status is None and state.attempt > 0 and not self._in_force()

    def _in_force(self) -> bool:
        return self.attempt is not None and self.tracked.assembly.state.writer == self.attempt.opening.writer

    # --- interruptions

    async def _or_broken(self, work: Callable[[], Awaitable[Report]]) -> Report:
        """A fault of ours, or a failure nobody foresaw, is this request's end and nobody else's."""
        try:
            return await work()
        except LogError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of a request, as a dead letter is of a record
            fault = describe(error)
            log.error("request.broken", request=self.admitted.request.request, fault=fault)  # noqa: TRY400
            return Broken(_INTERNAL)

    async def _unless_interrupted(self, work: Coroutine[None, None, Report]) -> Report:
        working = asyncio.ensure_future(work)
        listening = asyncio.ensure_future(self._interruption())
        try:
            await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else listening.result()
        finally:
            await _cancelled(working, listening)
            self._note_first_token()

    async def _interruption(self) -> Report:
        at_start = self.tracked.assembly.state
        left_s = self._seconds_left()
        try:
            async with asyncio.timeout(left_s):
                await self.tracked.until(lambda: self._interrupted(at_start.attempt) is not None)
        except TimeoutError:
            return Interrupted("expired")
        interrupted = self._interrupted(at_start.attempt)
        assert interrupted  # noqa: S101 - awaited just now
        return interrupted

    def _interrupted(self, attempt_at_start: int) -> Interrupted | None:
        state = self.tracked.assembly.state
        if state.status is not None:
            return Interrupted("ended" if state.settled else "cancelled")
        if state.attempt > attempt_at_start and not self._in_force():
            return Interrupted("superseded")
        return None

    def _seconds_left(self) -> float | None:
        deadline_ms = self.admitted.request.deadline_ms
        return None if deadline_ms is None else max(0.0, deadline_ms / 1000 - time.time())

    async def _watch(self) -> Report:
        tracked = self.tracked
        log.info("attempt.superseded", request=tracked.request, attempt=tracked.assembly.state.attempt)
        while tracked.assembly.state.status is None:
            heard = tracked.records
            try:
                async with asyncio.timeout(STALL_S):
                    await tracked.until(lambda: tracked.assembly.state.status is not None)
            except TimeoutError:
                if tracked.records == heard:
                    self.given_up = tracked.assembly.state.attempt
                    return Stalled()
        return Ended() if tracked.assembly.state.settled else Interrupted("cancelled")

    # --- end and conclude

    async def _end(self, command: End) -> Report:
        means, request = self.means, self.admitted.request
        if self.attempt:
            await means.table.passed(await self.attempt.opened.durable())
        if self._is_anothers() and (self.tracked.assembly.state.attempt > self.given_up or not await self._open()):
            return Interrupted("superseded")
        state = self.tracked.assembly.state
        finished = self.attempt.finished if self.attempt else None
        end = StreamEnd(
            request=request.request,
            tenant=request.tenant,
            conversation=request.conversation,
            attempt=state.attempt,
            writer=Writer(state.writer or means.owner),
            seq=self.attempt.seq if self.attempt and self._in_force() else state.next_seq,
            status=command.status,
            finish_reason=finished.finish_reasons.get(0) if finished else None,
            model=self.prepared.model if self.prepared else "",
            usage=self._usage(),
            trailer=tuple(codec.loads(raw) for raw in self.attempt.trailer) if self.attempt else (),
            error=command.error,
            upstream_request=self.attempt.upstream_request if self.attempt else None,
        )
        draft = self._draft(_END + 2 * state.attempt, CHAT_STREAM, request.conversation, end)
        written = means.batches.write(draft, urgent=True)
        await means.table.passed(await written.durable())
        if self.tracked.assembly.state.settled:
            return Ended()
        return Interrupted("superseded")

    def _usage(self) -> Usage:
        counted = self.attempt.counted if self.attempt else None
        if counted is None:
            # What stands may be a dead owner's: it was read, and its model was paid.
            chunks = max(len(self.tracked.assembly.standing), self.attempt.seq if self.attempt else 0)
            return usage_without_count(self.admitted, chunks, self.spoke)
        return Usage(
            prompt_tokens=counted.prompt_tokens,
            completion_tokens=counted.completion_tokens,
            cached_tokens=counted.cached_tokens,
            reasoning_tokens=counted.reasoning_tokens,
        )

    async def _conclude(self) -> Report:
        means, request, assembly = self.means, self.admitted.request, self.tracked.assembly
        asked = self._asked()
        timing = Timing(int(time.time() * 1000), self.first_token_ms)
        settled = settlement(self.admitted, assembly, asked, timing)
        drafts = [self._draft(_SETTLED, CHAT_REQUESTS, request.tenant, settled)]
        head = means.conversations.head(request.tenant, request.conversation)
        finished = turn(self.admitted, assembly, asked, timing, head.offset if head else None)
        # In a conversation requests are concluded in order: the turns up to the last one's request were appended.
        if finished and not (head and head.applied >= self.position):
            drafts.append(self._draft(_TURN, CHAT_TURNS, request.conversation, finished))
        places = await self._append(drafts)
        if finished and len(places) == 2:
            means.conversations.append(places[1][1], finished, self.position)
        log.info(
            "request.concluded",
            request=request.request,
            tenant=request.tenant,
            status=settled.status,
            attempt=assembly.state.attempt,
            tokens=settled.usage.total_tokens,
            first_token_ms=settled.first_token_ms,
            total_ms=settled.total_ms,
        )
        return Ended()

    async def _append(self, drafts: Sequence[Draft]) -> Sequence[tuple[Partition, int]]:
        try:
            return await self.means.log.append(drafts)
        except RecordTooLarge as error:
            # A turn repeats the request's messages beside the whole reply. The settlement must not fail with it.
            log.warning("turn.too_large", request=self.admitted.request.request, size=error.size, limit=error.limit)
            return await self.means.log.append(drafts[:1])

    def _asked(self) -> Asked:
        if self.prepared:
            return self.prepared.asked(self.spoke)
        if self.tracked.assembly.standing:
            # Concluding for a dead owner: the turn holds the request's messages as the model saw them.
            return asked_before(self.admitted.request, self.tracked.verdict)
        return Asked(spoke=self.spoke)

    # --- small change

    def _draft(self, effect: int, topic: Topic, key: str, event: Event) -> Draft:
        partition = None if topic is CHAT_REQUESTS else self.means.partition
        return codec.draft(
            self.means.namespace.of(topic),
            key,
            event,
            cause=self.cause._replace(effect=effect),
            traceparent=self.traceparent,
            partition=partition,
        )

    def _note_first_token(self) -> None:
        if self.attempt and self.attempt.first_token_at is not None and self.first_token_ms is None:
            ago = asyncio.get_running_loop().time() - self.attempt.first_token_at
            self.first_token_ms = int((time.time() - ago) * 1000)


def said_of(error: ModelError) -> StreamError:
    """A model's failure in the words of the contract: the server's own error object, with its HTTP `status`."""
    upstream: Json = {"status": error.status, "code": error.code, "upstream_request": error.upstream_request_id}
    if body := error.body:
        extra = cast("Json", body.extra or {})
        upstream |= {**extra, "message": body.message, "type": body.type, "param": body.param, "code": body.code}
        upstream["status"] = error.status
    retry = None if error.retry_after is None else int(error.retry_after * 1000)
    return StreamError(code="model_error", message=error.message, retry_after_ms=retry, upstream=upstream)


async def _cancelled(*tasks: "asyncio.Future[Report]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
