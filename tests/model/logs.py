"""The topics of the small model: what stands in them, by records that are shared between all states of the world.

`Intake` is a tenant's log on chat.requests with production's admission folded over it, `Place` a conversation's
partition of chat.stream. A log with the same records is the same object.
"""

from collections.abc import Callable
from functools import cache
from typing import Final, Literal, NamedTuple

from tests.model.parts import Broken, Parts
from tests.model.strands import Strand, Token

from klatch_schemas import codec
from klatch_schemas.codec import Delta
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    Limits,
    QuotaLimitSet,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_streams.admission import Admission
from klatch_streams.kernel import Emit, Input
from klatch_streams.quota.ledger import Ledger

TENANT: Final = Tenant("acme")
CONVERSATION: Final = Conversation("c1")
NOW_MS: Final = 1_800_014_400_000
ADMISSION: Final = Admission()


class Admitted(NamedTuple):
    """A record of chat.admitted: the decision on a request, and the offset on chat.requests that it follows from."""

    kind: Literal["admitted", "refused"]
    request: int
    cause: int


Key = tuple[object, ...]


class Said:
    """A record of chat.stream. Records that say the same are the same object."""

    def __init__(self, request: int, key: Key, event: Event | Delta, token: Token | None) -> None:
        self.request, self.key, self.event, self.token = request, key, event, token

    @property
    def kind(self) -> object:
        """`opening`, `delta`, `end` or `cancel`."""
        return self.key[0]


Effect = Admitted | Said


@cache
def asked(request: int) -> ChatRequested:
    """The request of a number."""
    return ChatRequested(
        request=RequestId(f"r{request}"),
        tenant=TENANT,
        conversation=CONVERSATION,
        body={"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Count to three."}]},
    )


class Book:
    """All that was ever said, by what it says."""

    def __init__(self) -> None:
        self._said: dict[tuple[int, Key], Said] = {}
        self._tokens: dict[tuple[str, Token | None], Token] = {}

    def say(self, key: Key, request: int, make: Callable[[], Event | Delta], token: Token | None = None) -> Said:
        """A record; `key` names its content, which is made the first time."""
        found = self._said.get((request, key))
        if found is None:
            found = self._said[request, key] = Said(request, key, make(), token)
        return found

    def token(self, call: str, before: Token | None) -> Token:
        """A token of a call, behind another."""
        return self._tokens.setdefault((call, before), Token(call, before))


class Intake:
    """chat.requests up to one of its records, and what admission makes of it."""

    def __init__(self, before: "Intake | None", event: Event | None, book: Book) -> None:
        self._book = book
        self.depth: int = before.depth + 1 if before else 0
        self.ledger: Ledger = before.ledger if before else ADMISSION.initial(TENANT)
        self.effects: tuple[Effect, ...] = ()
        self.published: frozenset[int] = before.published if before else frozenset()
        self.settled: dict[int, tuple[str, UsageSettled]] = dict(before.settled) if before else {}
        self.path: tuple[Intake, ...] = (*before.path, self) if before else (self,)
        self._next: dict[object, Intake] = {}
        if event:
            self._decide(event)

    def publish(self, request: int) -> "Intake":
        """A producer asks, or asks again."""
        return self._then(("asked", request), asked(request))

    def limit(self, concurrent: int) -> "Intake":
        """An operator sets the tenant's limit."""
        limits = Limits(concurrent_requests=concurrent)
        return self._then(("limit", concurrent), QuotaLimitSet(tenant=TENANT, limits=limits))

    def settle(self, request: int, settlement: str, said: UsageSettled) -> "Intake":
        """Generation settles; raises Broken unless it says what was settled before under the same id."""
        after = self._then(("settled", request, settlement, said.usage.total_tokens, said.status), said)
        known, first = after.settled.setdefault(request, (settlement, said))
        if known != settlement:
            raise Broken(f"r{request} was settled under two ids: {known}, {settlement}")
        if (first.usage, first.status) != (said.usage, said.status):
            raise Broken(f"r{request} was settled as {first.usage}, then as {said.usage}")
        if request in self.settled:
            if (after.ledger.held, after.ledger.used) != (self.ledger.held, self.ledger.used):
                raise Broken(f"admission counts a repeated settlement of r{request}")
            return self
        return after

    def _then(self, key: object, event: Event) -> "Intake":
        found = self._next.get(key)
        if found is None:
            found = self._next[key] = Intake(self, event, self._book)
        return found

    def _decide(self, event: Event) -> None:
        said: Input[Ledger] = Input(event, NOW_MS)
        after, effects = ADMISSION.decide(self.ledger, said)
        # A successor decides on what the snapshot holds.
        restored = ADMISSION.load(TENANT, codec.loads(codec.dumps(ADMISSION.dump(self.ledger))))
        if ADMISSION.decide(restored, said)[1] != effects:
            raise Broken(f"admission decides {event.KIND} otherwise after a restart")
        self.ledger = after
        self.effects = tuple(self._effect(one) for one in effects)
        if isinstance(event, ChatRequested):
            self.published |= {_number(event.request)}

    def _effect(self, effect: Emit) -> Effect:
        match effect.event:
            case ChatAdmitted():
                return Admitted("admitted", _number(effect.event.request.request), self.depth - 1)
            case ChatRefused():
                return Admitted("refused", _number(effect.event.request), self.depth - 1)
            case StreamEnd() as end:
                return self._book.say(("end", "admission"), _number(effect.event.request), lambda: end)
            case _:
                raise Broken(f"admission wrote {effect.event.KIND}")


def _number(request: str) -> int:
    return int(request[1:])


class Place:
    """chat.stream up to one of its records (of `request`), with the strand of each request up to there."""

    def __init__(self, before: "Place | None", strands: tuple[Strand, ...], request: int = -1) -> None:
        self.strands, self.request = strands, request
        self.depth: int = before.depth + 1 if before else 0
        self.path: tuple[Place, ...] = (*before.path, self) if before else (self,)
        self.first: tuple[int, ...] = before.first if before else (-1,) * len(strands)
        """The offset of each request's first record; -1: none."""
        if before and self.first[request] < 0:
            self.first = (*self.first[:request], before.depth, *self.first[request + 1 :])
        self._next: dict[Said, Place] = {}

    @classmethod
    def empty(cls, requests: int, parts: Parts) -> "Place":
        """A partition without records."""
        return cls(None, tuple(Strand(None, None, None, parts) for _ in range(requests)))

    def then(self, one: Said) -> "Place":
        """The partition with one record more."""
        found = self._next.get(one)
        if found is None:
            strand = self.strands[one.request].then(one, one.event, one.token)
            strands = (*self.strands[: one.request], strand, *self.strands[one.request + 1 :])
            found = self._next[one] = Place(self, strands, one.request)
        return found

    def at(self, depth: int) -> "Place":
        """The partition when it held so many records."""
        return self.path[depth]


def opening(request: int, attempt: int, writer: str, mode: Literal["restart", "continue"]) -> StreamAttempt:
    """A `stream.attempt`."""
    return StreamAttempt(
        request=asked(request).request,
        tenant=TENANT,
        conversation=CONVERSATION,
        attempt=attempt,
        writer=Writer(writer),
        mode=mode,
    )


def cancelled(book: Book, request: int, by: str, *, undo: bool = False) -> Said:
    """A `stream.cancel`."""
    return book.say(
        ("cancel", by, undo),
        request,
        lambda: StreamCancel(
            request=asked(request).request, tenant=TENANT, conversation=CONVERSATION, by=by, undo=undo
        ),
    )
