"""What is asked while the faults strike: conversations of several turns, planned as a pure function of the seed.

Every reply is made of tokens that name the model call they come from (`<<c17:0>>`), so that text put together from
two calls cannot pass for one. Some turns are cancelled, have a deadline, are sent twice, are read in pieces, or meet
a model server that fails.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal
from urllib.parse import urlencode

from klatch_schemas.events import IfBusy, OnCrash
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant, request_id_for_key
from klatch_workers.torture.tenants import (
    FLOODING,
    FREE,
    LIMITED,
    PEOPLE,
    PERSONS,
    PRICED,
    PRICED_RATE,
    PRICED_TOKENS,
    TALKING,
    shares,
)

Edge = Literal["kafka", "http"]
Cancel = Literal["record", "delete", "disconnect"]
_EDGES: Final[tuple[Edge, ...]] = ("kafka", "kafka", "http")
"""A request over HTTP has an `Idempotency-Key`, which costs a door more than all the rest of the request."""
_IF_BUSY: Final[tuple[IfBusy, ...]] = ("reject", "interrupt", "rollback")
_IMPATIENT: Final = 0.12
"""How many of the turns that follow another do not wait for it."""
_TURNS: Final = (1, 2, 2, 3, 4, 6)
_SLOWLY: Final = 15.0
"""Tokens a second of replies that take long."""
_FAULTS: Final[tuple[dict[str, object], ...]] = (
    {"status": 500},
    {"status": 429, "retry_after": "0"},
    {"fault": "drop"},
    {"fault": "drop", "fault_after": 0},
    {"fault": "reset"},
    {"fault": "stall"},
    {"fault": "garbage"},
    {"fault": "error-event"},
)
"""Ways in which the model server fails."""
_MENDED: Final[tuple[Mapping[str, object], ...]] = (
    {"status": 500},
    {"status": 429},
    {"fault": "drop"},
    {"fault": "reset"},
    {"fault": "error-event"},
)
"""Those that another try mends, where it meets a server that does not fail again: the gateway's before the first token
(a route has three), another attempt's afterwards (an owner makes three). Garbage is not tried again, nor is silence
waited out."""
_TRIES: Final = 3


ONCE_OPENED: Final = -1
ONCE_ENDED: Final = -2
_FLOODS: Final = (10.0, 600.0)
"""Seconds after the load began, and from one to the next."""
_FLOODED: Final = 7
"""The most that a conversation of a flood asks; they end one by one."""
_THINKS_S: Final = 6.0
"""Before its first token, where it is to be cancelled meanwhile."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How often what occurs in a load: a bug may need much of what is rare."""

    slow: float = 0.1
    """How many of the turns speak for so long that several faults meet them."""
    waits: float = 0.6
    """How many of the turns are waited for by the turn after them."""
    continues: float = 0.3
    """How many of the turns ask to be continued after a crash."""
    every_s: float = 0.0
    """Conversations begin together, so often; 0: each by itself."""
    limited: float = 0.18
    """How many of the conversations are those of tenants with limits."""
    alone: float = 0.15
    """How many of the clients have no conversation: each of their requests is one by itself, and recalls nothing."""
    holds_s: float = 0.0
    """How long each of two replies takes that are asked one behind the other before all others, by a conversation of
    their own: until the first has ended, their partition commits nothing that came after it. 0: nobody asks them."""
    flood: int = 400
    """How many requests a tenant of its own asks at once, ten seconds after the load began and again every ten minutes;
    limits refuse nearly all of them."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What goes wrong with a request, beside what happens to klatch."""

    upstream: dict[str, object] = field(default_factory=dict[str, object])
    """How the model server fails; empty: it does not."""
    cancel: Cancel | None = None
    cancel_after: int = 0
    """After so many chunks; 0: as soon as it is published; `ONCE_OPENED`: while the model has said nothing yet;
    `ONCE_ENDED`: too late."""
    timeout_ms: int | None = None
    """The deadline, from the moment of asking."""

    @property
    def fails_for_good(self) -> bool:
        """Whether no number of attempts is sure to bring an answer."""
        faults = {name: self.upstream[name] for name in ("status", "fault") if name in self.upstream}
        fails = self.upstream.get("fails")
        return bool(faults) and not (isinstance(fails, int) and fails < _TRIES and faults in _MENDED)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation."""

    number: int
    request: RequestId
    tokens: int
    rate: float
    trouble: Trouble = Trouble()
    twice: bool = False
    """Whether the producer sends it again, as after a doubtful failure."""
    leaves_after: tuple[int, ...] = ()
    """After how many chunks its readers go away, to come back and resume."""
    by_client: bool = False
    """Whether klatch's Python client reads it too."""
    waits: bool = True
    """Whether the turn after it is asked only when it has ended."""
    on_crash: OnCrash = "restart"
    if_busy: IfBusy = "enqueue"
    interrupted: bool = False
    """Whether a later turn cancels it if that finds it unfinished."""
    person: Person | None = None
    """Who asks, where that is limited."""
    limited: bool = False
    """Whether limits may refuse it, or a budget stop its reply."""
    key: str = ""
    """Its `Idempotency-Key`; empty: it is not asked over HTTP."""
    alone: bool = False
    """Whether it is a conversation by itself, named after the request, of which nothing is recalled."""

    @property
    def model(self) -> str:
        """The model's name, which carries the script for the model server, or has a route to one that does."""
        return PRICED if self.person else script(self.tokens, self.rate, self.trouble.upstream)

    @property
    def plain(self) -> bool:
        """Whether it must be completed: nobody cancels, nothing runs out, and the model server does its work."""
        return self.trouble == Trouble() and self.if_busy == "enqueue" and not (self.interrupted or self.limited)


