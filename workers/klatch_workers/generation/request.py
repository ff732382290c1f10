"""Carries out the policy of generation for one request: commands in, reports out, effects between.

Whatever a command is waiting for, a cancel, a deadline or somebody else's attempt ends the wait at once: leaving
the model's reply closes its connection. Nothing is decided here; see `klatch_streams.generation`.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

import structlog

from klatch_agents.gateway.errors import ModelError
from klatch_schemas import codec
from klatch_schemas.events import ChatAdmitted, StreamCancel, StreamEnd, StreamError, Usage
from klatch_schemas.ids import RequestId, Writer
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS
from klatch_streams.dead_letters import describe
from klatch_streams.generation import (
    Broken,
    Busy,
    Command,
    Conclude,
    Due,
    End,
    Ended,
    Interrupted,
    Pause,
    Prepare,
    Queue,
    Report,
    Rested,
    Speak,
    Spoken,
    Stalled,
    Watch,
    lifecycle,
)
from klatch_streams.keyed_owner import GivenBack
from klatch_streams.log import LogError, RecordTooLarge
from klatch_workers.generation.attempts import Attempts, Overtaken
from klatch_workers.generation.conclude import (
    Asked,
    Timing,
    at_least,
    has_turn,
    own_count,
    settlement,
    turn_aside,
    usage_without_count,
)
from klatch_workers.generation.failures import broken_by
from klatch_workers.generation.interruptions import Interruptions
from klatch_workers.generation.lines import Place
from klatch_workers.generation.means import CANCEL, END, SETTLED, TURN, Effects, Means
from klatch_workers.generation.prepare import Prepared, PreparingFailed, asked_before
from klatch_workers.generation.recover import cause_of
from klatch_workers.generation.table import Tracked

log = structlog.get_logger(__name__)

_INTERNAL: Final = StreamError(code="internal", message="klatch failed on this request; the worker's log tells why")

FIRST_PAUSE_S: Final = 0.2
"""Doubled by each failure."""

STALL_S: Final = 10.0
"""How long somebody else's attempt may say nothing before it is superseded: a group's session time-out."""


@dataclass(slots=True)
class RequestUnderWay:
    """One admitted request, from taken to concluded."""

    means: Means
    admitted: ChatAdmitted
    effects: Effects
    tracked: Tracked
    place: Place
    attempts: Attempts
    prepared: Prepared | None = None
    first_token_ms: int | None = None

    @classmethod
    def of(cls, means: Means, admitted: ChatAdmitted, record: Record, place: Place) -> "RequestUnderWay":
        """The request that the record admitted, at its place in its conversation."""
        trace = codec.trace_of(record.header(codec.TRACEPARENT))
        effects = Effects(means.namespace, means.partition, cause_of(record), trace)
        tracked = place.tracked
        attempts = Attempts(means, admitted, effects, tracked, place.offset, place.given_up)
        return cls(means, admitted, effects, tracked, place, attempts)

    async def run(self) -> None:
        """Bring the request to its end and conclude it. Raises LogError, GivenBack."""
        policy = lifecycle(self.means.tries)
        command: Command = next(policy)
        while True:
            report = await self._carry_out(command)
            try:
                command = policy.send(report)
            except StopIteration:
                return

    async def fail(self) -> None:
        """What `run` could not do for a fault of ours: the end, if there is none yet, and the settlement.

        Only what cannot be that fault again is told. Raises LogError, GivenBack.
        """
        while not self.tracked.assembly.state.settled:
            if isinstance(await self._end(End("failed", _INTERNAL), plain=True), Interrupted):
                # Somebody else's attempt is in force: it ends the stream, or falls silent and leaves that to us.
                await self._watch()
        try:
            await self._conclude()
        except (LogError, GivenBack):
            raise
        except Exception as error:  # noqa: BLE001 - see `_or_broken`
            log.error("request.not_remembered", request=self.tracked.request, fault=describe(error))  # noqa: TRY400
            await self._conclude(plain=True)

    async def _carry_out(self, command: Command) -> Report:
        match command:
            case Queue():
                return await self._queue()
            case Prepare():
                return await self._interruptions.unless(self._or_broken(self._prepare))
            case Speak():
                try:
                    return await self._interruptions.unless(self._or_broken(self._speak))
                finally:
                    self._note_first_token()
            case Pause():
                return await self._interruptions.unless(self._pause(command))
            case Watch():
                return await self._watch()
            case End():
                return await self._end(command)
            case Conclude():
                return await self._conclude()
        assert_never(command)

    @property
    def _interruptions(self) -> Interruptions:
        return Interruptions(self.tracked, self.admitted.request.deadline_ms, self.attempts.in_force)

    # --- wait for the turn

    async def _queue(self) -> Report:
        report = await self._interruptions.unless(self._until_due(), alone=True)
        self.place.stands_aside = not isinstance(report, Due)
        return report

    async def _until_due(self) -> Report:
        match self.place.when_met(self.admitted.request.if_busy):
            case "wait":
                pass
            case "reject":
                return Busy()
            case "cancel":
                await self._cancel(self.place.running(), undo=False)
            case "undo":
                await self._cancel(self.place.running(), undo=True)
        await self.place.turn()
        return Due()

    async def _cancel(self, earlier: Sequence[Place], *, undo: bool) -> None:
        request = self.admitted.request
        log.info("conversation.interrupted", request=request.request, earlier=len(earlier), undo=undo)
        written = [
            self.means.batches.write(
                # Named by the distance, so that each is the same one when it is repeated.
                self.effects.draft(
                    CANCEL + self.place.offset - place.offset,
                    CHAT_STREAM,
                    request.conversation,
                    StreamCancel(
                        request=RequestId(place.tracked.request),
                        tenant=request.tenant,
                        conversation=request.conversation,
                        by="if_busy",
                        reason=f"request {request.request} of the same conversation came and was not to wait",
                        undo=undo,
                    ),
                ),
                urgent=True,
            )
            for place in earlier
        ]
        for one in written:
            await one.durable()

    # --- prepare and speak

    async def _prepare(self) -> Report:
        if self.prepared:
            return self.prepared.ready
        began = self.means.stalls.now()
        try:
            self.prepared = await self.means.preparer.prepare(self.admitted, self.tracked, self.means.conversations)
        except PreparingFailed as error:
            return Broken(error.said)
        # What it waited for may be the log: then a cancel may stand there that nobody could read meanwhile.
        self.means.stalls.waited(began)
        return self.prepared.ready

    async def _speak(self) -> Report:
        assert self.prepared  # noqa: S101 - the policy speaks only after `Ready`
        attempt = await self.attempts.to_speak_into(self.prepared.call)
        if attempt is None:
            return Interrupted("superseded")
        if attempt.begun and attempt.begun.whole:
            return Spoken()
        try:
            await attempt.stream(self.means.gateway, self.attempts.sent(self.prepared.call, attempt))
        except Overtaken:
            return Interrupted("superseded")
        except ModelError as error:
            self.attempts.failed(attempt, error)
            broken = broken_by(error)
            log.info("model.failed", request=self.tracked.request, code=error.code, seq=attempt.seq, again=broken.again)
            return broken
        except RecordTooLarge as error:
            return Broken(StreamError(code="model_error", message=f"the model sent what the log cannot hold: {error}"))
        return Spoken()

    async def _pause(self, pause: Pause) -> Report:
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        wait_s = jitter * FIRST_PAUSE_S * float(2**pause.failures)
        log.info("model.retried", request=self.tracked.request, failures=pause.failures, wait_s=round(wait_s, 2))
        await asyncio.sleep(wait_s)
        return Rested()

    # --- failures, and attempts of others

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

    async def _watch(self) -> Report:
        tracked = self.tracked
        log.info("attempt.superseded", request=tracked.request, attempt=tracked.assembly.state.attempt)
        while tracked.assembly.state.status is None:
            heard, left_s = tracked.records, self._interruptions.seconds_left()
            # Who took over from our own attempt lives, and sees the deadline, too: two that both hurried to end it
            # would take over from each other.
            hurry = left_s is not None and self.attempts.present is None
            try:
                async with asyncio.timeout(min(STALL_S, left_s or 0.0) if hurry else STALL_S):
                    await tracked.until(lambda: tracked.assembly.state.status is not None)
            except TimeoutError:
                expired = self._interruptions.seconds_left() == 0
                if (hurry and expired) or tracked.records == heard:
                    self.attempts.give_up()
                    return Interrupted("expired") if expired else Stalled()
        return Ended() if tracked.assembly.state.settled else Interrupted("cancelled")

    # --- end and conclude

    async def _end(self, command: End, *, plain: bool = False) -> Report:
        means, request = self.means, self.admitted.request
        if not await self.attempts.to_end_in():
            return Interrupted("superseded")
        state, present = self.tracked.assembly.state, self.attempts.present
        end = StreamEnd(
            request=request.request,
            tenant=request.tenant,
            conversation=request.conversation,
            attempt=state.attempt,
            writer=Writer(state.writer or means.owner),
            seq=present.seq if present and self.attempts.in_force() else state.next_seq,
            status=command.status,
            error=command.error,
            deployment=self.attempts.deployment(command.status),
            usage=self._plain_usage() if plain else self._usage(),
        )
        if not plain:
            end = end.model_copy(update=self._details(command))
        draft = self.effects.draft(END + 2 * state.attempt, CHAT_STREAM, request.conversation, end)
        written = means.batches.write(draft, urgent=True)
        await means.table.passed(await written.durable())
        if self.tracked.assembly.state.settled:
            return Ended()
        return Interrupted("superseded")

    def _details(self, command: End) -> dict[str, object]:
        """What else the end tells."""
        present = self.attempts.present
        return {
            "finish_reason": self._finish_reason(command),
            "model": self.prepared.model if self.prepared else "",
            "trailer": tuple(codec.loads(raw) for raw in present.trailer) if present else (),
            "upstream_request": present.upstream_request if present else None,
            "rate_limits": self.admitted.rate_limits,
            "stopped_by": present.stopped_by if present else None,
        }

    def _finish_reason(self, command: End) -> str | None:
        present = self.attempts.present
        if present and present.finished:
            return present.finished.finish_reasons.get(0)
        # A dead owner's answer that only lacked its end.
        return present.begun.finish_reason if present and present.begun and command.status == "completed" else None

    def _usage(self) -> Usage:
        present, assembly = self.attempts.present, self.tracked.assembly
        if present and present.usage and present.counted_all:
            return present.usage
        # What stands may be a dead owner's: it was read, and its model was paid.
        own = own_count(assembly, present.deltas - present.closings if present else 0)
        if present and present.usage:
            return at_least(present.usage, own)
        asked = self.attempts.asked or bool(assembly.standing)
        return usage_without_count(self._sent(), own, asked)

    def _sent(self) -> Mapping[str, object]:
        """What the model was sent, with prompt, turns and memories; of a dead owner's call the request is known."""
        return self.prepared.call.body if self.prepared else self.admitted.request.body

    def _plain_usage(self) -> Usage:
        """The same without a look into what was said: a delta is a token."""
        present, standing = self.attempts.present, self.tracked.assembly.standing
        tokens = max(present.deltas if present else 0, len(standing))
        return usage_without_count(self._sent(), tokens, self.attempts.asked or bool(standing))

    async def _conclude(self, *, plain: bool = False) -> Report:
        means, request, assembly = self.means, self.admitted.request, self.tracked.assembly
        if has_turn(assembly) and not plain:
            await self.place.first()
        asked = self._asked()
        timing = Timing(int(time.time() * 1000), self.first_token_ms)
        settled = settlement(self.admitted, assembly, asked, timing, self.attempts.prices)
        drafts = [self.effects.draft(SETTLED, CHAT_REQUESTS, request.tenant, settled)]
        head = means.conversations.head(request.tenant, request.conversation)
        previous = head.offset if head else None
        finished = None if plain else await turn_aside(self.admitted, assembly, asked, timing, previous)
        # In a conversation requests are concluded in order: the turns up to the last one's request were appended.
        if finished and not (head and head.applied >= self.place.offset):
            drafts.append(self.effects.draft(TURN, CHAT_TURNS, request.conversation, finished))
        places = await self._append(drafts)
        if finished and len(places) == 2:
            means.conversations.append(request, places[1][1], finished, len(drafts[1].value or b""), self.place.offset)
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
            return self.prepared.asked(self.attempts.asked)
        if self.tracked.assembly.standing:
            # Concluding for a dead owner: the turn holds the request's messages as the model saw them.
            return asked_before(self.admitted.request, self.tracked.verdict)
        return Asked(spoke=self.attempts.asked)

    def _note_first_token(self) -> None:
        present = self.attempts.present
        if present and present.first_token_at is not None and self.first_token_ms is None:
            ago = asyncio.get_running_loop().time() - present.first_token_at
            self.first_token_ms = int((time.time() - ago) * 1000)
