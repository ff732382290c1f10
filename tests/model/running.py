"""One request in the hands of one owner: the production policy, carried out as `workers/.../generation` does.

The deciding parts are production's: `lifecycle`, `when_met`, what may be continued, the fold, the settlement. What
carries out the policy's commands is written here again, step by step beside `request.py`, `attempts.py`, `lines.py`
and `interruptions.py`, since coroutines can be neither copied nor compared; those are killed at every await in
`tests/workers/generation`. Left out: verdicts other than `allow`, and the turns (their order is: who has one
concludes only as the first of its line).
"""

from collections.abc import Iterator
from functools import cache
from typing import assert_never

import msgspec
from tests.model.logs import CONVERSATION, NOW_MS, TENANT, Book, Said, asked, cancelled, opening
from tests.model.parts import Broken, Parts
from tests.model.policy import Policies
from tests.model.strands import Strand
from tests.model.world import Bounds, Owner, Running, Step, World

from klatch_schemas.assembly import StreamState
from klatch_schemas.codec import Delta
from klatch_schemas.events import ChatAdmitted, Reservation, StreamEnd, StreamError, Usage, UsageSettled
from klatch_schemas.ids import Writer
from klatch_streams import generation as policy
from klatch_streams.continuing import Begun, begun
from klatch_streams.generation import (
    Busy,
    Conclude,
    Due,
    End,
    Ended,
    Interrupted,
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
    when_met,
)
from klatch_workers.generation.conclude import Asked, Timing, settlement, usage_without_count


