"""Screening: a trust verdict on the text of every request, beside admission and before any model.

What has arrived on a partition is judged in one call. A judge that fails or is too slow is asked once more, request
by request, so that one request cannot spoil its neighbours'; what is still unjudged is decided by the policy's
`on_judge_failure` and marked degraded. At-least-once: a verdict that is repeated has the same event id.

Records that cannot be read, or stand under a wrong key, are passed over: admission reads the same topic and writes
the one dead letter, or the copy in the right place, which is then judged here. A request whose verdict cannot be
written for a fault of ours, or of a judge, is decided as one that no judge answered, and goes to the dead letters.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import structlog

from klatch_agents.trust.judge import Judge, JudgeFailed, Passage
from klatch_agents.trust.passages import passages
from klatch_agents.trust.policy import Policy, Verdict, decide, decide_unjudged
from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.events import ChatRequested, Finding, TrustVerdict
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, TRUST_VERDICTS, Namespace
from klatch_streams.addresses import Addresses
from klatch_streams.dead_letters import DeadLetter, bury, dead_letter, describe
from klatch_streams.kernel import Emit, drafts_of
from klatch_streams.log import Log, RecordTooLarge

log = structlog.get_logger(__name__)

PATIENCE_S: Final = 5.0
"""How long a judge may take over one call."""


class Asked(NamedTuple):
    """A request to be judged, and the record it came in."""

    record: Record
    request: ChatRequested


@dataclass(frozen=True, slots=True)
class Screen:
    """Judges requests; knows nothing of the log."""

    judge: Judge
    policy: Policy
    patience_s: float = PATIENCE_S

    async def verdicts(self, asked: Sequence[Asked]) -> Sequence[Verdict]:
        """A verdict a request, in order. Always answers."""
        try:
            return await self._judged(asked)
        except JudgeFailed as error:
            if len(asked) > 1:
                return await asyncio.gather(*(self._alone(one) for one in asked))
            log.warning("judge.failed", request=asked[0].request.request, reason=describe(error.__cause__ or error))
            return [self.unjudged(asked[0].request)]

    def unjudged(self, request: ChatRequested) -> Verdict:
        """The verdict on a request that no judge answered."""
        return decide_unjudged(self.policy, request.use_case)

    async def _alone(self, asked: Asked) -> Verdict:
        [verdict] = await self.verdicts([asked])
        return verdict

    async def _judged(self, asked: Sequence[Asked]) -> Sequence[Verdict]:
        """Raises JudgeFailed, whatever the judge did wrong: what it did not answer is not allowed by accident."""
        try:
            walked = [list(passages(one.request.body)) for one in asked]
            said = [passage for one in walked for passage in one]
            found = await self._found(said) if said else ()
            if len(found) != len(said):
                raise JudgeFailed(f"{len(found)} answers to {len(said)} passages")
            answers = iter(found)
            return [self._decide(one, [next(answers) for _ in texts]) for one, texts in zip(asked, walked, strict=True)]
        except JudgeFailed:
            raise
        except Exception as error:  # another's code, whatever it raises, and whatever its answers are
            raise JudgeFailed(describe(error)) from error

    async def _found(self, said: Sequence[Passage]) -> Sequence[Sequence[Finding]]:
        async with asyncio.timeout(self.patience_s):
            return await self.judge.judge(said)

    def _decide(self, asked: Asked, found: Sequence[Sequence[Finding]]) -> Verdict:
        return decide([finding for one in found for finding in one], self.policy, asked.request.use_case)


class ScreeningStage:
    """Makes owners of partitions of `chat.requests`."""

    name = "screening"

    def __init__(
        self, log: Log, namespace: Namespace, judge: Judge, policy: Policy, patience_s: float = PATIENCE_S
    ) -> None:
        self.topic = namespace.of(CHAT_REQUESTS)
        self._log = log
        self._namespace = namespace
        self._screen = Screen(judge, policy, patience_s)

    async def own(self, partition: Partition, committed: int) -> "ScreeningOwner":  # noqa: ARG002 - see `Stage.own`
        """Nothing has to be restored. Raises LogError."""
        addresses = Addresses(CHAT_REQUESTS, await self._log.partitions(self.topic))
        return ScreeningOwner(self._log, self._namespace, self._screen, addresses, committed)


class ScreeningOwner:
    """One partition of `chat.requests`: one batch at a time, so that batches grow while a judge is slow."""

    def __init__(self, log: Log, namespace: Namespace, screen: Screen, addresses: Addresses, committed: int) -> None:
        self._log = log
        self._namespace = namespace
        self._screen = screen
        self._addresses = addresses
        self._next = committed
        self._taking = asyncio.Lock()

    async def take(self, records: Sequence[Record]) -> None:
        """Judge the requests among `records`; returns when their verdicts are acknowledged. Raises AppendFailed."""
        async with self._taking:
            asked = [one for record in records if (one := self._asked(record))]
            if asked:
                await self._write(asked, await self._screen.verdicts(asked))
            self._next = records[-1].offset + 1 if records else self._next

    async def checkpoint(self) -> int:
        """Everything taken has its verdict."""
        return self._next

    async def release(self, drain_s: float) -> None:
        """Wait for what is being taken."""
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s), self._taking:
                pass

    def _asked(self, record: Record) -> Asked | None:
        try:
            event = codec.decode(record.value)
            if isinstance(event, ChatRequested) and self._addresses.belongs(record, self._addresses.key_of(event)):
                return Asked(record, event)
        except (Unreadable, DeadLetter):
            log.info("record.passed_over", partition=record.partition.number, offset=record.offset)
        return None

    async def _write(self, asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> None:
        letters = list[Draft]()
        written = list[tuple[Asked, Verdict, Draft]]()
        for one, verdict in zip(asked, verdicts, strict=True):
            try:
                written.append((one, verdict, self._draft(one, verdict)))
            except Exception as error:  # noqa: BLE001 - the boundary of a record: the others have their verdicts
                letters.append(self._letter(one, error))
                told = self._screen.unjudged(one.request)
                written.append((one, told, self._draft(one, told)))
        try:
            await self._log.append([draft for _, _, draft in written])
        except RecordTooLarge:
            # Found before anything was sent: one at a time, to know which.
            for one, verdict, _ in written:
                await self._write_alone(one, verdict)
        if letters:
            await bury(self._log, letters)

    def _letter(self, asked: Asked, error: Exception) -> Draft:
        why = DeadLetter("failed", describe(error))
        log.error("verdict.failed", request=asked.request.request, fault=why.error)
        return dead_letter(asked.record, self._namespace, ScreeningStage.name, why)

    async def _write_alone(self, asked: Asked, verdict: Verdict) -> None:
        try:
            await self._log.append([self._draft(asked, verdict)])
        except RecordTooLarge:
            # What was found cannot be told, so it cannot be redacted: the text must not pass as it is.
            log.warning("verdict.too_large", request=asked.request.request, findings=len(verdict.findings))
            await self._log.append([self._draft(asked, replace(verdict, decision="block", findings=()))])

    def _draft(self, asked: Asked, verdict: Verdict) -> Draft:
        event = TrustVerdict(
            request=asked.request.request,
            tenant=asked.request.tenant,
            conversation=asked.request.conversation,
            stage="input",
            decision=verdict.decision,
            categories=verdict.categories,
            findings=verdict.findings,
            policy=verdict.policy,
            degraded=verdict.degraded,
        )
        effect = Emit(TRUST_VERDICTS, asked.request.conversation, event)
        [draft] = drafts_of([effect], asked.record, self._namespace)
        return draft