def script(tokens: int, rate: float, upstream: Mapping[str, object] | None = None) -> str:
    """The name of a model that speaks so many tokens, so many a second."""
    return "fake?" + urlencode({"reply": "unique", "tokens": tokens, "rate": rate, **(upstream or {})})


@dataclass(frozen=True, slots=True)
class Talk:
    """What one client asks: the turns of a conversation, or requests that stand alone, in the order of their asking."""

    at_s: float
    """When it begins, in seconds after the load began."""
    tenant: Tenant
    conversation: Conversation
    edge: Edge
    turns: tuple[Turn, ...]

    def conversation_of(self, turn: Turn) -> Conversation:
        """The conversation that one of its turns belongs to."""
        return Conversation(turn.request) if turn.alone else self.conversation


USUAL: Final = Shape()


def plan(
    seed: int, minutes: float, requests_per_second: float, *, plain: bool = False, shape: Shape = USUAL
) -> list[Talk]:
    """All conversations of a load, in the order of their beginnings.

    A plain one has the same conversations at the same times, all over Kafka, and nothing but questions and answers.
    """
    chance = random.Random(f"load {seed}")  # noqa: S311 - no secret
    every = sum(_TURNS) / len(_TURNS) / requests_per_second
    at, talks = 0.0, list[Talk]()
    while (at := at + chance.expovariate(1 / every)) < minutes * 60:
        begins = at // shape.every_s * shape.every_s if shape.every_s else at
        talks.append(_talk(chance, seed, len(talks), round(begins, 3), shape))
    # Drawn apart: a seed has the same turns as it had before there were any that stand alone.
    alone = random.Random(f"alone {seed}")  # noqa: S311 - no secret
    talks = [_parted(talk) if alone.random() < shape.alone else talk for talk in talks]
    talks = [_holding(seed, shape.holds_s), *talks] if shape.holds_s else talks
    if plain:
        return [_plain(talk) for talk in talks]
    return sorted([*talks, *_floods(seed, minutes, shape.flood)], key=lambda talk: talk.at_s)


def _parted(talk: Talk) -> Talk:
    """The same turns, each a conversation by itself: none finds another unfinished."""
    turns = [replace(turn, alone=True, if_busy="enqueue", interrupted=False) for turn in talk.turns]
    return replace(talk, turns=tuple(turns))


def _plain(talk: Talk) -> Talk:
    turns = (
        replace(
            turn,
            request=RequestId(f"{talk.conversation}.{turn.number}"),
            trouble=Trouble(),
            twice=False,
            leaves_after=(),
            by_client=False,
            on_crash="restart",
            if_busy="enqueue",
            interrupted=False,
            person=None,
            limited=False,
            key="",
            alone=False,
        )
        for turn in talk.turns
    )
    tenant = FREE[0] if talk.tenant in LIMITED else talk.tenant
    return replace(talk, tenant=tenant, edge="kafka", turns=tuple(turns))


def _holding(seed: int, lasts_s: float) -> Talk:
    conversation = Conversation(f"talk-{seed}-holding")
    tokens = round(lasts_s * _SLOWLY)
    turns = [
        Turn(number, RequestId(f"{conversation}.{number}"), tokens, _SLOWLY, waits=bool(number)) for number in range(2)
    ]
    return Talk(0.0, FREE[0], conversation, "kafka", tuple(turns))