class Requests:
    """The steps of requests under way."""

    def __init__(self, bounds: Bounds, parts: Parts, book: Book) -> None:
        self._bounds, self._parts, self._book = bounds, parts, book
        self._policies = Policies()
        self._settlements: dict[tuple[Strand, bool], UsageSettled] = {}
        self._begun: dict[Strand, Begun | None] = {}

    def begin(self, owner: Owner, request: int, offset: int) -> Running:
        """A request that was met at an offset of chat.admitted."""
        attempt = owner.view.strands[request].state.attempt
        return Running(request, offset, self._policies.start(), began_at=attempt, given_up=attempt)

    def steps(self, world: World, number: int, one: Running) -> Iterator[Step]:
        """What may be done next for a request of an owner."""
        at = _At(self, world, number, world.generation[number], one, self._parts)
        command = one.policy.command
        match command:
            case Queue():
                yield from self._queue(at)
            case Prepare():
                yield at.reports(at.interrupted() or Ready("allow"))
            case Speak():
                yield from self._speak(at)
            case Pause():
                yield at.reports(at.interrupted() or Rested())
            case Watch():
                yield from self._watch(at)
            case End():
                yield from self._end(at, command)
            case Conclude():
                yield from self._conclude(at)
            case None:
                raise Broken("the policy returned before it concluded")
            case _:
                assert_never(command)

    # --- waiting for the turn

    def _queue(self, at: "_At") -> Iterator[Step]:
        if interrupted := at.interrupted(alone=True):
            yield at.reports(interrupted, stands_aside=True)
            return
        earlier = [
            other
            for other in at.before()
            if at.owner.view.strands[other.request].state.status is None and not other.stands_aside
        ]
        what = "wait" if at.one.phase == "met" else when_met(self._bounds.if_busy, at.state, busy=bool(earlier))
        match what:
            case "wait":
                if not at.before() and not any(said.kind == "cancel" for said in at.owner.pending):
                    yield at.reports(Due(), stands_aside=False)
                elif at.one.phase != "met":
                    yield at.goes_on("waits", at.one._replace(phase="met"))
            case "reject":
                yield at.reports(Busy(), stands_aside=True)
            case "cancel" | "undo":
                cancels = [cancelled(self._book, other.request, "if_busy", undo=what == "undo") for other in earlier]
                yield at.goes_on("cancels those before it", at.one._replace(phase="met"), *cancels)
            case _:
                assert_never(what)

    # --- speaking

    def _speak(self, at: "_At") -> Iterator[Step]:
        one = at.one
        if interrupted := at.interrupted():
            yield at.reports(interrupted)
        elif one.phase == "speaking":
            yield from self._go_on(at)
        elif one.phase == "opening":
            yield from self._opened(at)
        elif one.attempt and not at.has_read_opening():
            return
        elif one.attempt and at.in_force() and not one.said and not (one.anew and one.continues):
            # It was ours before a pause, and nothing has been said in it.
            yield self._calls(at, one)
        elif at.must_be_watched():
            yield at.reports(Interrupted("superseded"))
        else:
            begun = self.begun(at)
            opened, said = self._open(at, continues=begun is not None and (begun.whole or not one.anew))
            yield self._calls(at, opened, said) if opened.attempt == 1 else at.goes_on("opens", opened, said)

    def _opened(self, at: "_At") -> Iterator[Step]:
        if not self._parts.may_speak(at.one.attempt, at.has_read_opening()):
            return
        begun = self.begun(at)
        if at.has_read_opening() and not at.in_force():
            yield at.reports(Interrupted("superseded"))
        elif at.one.continues and begun is None:
            yield at.goes_on("opens anew", *self._open(at, continues=False))
        elif at.one.continues and begun and begun.whole:
            yield at.reports(Spoken(), token=at.strand.last())
        else:
            yield self._calls(at, at.one)

    def begun(self, at: "_At") -> Begun | None:
        """What the next attempt may continue: production's decision."""
        strand = at.strand
        if strand not in self._begun:
            body, mode = asked(at.one.request).body, "continue" if self._bounds.continues else "restart"
            self._begun[strand] = begun(body, mode, strand.assembly())  # type: ignore[arg-type]
        return self._begun[strand]

    def _open(self, at: "_At", *, continues: bool) -> tuple[Running, Said]:
        attempt = self._parts.next_attempt(at.state)
        writer = self._parts.writer(at.number, at.one.request, attempt)
        mode = "continue" if continues else "restart"
        request = at.one.request
        said = self._book.say(
            ("opening", attempt, writer, mode),
            request,
            lambda: opening(request, attempt, writer, "continue" if continues else "restart"),
        )
        openings = at.one.openings + 1
        opened = at.one._replace(phase="opening", attempt=attempt, opened=-1, openings=openings, continues=continues)
        return opened._replace(said=0, token=None, finished=False), said

    def _calls(self, at: "_At", one: Running, *said: Said) -> Step:
        self._check_call(at, one)
        before = at.strand.last() if one.continues else None
        call = f"{at.number}.{one.request}.{one.openings}"
        return at.goes_on("calls", one._replace(phase="speaking", call=call, token=before, spoke=True), *said)

    def _check_call(self, at: "_At", one: Running) -> None:
        if at.state.status is not None:
            raise Broken(f"r{one.request}: a model is called though its owner has read that it is over")
        if at.world.expired:
            raise Broken(f"r{one.request}: a model is called after the deadline")
        if one.attempt > 1:
            until = at.world.stream if one.opened < 0 else at.world.stream.at(one.opened)
            if until.strands[one.request].state.status is not None:
                raise Broken(f"r{one.request}: a model is called for an attempt that was opened after the end")

    def _go_on(self, at: "_At") -> Iterator[Step]:
        one = at.one
        if (one.token.count if one.token else 0) >= self._bounds.chunks:
            yield at.reports(Spoken(), finished=True)
        elif self._bounds.in_flight:
            yield at.goes_on("says", *self._say(at))
        elif not at.owner.pending:
            later, said = self._say(at)
            owner = at.owner.with_running(later)
            yield Step("says", at.world._replace(stream=at.world.stream.then(said)).with_owner(at.number, owner))
        if at.world.breaks < self._bounds.breaks:
            # Who said nothing behind a text that it was to continue may be asked again, or others to begin anew.
            for anew in {one.anew, one.anew or (one.continues and not one.said)}:
                step = at.reports(policy.Broken(_MODEL_FAILED, again=True), anew=anew)
                yield step._replace(to=step.to._replace(breaks=at.world.breaks + 1), fair=False)

    def _say(self, at: "_At") -> tuple[Running, Said]:
        one = at.one
        token = self._book.token(one.call, one.token)
        writer = self._parts.writer(at.number, one.request, one.attempt)
        finish = "stop" if token.count == self._bounds.chunks else None
        chunk = {"choices": [{"index": 0, "delta": {"content": "token "}, "finish_reason": finish}]}
        said = self._book.say(
            ("delta", one.attempt, writer, one.said, token),
            one.request,
            lambda: Delta(f"r{one.request}", one.attempt, writer, one.said, msgspec.Raw(msgspec.json.encode(chunk))),
            token,
        )
        return one._replace(said=one.said + 1, token=token), said

    def _watch(self, at: "_At") -> Iterator[Step]:
        if at.state.status is not None:
            yield at.reports(Ended() if at.state.settled else Interrupted("cancelled"))
            return
        if at.world.expired and not at.one.attempt:
            yield at.reports(Interrupted("expired"), given_up=at.state.attempt)
            return
        later = range(at.number + 1, len(at.world.generation))
        report = Interrupted("expired") if at.world.expired else Stalled()
        stalled = at.reports(report, given_up=at.state.attempt)
        if at.state.writer not in {self._parts.writer(other, at.one.request, at.state.attempt) for other in later}:
            # It is an earlier owner's, who may be dead.
            yield stalled
        elif at.world.impatience < self._bounds.impatience:
            yield stalled._replace(to=stalled.to._replace(impatience=at.world.impatience + 1), fair=False)

    # --- ending

    def _end(self, at: "_At", command: End) -> Iterator[Step]:
        one, state = at.one, at.state
        if one.phase == "ending":
            if 0 <= one.ended < at.owner.view.depth:
                yield at.reports(Ended() if state.settled else Interrupted("superseded"))
        elif one.attempt and not at.has_read_opening():
            return
        elif one.phase == "opening" and not at.in_force():
            yield at.reports(Interrupted("superseded"))
        elif one.phase != "opening" and at.is_anothers():
            if at.must_be_watched():
                yield at.reports(Interrupted("superseded"))
            else:
                yield at.goes_on("opens to end", *self._open(at, continues=True))
        else:
            yield at.goes_on("ends", one._replace(phase="ending", ended=-1), self._write_end(at, command))

    def _write_end(self, at: "_At", command: End) -> Said:
        one, state, request = at.one, at.state, asked(at.one.request)
        usage = self._usage(at)
        writer = Writer(state.writer or f"owner{at.number}")
        seq = one.said if one.attempt and at.in_force() else state.next_seq
        return self._book.say(
            ("end", state.attempt, writer, seq, command.status, usage.completion_tokens, usage.estimated),
            one.request,
            lambda: StreamEnd(
                request=request.request,
                tenant=TENANT,
                conversation=CONVERSATION,
                attempt=state.attempt,
                writer=writer,
                seq=seq,
                status=command.status,
                usage=usage,
                error=command.error,
            ),
        )

    def _usage(self, at: "_At") -> Usage:
        one = at.one
        written = one.token.count if one.token else 0
        if one.finished:
            return _counted(written)
        return _uncounted(one.request, max(len(at.strand.standing), written), spoke=one.spoke)

    def _conclude(self, at: "_At") -> Iterator[Step]:
        if at.strand.standing and not at.state.undone and at.before():
            return
        self._check_end(at)
        said = self._settlement(at)
        owner = at.owner
        name = self._parts.settlement(at.number, at.one.offset)
        requests = at.world.requests.settle(at.one.request, name, said)
        owner = owner._replace(
            running=tuple(other for other in owner.running if other is not at.one),
            concluded=owner.concluded | {at.one.request},
        )
        # Nobody but a successor can tell whether it was done; and a repeated one nobody at all.
        last = len(at.world.generation) > self._bounds.takeovers and at.number == len(at.world.generation) - 1
        alone = requests is at.world.requests or (last and self._bounds.concurrent is None)
        yield Step("settles", at.world._replace(requests=requests).with_owner(at.number, owner), alone=alone)

    def _check_end(self, at: "_At") -> None:
        strand, request = at.strand, at.one.request
        if not strand.state.settled or strand.end is None:
            raise Broken(f"r{request} is concluded before it has ended")
        if strand.state.status == "completed" and len(strand.standing) != self._bounds.chunks:
            raise Broken(f"r{request} is complete with {len(strand.standing)} tokens")
        if self._settlement(at).usage != strand.end.usage:
            raise Broken(f"r{request} is settled as {self._settlement(at).usage}, its end says {strand.end.usage}")

    def _settlement(self, at: "_At") -> UsageSettled:
        key = at.strand, at.one.spoke
        if key not in self._settlements:
            admitted, asked_with = _admitted(at.one.request), Asked(spoke=at.one.spoke)
            self._settlements[key] = settlement(admitted, at.strand.assembly(), asked_with, Timing(NOW_MS), _no_price)
        return self._settlements[key]

    def after(self, at: "_At", report: Report) -> Running:
        """The request once the policy has heard a report."""
        node = self._policies.send(at.one.policy, report)
        return at.one._replace(policy=node, phase="", began_at=at.state.attempt, call="", ended=-1)


