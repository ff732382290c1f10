"""Generation as the Driver runs it: the production policy (`generation.lifecycle`), a model that the test gives.

A model answers with chunks, and with `Wait` where time is to pass before it goes on, so that cancels, deadlines and
crashes can be put between any two chunks. Not here: prompts, recall, turns and the batching of deltas, which belong
to the worker and are tested there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRequested,
    Event,
    StreamAttempt,
    StreamEnd,
    StreamError,
    TrustVerdict,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Writer
from klatch_schemas.records import Cause, Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, TRUST_VERDICTS, Topic
from klatch_streams.driver import Driver, readable
from klatch_streams.generation import (
    Broken,
    Command,
    Conclude,
    End,
    Ended,
    Interrupted,
    Lifecycle,
    Prepare,
    Ready,
    Report,
    Speak,
    Spoken,
    Stalled,
    Watch,
    lifecycle,
)
from klatch_streams.topology import GENERATION

_STALL_MS: Final = 10_000


class Wait(NamedTuple):
    """The model says nothing for so long."""

    ms: int


class ModelRefused(Exception):
    """The model's server said no; the message is what the stream's end says."""


Chunk = Mapping[str, object]
Model = Callable[[ChatRequested, TrustVerdict], Iterator[Chunk | Wait]]
"""Answers a request, of which the verdict may have found something to redact. May raise ModelRefused."""


@dataclass(slots=True)
class _Request:
    """One admitted request, as far as this process has brought it."""

    record: Record
    admitted: ChatAdmitted
    policy: Lifecycle
    command: Command | None
    attempt: int = 0
    """The attempt that this process has opened."""
    said: int = 0
    """How many deltas it has written."""
    answer: Iterator[Chunk | Wait] | None = None
    waits_until_ms: int = 0


@dataclass(slots=True)
class GenerationStage:
    """Carries out the policy of every admitted request, one step at a time."""

    model: Model
    row = GENERATION
    _processes: int = 0
    _positions: dict[Partition, int] = field(default_factory=dict[Partition, int])
    _running: dict[str, _Request] = field(default_factory=dict[str, _Request])
    _concluded: set[str] = field(default_factory=set[str])

    @property
    def writer(self) -> Writer:
        """This process, as it signs its openings."""
        return Writer(f"generation-{self._processes}")

    def restart(self) -> None:
        """A new process: it reads admissions from its committed offset again, and what became of them in the log."""
        self._processes += 1
        self._running.clear()
        self._positions.clear()

    def step(self, driver: Driver) -> bool:
        """Accept what was admitted, and take every request one step further."""
        accepted = self._accept(driver)
        moved = [self._move(driver, request) for request in list(self._running.values())]
        return accepted or any(moved)

    def _accept(self, driver: Driver) -> bool:
        accepted = False
        for partition in driver.partitions(self.row.consumes):
            records = driver.read(partition, self._positions.get(partition, 0))
            self._positions[partition] = self._positions.get(partition, 0) + len(records)
            for record, event in readable(records):
                accepted = True
                if isinstance(event, ChatAdmitted) and event.request.request not in self._concluded:
                    policy = lifecycle(driver.reply(event.request.request).state)
                    request = _Request(record, event, policy, next(policy))
                    self._running.setdefault(event.request.request, request)
        return accepted

    def _move(self, driver: Driver, request: _Request) -> bool:
        stream = driver.reply(request.admitted.request.request)
        report = self._carry_out(driver, request, stream)
        if isinstance(request.command, Conclude):
            self._concluded.add(request.admitted.request.request)
            del self._running[request.admitted.request.request]
            return True
        if isinstance(report, bool):
            return report
        request.command = request.policy.send(report)
        return True

    def _carry_out(self, driver: Driver, request: _Request, stream: Assembly) -> Report | bool:
        """The report, or whether anything was done meanwhile."""
        interrupted = _interrupted(driver, request, stream, self.writer)
        match request.command:
            case Prepare():
                return interrupted or _ready(driver, request)
            case Speak():
                return interrupted or self._speak(driver, request, stream)
            case Watch():
                return _watch(driver, request, stream)
            case End():
                return self._end(driver, request, stream, request.command)
            case Conclude():
                self._conclude(driver, request, stream)
                return True
            case None:
                return False

    def _speak(self, driver: Driver, request: _Request, stream: Assembly) -> Report | bool:
        asked = request.admitted.request
        if request.attempt == 0:
            opening = StreamAttempt(
                request=asked.request,
                tenant=asked.tenant,
                conversation=asked.conversation,
                attempt=stream.state.attempt + 1,
                writer=self.writer,
            )
            self._write(driver, request, CHAT_STREAM, opening, 2 * opening.attempt)
            request.attempt = opening.attempt
            verdict = _verdict(driver, asked.request)
            assert verdict  # noqa: S101 - the policy speaks only after `Ready`
            request.answer = self.model(asked, verdict)
            return True
        if driver.now_ms < request.waits_until_ms or request.answer is None:
            return False
        try:
            said = next(request.answer, None)
        except ModelRefused as error:
            return Broken(StreamError(code="model_error", message=str(error)))
        return Spoken() if said is None else self._say(driver, request, said)

    def _say(self, driver: Driver, request: _Request, said: Chunk | Wait) -> bool:
        if isinstance(said, Wait):
            request.waits_until_ms = driver.now_ms + said.ms
            return True
        asked = request.admitted.request
        value = codec.encode_delta(
            codec.delta_prefix(asked.request, request.attempt, self.writer), request.said, codec.dumps(said)
        )
        topic = driver.namespace.of(CHAT_STREAM)
        delta = codec.delta_draft(topic, asked.conversation.encode(), request.record.partition.number, value)
        driver.write(self.row, [delta])
        request.said += 1
        return True

    def _end(self, driver: Driver, request: _Request, stream: Assembly, end: End) -> Report | bool:
        if stream.state.settled:
            return Ended()
        asked, state = request.admitted.request, stream.state
        said = StreamEnd(
            request=asked.request,
            tenant=asked.tenant,
            conversation=asked.conversation,
            attempt=state.attempt,
            writer=Writer(state.writer or self.writer),
            seq=state.next_seq,
            status=end.status,
            usage=Usage(prompt_tokens=7, completion_tokens=len(stream.standing)),
            error=end.error,
        )
        self._write(driver, request, CHAT_STREAM, said, 2 * state.attempt + 1)
        return True

    def _conclude(self, driver: Driver, request: _Request, stream: Assembly) -> None:
        asked, end = request.admitted.request, stream.end
        settled = UsageSettled(
            request=asked.request,
            tenant=asked.tenant,
            status=stream.state.status or "failed",
            usage=(end.usage if end else None) or Usage(),
        )
        self._write(driver, request, CHAT_REQUESTS, settled, 0)

    def _write(self, driver: Driver, request: _Request, topic: Topic, event: Event, effect: int) -> None:
        asked = request.admitted.request
        key = asked.tenant if topic.key == "tenant" else asked.conversation
        cause = Cause(request.record.partition, request.record.offset, effect)
        driver.write(self.row, [codec.draft(driver.namespace.of(topic), key, event, cause=cause)])


def _interrupted(driver: Driver, request: _Request, stream: Assembly, writer: Writer) -> Interrupted | None:
    state, deadline_ms = stream.state, request.admitted.request.deadline_ms
    if state.settled:
        return Interrupted("ended")
    if state.status is not None:
        return Interrupted("cancelled")
    if request.attempt and (state.attempt, state.writer) != (request.attempt, writer):
        return Interrupted("superseded")
    if deadline_ms is not None and deadline_ms < driver.now_ms:
        return Interrupted("expired")
    return None


def _ready(driver: Driver, request: _Request) -> Report | bool:
    verdict = _verdict(driver, request.admitted.request.request)
    return Ready(verdict.decision, verdict.categories) if verdict else False


def _watch(driver: Driver, request: _Request, stream: Assembly) -> Report | bool:
    if stream.state.status is not None:
        return Ended()
    last_ms = max(heard.record.timestamp_ms for heard in driver.stream(request.admitted.request.request))
    if driver.now_ms - last_ms < _STALL_MS:
        return False
    request.attempt = request.said = 0
    return Stalled()


def _verdict(driver: Driver, request: str) -> TrustVerdict | None:
    said = (heard.event for heard in driver.heard(TRUST_VERDICTS))
    return next((event for event in said if isinstance(event, TrustVerdict) and event.request == request), None)
