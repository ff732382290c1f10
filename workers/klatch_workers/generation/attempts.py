"""The attempts of one request, as one owner sees them: which is in force, whose it is, and how the next one opens.

Open, read back, then speak: an owner opens the next attempt and waits until it reads its own opening. By then it knows
exactly which text stands, and whether somebody else's opening won. A first attempt speaks at once: nothing can stand
that the model would have to know; but after a stall, such as of a zombie that wakes, the log is read first.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import structlog

from klatch_agents.gateway.errors import ModelError
from klatch_agents.gateway.port import ModelCall
from klatch_schemas.events import ChatAdmitted, Prices, Status, StreamAttempt
from klatch_schemas.ids import Writer
from klatch_schemas.records import Partition
from klatch_schemas.topics import CHAT_STREAM
from klatch_streams.continuing import Begun
from klatch_workers.generation.continuation import begun_aside
from klatch_workers.generation.credit import credit_of
from klatch_workers.generation.means import OPENING, Effects, Means
from klatch_workers.generation.speak import Attempt
from klatch_workers.generation.table import Tracked

log = structlog.get_logger(__name__)

Mode = Literal["restart", "continue"]


class Overtaken(Exception):
    """The stream has ended, or somebody else answers."""


@dataclass(slots=True)
class Attempts:
    """Those of one request."""

    means: Means
    admitted: ChatAdmitted
    effects: Effects
    tracked: Tracked
    position: int
    """Where its record stands on chat.admitted: of a redriven one that is not its cause."""
    given_up: int
    """Attempts up to this one are nobody's any more: their owner is succeeded, or said nothing for too long."""
    present: Attempt | None = None
    """The last that this owner opened."""
    _failed_on: set[str] = field(default_factory=set[str])
    """Deployments whose answers broke off, or that did not continue one."""
    _anew: bool = False
    """Nobody who can continue what stands has done so: this owner begins anew."""
    _priced: dict[str, Prices | None] = field(default_factory=dict[str, Prices | None])
    """By deployment that this owner asked: what it cost then."""

    @property
    def asked(self) -> bool:
        """Whether a model has got the prompt, and did not fail, in the last attempt of this owner."""
        return self.present is not None and self.present.asked is not None

    def in_force(self) -> bool:
        """Whether the attempt in force is this owner's."""
        return self.present is not None and self.tracked.assembly.state.writer == self.present.opening.writer

    def is_anothers(self) -> bool:
        """Whether somebody else's attempt is in force."""
        state = self.tracked.assembly.state
        return state.status is None and state.attempt > 0 and not self.in_force()

    def deployment(self, status: Status) -> str:
        """Whose price a reply that ends so has: who spoke last, also with a dead owner, or has read the prompt in vain.

        Who was asked and failed has not.
        """
        present = self.present
        if present and present.deployment:
            return present.deployment
        if present and present.asked and status != "failed":
            return present.asked
        standing = self.tracked.assembly.standing
        return next((said.deployment for said in reversed(standing) if said.deployment), "")

    def sent(self, call: ModelCall, attempt: Attempt) -> ModelCall:
        """The call as the attempt makes it: it looks again whether it is wanted, and notes who gets it as it leaves."""

        async def before_send(deployment: str) -> None:
            await self.still_wanted()
            attempt.asked = deployment
            # A route that goes while it answers must not make the reply free.
            self._priced[deployment] = self.means.prices(str(call.model or call.body.get("model") or ""), deployment)

        return replace(
            call,
            request=f"{call.request}.{attempt.opening.attempt}",
            avoid=frozenset(self._failed_on),
            before_try=self.still_wanted,
            before_send=before_send,
            failed=attempt.failed,
        )

    def failed(self, attempt: Attempt, error: ModelError) -> None:
        """Its model has failed: what the next attempt has to know of it."""
        attempt.failed(error)
        self._failed_on.add(attempt.deployment)
        if error.anew_but is not None:
            self._anew = True
            self._failed_on |= error.anew_but

    def prices(self, model: str, deployment: str) -> Prices | None:
        """What a deployment cost when this owner asked it; one that another owner asked, what is known of it now."""
        if deployment in self._priced:
            return self._priced[deployment]
        return self.means.prices(model, deployment)

    def give_up(self) -> None:
        """The attempt in force is nobody's any more."""
        self.given_up = self.tracked.assembly.state.attempt

    def _must_be_watched(self) -> bool:
        return self.is_anothers() and self.tracked.assembly.state.attempt > self.given_up

    async def to_speak_into(self, call: ModelCall) -> Attempt | None:
        """An attempt that is in force, as far as the log was read; None if somebody else's is. Raises LogError."""
        if self.present:
            await self.means.table.passed(await self.present.written.durable())
            continued_in_vain = self._anew and self.present.begun
            if self.in_force() and not self.present.seq and not continued_in_vain:
                return self.present
        if self._must_be_watched():
            return None
        while True:
            mode: Mode = "continue" if await self._begun(call) else "restart"
            attempt = await self._open(mode)
            if attempt is None or mode == "restart":
                return attempt
            attempt.begun = await self._begun(call)
            if attempt.begun:
                return attempt
            # What came before our opening was read cannot be continued: one more attempt takes it back.

    async def to_end_in(self) -> bool:
        """See to it that no attempt of somebody else's is in force, which could not be ended; false if one is.

        Nobody's attempt is superseded by one that only ends: what stands was read by somebody, and stays.
        Raises LogError.
        """
        if self.present:
            await self.means.table.passed(await self.present.opened.durable())
        if not self.is_anothers():
            return True
        if self._must_be_watched():
            return False
        return await self._open("restart" if self.tracked.assembly.gap else "continue") is not None

    async def still_wanted(self) -> None:
        """Before a model is called, again or for the first time: raises Overtaken where nobody wants its answer.

        After a stall the log is read to its present end first: what a process knew before it was stopped is old, and it
        may be nobody any more. So is what it was answered before it was stopped once more. Raises LogError.
        """
        stalls, looked = self.means.stalls, None
        while stalls.lately and looked != stalls.last_over:
            looked = stalls.last_over
            _, end = await self.means.log.bounds(Partition(self.means.namespace.of(CHAT_STREAM), self.means.partition))
            await self.means.table.passed(end - 1)
            if self.tracked.assembly.state.status is not None or self.is_anothers():
                raise Overtaken

    async def _begun(self, call: ModelCall) -> Begun | None:
        stands = await begun_aside(call.body, self.admitted.request.on_crash, self.tracked.assembly)
        if stands is None or stands.whole:
            return stands
        return stands if not self._anew and self.means.gateway.continues(call) else None

    async def _open(self, mode: Mode) -> Attempt | None:
        request, means = self.admitted.request, self.means
        number = self.tracked.assembly.state.attempt + 1
        opening = StreamAttempt(
            request=request.request,
            tenant=request.tenant,
            conversation=request.conversation,
            attempt=number,
            writer=Writer(f"{means.owner}.{means.partition}.{self.position}.{number}"),
            mode=mode,
            rate_limits=self.admitted.rate_limits,
        )
        draft = self.effects.draft(OPENING + 2 * number, CHAT_STREAM, request.conversation, opening)
        credit = credit_of(means, self.admitted, self.effects, self.tracked)
        self.present = Attempt(opening, means.batches, draft, credit)
        if number == 1:
            return self.present
        await means.table.passed(await self.present.opened.durable())
        log.info("attempt.opened", request=request.request, attempt=number, mode=mode)
        return self.present if self.in_force() else None