class _At:
    """Where a request stands, as its owner knows it."""

    def __init__(self, requests: Requests, world: World, number: int, owner: Owner, one: Running, parts: Parts) -> None:
        self._requests, self._parts = requests, parts
        self.world, self.number, self.owner, self.one = world, number, owner, one
        self.strand: Strand = owner.view.strands[one.request]
        self.state: StreamState = self.strand.state

    def reports(self, report: Report, **changes: object) -> Step:
        """The policy hears a report."""
        later = self._requests.after(self, report)._replace(**changes)  # type: ignore[arg-type]
        to = self.world.with_owner(self.number, self.owner.with_running(later))
        return Step(f"reports {report}", to, alone=self.state.settled)

    def goes_on(self, name: str, later: Running, *said: Said) -> Step:
        """The command is carried out further, and something is written."""
        owner = self.owner.with_running(later)
        owner = owner._replace(pending=(*owner.pending, *said))
        return Step(f"{name} (r{self.one.request})", self.world.with_owner(self.number, owner))

    def before(self) -> tuple[Running, ...]:
        """Those before it in the line."""
        return self.owner.running[: self.owner.running.index(self.one)]

    def has_read_opening(self) -> bool:
        """Whether its own last opening was read back."""
        return 0 <= self.one.opened < self.owner.view.depth

    def in_force(self) -> bool:
        """Whether the attempt in force is its own last one."""
        named = self._parts.writer(self.number, self.one.request, self.one.attempt)
        return self.one.attempt > 0 and self.state.writer == named

    def is_anothers(self) -> bool:
        """Whether somebody else's attempt is in force."""
        return self.state.status is None and self.state.attempt > 0 and not self.in_force()

    def must_be_watched(self) -> bool:
        """Whether somebody else's attempt is in force that was not given up."""
        return self.is_anothers() and self.state.attempt > self.one.given_up

    def interrupted(self, *, alone: bool = False) -> Interrupted | None:
        """What the log, as far as it was read, or the clock says against going on."""
        state = self.state
        if state.status is not None:
            return Interrupted("ended" if state.settled else "cancelled")
        if state.attempt > self.one.began_at and not alone and not self.in_force():
            return Interrupted("superseded")
        return Interrupted("expired") if self.world.expired else None


_MODEL_FAILED = StreamError(code="model_error", message="the model server hung up")


def _no_price(_: str, __: str) -> None:
    return None


@cache
def _admitted(request: int) -> ChatAdmitted:
    return ChatAdmitted(
        request=asked(request), requested_ms=NOW_MS, reservation=Reservation(tokens=100, expires_ms=NOW_MS + 1)
    )


@cache
def _counted(tokens: int) -> Usage:
    return Usage(prompt_tokens=7, completion_tokens=tokens)


@cache
def _uncounted(request: int, chunks: int, *, spoke: bool) -> Usage:
    return usage_without_count(_admitted(request).request.body, chunks, spoke)