def _floods(seed: int, minutes: float, requests: int) -> Iterator[Talk]:
    chance = random.Random(f"flood {seed}")  # noqa: S311 - no secret
    at, every = _FLOODS
    while requests and at < minutes * 60:
        left = requests
        while left:
            conversation = Conversation(f"flood-{seed}-{at:.0f}-{left}")
            turns = min(left, chance.randint(1, _FLOODED))
            left -= turns
            yield Talk(at, FLOODING, conversation, "kafka", tuple(_flooding(conversation, turns)))
        at += every


def _flooding(conversation: Conversation, turns: int) -> Iterator[Turn]:
    for number in range(turns):
        yield Turn(number, RequestId(f"{conversation}.{number}"), 20, 40.0, waits=False, limited=True)


def _talk(chance: random.Random, seed: int, number: int, at: float, shape: Shape) -> Talk:
    [tenant] = chance.choices(TALKING, shares(shape.limited))
    conversation = Conversation(f"talk-{seed}-{number}")
    edge = chance.choice(_EDGES)
    turns = [_turn(chance, tenant, conversation, edge, number, shape) for number in range(chance.choice(_TURNS))]
    turns = [replace(turn, limited=tenant in LIMITED) for turn in _meeting(chance, turns)]
    return Talk(at, tenant, conversation, edge, tuple(_by(chance, turns) if tenant == PEOPLE else turns))


def _by(chance: random.Random, turns: list[Turn]) -> list[Turn]:
    """The same turns, asked by a person of a model that has a price, and so has one script for all."""
    person = chance.choice(PERSONS)
    return [
        replace(
            turn,
            person=person,
            tokens=PRICED_TOKENS,
            rate=PRICED_RATE,
            trouble=Trouble() if turn.trouble.upstream else turn.trouble,
        )
        for turn in turns
    ]


def _meeting(chance: random.Random, turns: list[Turn]) -> list[Turn]:
    """The turns of a conversation, of which some do not wait for those before them."""
    for number in range(1, len(turns)):
        if chance.random() < _IMPATIENT:
            if_busy = chance.choice(_IF_BUSY)
            turns[number - 1] = replace(turns[number - 1], waits=False)
            turns[number] = replace(turns[number], if_busy=if_busy)
            if if_busy != "reject":
                turns[:number] = [replace(turn, interrupted=True) for turn in turns[:number]]
    return turns


def _turn(chance: random.Random, tenant: Tenant, conversation: str, edge: Edge, number: int, shape: Shape) -> Turn:
    tokens = chance.randint(20, 40)
    tokens, rate = (3 * tokens, _SLOWLY) if chance.random() < shape.slow else (tokens, 40.0)
    key = f"{conversation}.{number}"
    return Turn(
        number=number,
        # Over HTTP a request is named by its idempotency key, so that whoever lost the answer can ask again.
        request=request_id_for_key(tenant, key) if edge == "http" else RequestId(key),
        tokens=tokens,
        rate=rate,
        trouble=_trouble(chance, edge, tokens),
        twice=chance.random() < 0.1,
        leaves_after=tuple(sorted(_leaving(chance, tokens))),
        by_client=chance.random() < 0.08,
        on_crash="continue" if chance.random() < shape.continues else "restart",
        waits=chance.random() < shape.waits,
        key=key if edge == "http" else "",
    )


def _leaving(chance: random.Random, tokens: int) -> Iterator[int]:
    while chance.random() < 0.2:
        yield chance.randint(1, tokens)


def _trouble(chance: random.Random, edge: Edge, tokens: int) -> Trouble:
    """What goes wrong with one request in three."""
    match chance.choices(("none", "cancel", "deadline", "upstream"), (66, 14, 8, 12))[0]:
        case "cancel":
            ways: tuple[Cancel, ...] = ("record", "delete", "disconnect") if edge == "http" else ("record",)
            when = chance.choices(("before", "opened", "speaking", "ended"), (20, 25, 45, 10))[0]
            marks = {"before": 0, "opened": ONCE_OPENED, "ended": ONCE_ENDED}
            after = marks.get(when, chance.randint(1, tokens))
            slow: dict[str, object] = {"first_delay": _THINKS_S} if when == "opened" else {}
            way = chance.choice(ways)
            # Who has heard the end has nobody left to hang up on.
            return Trouble(cancel="record" if when == "ended" else way, cancel_after=after, upstream=slow)
        case "deadline":
            return Trouble(timeout_ms=chance.choice((1, 100, 400, 3_000, 20_000)))
        case "upstream":
            fault = chance.choice(_FAULTS)
            if chance.random() < 0.5:
                fault = {**fault, "fails": chance.choice((1, 2))}
            # Nobody waits for the end of a silence but a deadline.
            return Trouble(upstream=fault, timeout_ms=3_000 if fault.get("fault") == "stall" else None)
        case _:
            return Trouble()
