"""Generation as the Driver runs it: the production policy (`generation.lifecycle`), a model that the test gives.

A model answers with chunks, and with `Wait` where time is to pass before it goes on, so that cancels, deadlines and
crashes can be put between any two chunks. Not here: prompts, recall, turns and the batching of deltas, which belong
to the worker and are tested there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, assert_never

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRequested,
    Event,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
    StreamError,
    TrustVerdict,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Writer
from klatch_schemas.records import Cause, Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, TRUST_VERDICTS, Topic
from klatch_streams.continuing import begun
from klatch_streams.driver import Driver, readable
from klatch_streams.generation import (
    Broken,
    Busy,
    Command,
    Conclude,
    Due,
    End,
    Ended,
    Interrupted,
    Lifecycle,
    Pause,
    Prepare,
    Queue,
    Ready,
    Report,
    Rested,
    Speak,
    Spoken,
    Stalled,
    Watch,
    lifecycle,
    when_met,
)
from klatch_streams.topology import GENERATION

_STALL_MS: Final = 10_000


class Wait(NamedTuple):
    """The model says nothing for so long."""

    ms: int


class ModelRefused(Exception):
    """The model's server said no, or broke off; the message is what the stream's end says."""

    def __init__(self, message: str, *, again: bool = False) -> None:
        """`again`: another try may end well."""
        super().__init__(message)
        self.again = again


Chunk = Mapping[str, object]
Model = Callable[[ChatRequested, TrustVerdict], Iterator[Chunk | Wait]]
"""Answers a request, of which the verdict may have found something to redact. May raise ModelRefused."""

ContinuingModel = Callable[[ChatRequested, TrustVerdict, str], Iterator[Chunk | Wait]]
"""Goes on behind the text that stands."""


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
    rests_until_ms: int = 0
    """The end of a pause; 0: there is none."""
    met: bool = False
    """Whether it was decided what to do if its conversation is busy."""

    def is_before(self, other: "_Request") -> bool:
        """Whether it is an earlier one of the same conversation."""
        mine, others = self.admitted.request, other.admitted.request
        same = (mine.tenant, mine.conversation) == (others.tenant, others.conversation)
        return same and self.record.offset < other.record.offset


@dataclass(slots=True)
class GenerationStage:
    """Carries out the policy of every admitted request, one step at a time."""

    model: Model
    continuing: ContinuingModel | None = None
    """None: the model's server does not go on from a partial answer."""
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
                    policy = lifecycle()
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
            case Queue():
                return interrupted or self._queue(driver, request, stream)
            case Prepare():
                return interrupted or _ready(driver, request)
            case Speak():
                return interrupted or self._speak(driver, request, stream)
            case Pause():
                return interrupted or _pause(driver, request, request.command)
            case Watch():
                return _watch(driver, request, stream)
            case End():
                return self._end(driver, request, stream, request.command)
            case Conclude():
                self._conclude(driver, request, stream)
                return True
            case None:
                return False

    def _queue(self, driver: Driver, request: _Request, stream: Assembly) -> Report | bool:
        earlier = [one for one in self._running.values() if one.is_before(request)]
        running = [one for one in earlier if driver.reply(one.admitted.request.request).state.status is None]
        asked = request.admitted.request
        what = when_met(asked.if_busy, stream.state, bool(running)) if not request.met else "wait"
        request.met = True
        match what:
            case "wait":
                return Due() if not earlier else False
            case "reject":
                return Busy()
            case "cancel" | "undo":
                for one in running:
                    cancel = StreamCancel(
                        request=one.admitted.request.request,
                        tenant=asked.tenant,
                        conversation=asked.conversation,
                        by="if_busy",
                        reason=asked.request,
                        undo=what == "undo",
                    )
                    distance = request.record.offset - one.record.offset
                    self._write(driver, request, CHAT_STREAM, cancel, 1_000_000 + distance)
                return True
        assert_never(what)

    def _speak(self, driver: Driver, request: _Request, stream: Assembly) -> Report | bool:
        if request.attempt == 0:
            self._open(driver, request, stream)
            return True
        if driver.now_ms < request.waits_until_ms:
            return False
        if request.answer is None:
            request.answer = self._answer(driver, request, stream)
        try:
            said = next(request.answer, None)
        except ModelRefused as error:
            request.answer = None
            if request.said:
                request.attempt = request.said = 0
            return Broken(StreamError(code="model_error", message=str(error)), error.again)
        return Spoken() if said is None else self._say(driver, request, said)

    def _open(self, driver: Driver, request: _Request, stream: Assembly) -> None:
        asked = request.admitted.request
        opening = StreamAttempt(
            request=asked.request,
            tenant=asked.tenant,
            conversation=asked.conversation,
            attempt=stream.state.attempt + 1,
            writer=self.writer,
            mode="continue" if self.continuing and begun(asked.body, asked.on_crash, stream) else "restart",
        )
        self._write(driver, request, CHAT_STREAM, opening, 2 * opening.attempt)
        request.attempt, request.answer, request.waits_until_ms = opening.attempt, None, 0

    def _answer(self, driver: Driver, request: _Request, stream: Assembly) -> Iterator[Chunk | Wait]:
        asked = request.admitted.request
        verdict = _verdict(driver, asked.request)
        assert verdict  # noqa: S101 - the policy speaks only after `Ready`
        # What stands after a restart was opened is nothing, so that what stands is what is continued.
        stands = begun(asked.body, asked.on_crash, stream)
        if self.continuing and stands:
            return iter(()) if stands.whole else self.continuing(asked, verdict, stands.text)
        return self.model(asked, verdict)

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


def _pause(driver: Driver, request: _Request, pause: Pause) -> Report | bool:
    until_ms = request.rests_until_ms or driver.now_ms + 100 * 2**pause.failures
    over = driver.now_ms >= until_ms
    request.rests_until_ms = 0 if over else until_ms
    return Rested() if over else False


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
