"""Reads `dead.letters`: what each letter says of itself, which were redriven, and which died again since.

Values are not kept: a million letters are a few hundred megabytes as it is. A letter whose record was put back and died
again is history, wherever it stands.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.events import ChatAdmitted, ChatRequested
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, DEAD_LETTERS, Namespace
from klatch_streams import dead_headers as dead
from klatch_streams.catch_up import catch_up
from klatch_streams.log import Log
from klatch_streams.redriving import origin_of_letter, topic_of


class Asked(NamedTuple):
    """The request that a letter is about."""

    tenant: Tenant
    request: RequestId
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter without its value."""

    place: Partition
    """In `dead.letters`."""
    offset: int
    died_ms: int
    topic: str
    """Where its record came from, without the namespace."""
    source: str
    """`topic/partition/offset` of that record."""
    origin: str
    """The same of the record that died first."""
    stage: str
    reason: str
    error: str
    key: str | None
    tenant: str | None
    """As far as it can be known."""
    kind: str
    """Empty if the record does not tell."""
    asked: Asked | None
    attempts: int
    redriven: int
    first_seen_ms: int
    size: int
    """Of the whole value, in bytes."""
    cut: bool
    """Whether the letter holds only the beginning of it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters: those that match one of each that is said. Times are of the letter, since the epoch."""

    stages: Sequence[str] = ()
    reasons: Sequence[str] = ()
    topics: Sequence[str] = ()
    tenants: Sequence[str] = ()
    keys: Sequence[str] = ()
    since_ms: int = 0
    until_ms: int | None = None

    def matches(self, letter: Letter) -> bool:
        """Whether `letter` is wanted."""
        said = (
            (self.stages, letter.stage),
            (self.reasons, letter.reason),
            (self.topics, letter.topic),
            (self.tenants, letter.tenant),
            (self.keys, letter.key),
        )
        in_time = self.since_ms <= letter.died_ms and (self.until_ms is None or letter.died_ms < self.until_ms)
        return in_time and all(not names or one in names for names, one in said)


class Progress(NamedTuple):
    """How many records of how many were read."""

    read: int
    of: int


@dataclass(slots=True)
class Shelf:
    """The letters of a namespace that are wanted, and what has become of their records since."""

    namespace: Namespace
    wanted: Wanted
    letters: list[Letter] = field(default_factory=list[Letter])
    _redriven_ms: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])
    """When the record of an origin was put back for the n-th time, in milliseconds since the epoch."""
    _times: dict[str, int] = field(default_factory=dict[str, int])
    """How often the record of an origin had been put back when it last died."""

    def put(self, record: Record) -> None:
        """A record of `dead.letters`."""
        if record.header(dead.RECEIPT) is not None:
            self._redriven_ms[origin_of_letter(record), dead.times_redriven(record)] = record.timestamp_ms
            return
        letter = letter_in(record, self.namespace)
        self._times[letter.origin] = max(letter.redriven, self._times.get(letter.origin, 0))
        if self.wanted.matches(letter):
            self.letters.append(letter)

    def latest(self) -> Iterator[Letter]:
        """Of each record one letter, the last that is wanted, oldest first; none of what died again after all these.

        Several stages may have given it up before it was put back, or one of them twice, around a crash.
        """
        current = (one for one in sorted(self.letters, key=_order) if one.redriven == self._times[one.origin])
        yield from sorted({letter.origin: letter for letter in current}.values(), key=_order)

    def redriven_ms(self, letter: Letter) -> int | None:
        """When the record of `letter` was put back, if it was since."""
        return self._redriven_ms.get((letter.origin, letter.redriven + 1))


def _order(letter: Letter) -> tuple[int, Partition, int]:
    return letter.died_ms, letter.place, letter.offset


async def read_letters(
    log: Log, namespace: Namespace, wanted: Wanted, progress: Callable[[Progress], None] = lambda _: None
) -> Shelf:
    """The letters that stand now. Raises LogError."""
    topic = namespace.of(DEAD_LETTERS)
    shelf, spans = Shelf(namespace, wanted), list[tuple[Partition, int, int]]()
    for number in range(await log.partitions(topic)):
        place = Partition(topic, number)
        first, end = await log.bounds(place)
        start = max(first, await log.offset_at(place, wanted.since_ms)) if wanted.since_ms else first
        spans.append((place, start, end))
    read, of = 0, sum(max(0, end - start) for _, start, end in spans)
    for place, start, end in spans:
        tail = await log.tail()
        try:
            async for records in catch_up(tail, place, start, end):
                for record in records:
                    shelf.put(record)
                read += len(records)
                progress(Progress(read, of))
        finally:
            await tail.close()
    return shelf


class _Kind(msgspec.Struct):
    kind: str


_read_kind: Final = msgspec.json.Decoder(_Kind).decode


def letter_in(record: Record, namespace: Namespace) -> Letter:
    """What a record of `dead.letters` says of itself; what it should say and does not is empty."""
    asked = _asked(record)
    topic = topic_of(record)
    key = None if record.key is None else record.key.decode(errors="replace")
    tenant = _text(record, codec.TENANT) or (asked.tenant if asked else "")
    bare = topic.removeprefix(namespace.prefix)
    if not tenant and bare == CHAT_REQUESTS.name:
        tenant = key or ""
    return Letter(
        place=record.partition,
        offset=record.offset,
        died_ms=record.timestamp_ms,
        topic=bare,
        source=f"{topic}/{_text(record, dead.PARTITION)}/{_text(record, dead.OFFSET)}",
        origin=origin_of_letter(record),
        stage=_text(record, dead.STAGE),
        reason=_text(record, dead.REASON),
        error=_text(record, dead.ERROR),
        key=key,
        tenant=tenant or None,
        kind=_kind(record),
        asked=asked,
        attempts=dead.number_in(record, dead.ATTEMPTS),
        redriven=dead.times_redriven(record),
        first_seen_ms=dead.number_in(record, dead.FIRST_SEEN),
        size=dead.number_in(record, dead.CUT) or len(record.value or b""),
        cut=record.header(dead.CUT) is not None,
    )


def _text(record: Record, header: str) -> str:
    return (record.header(header) or b"").decode(errors="replace")


def _asked(record: Record) -> Asked | None:
    try:
        said = codec.decode(record.value)
    except Unreadable:
        return None
    request = said.request if isinstance(said, ChatAdmitted) else said
    if isinstance(request, ChatRequested):
        return Asked(request.tenant, request.request, request.conversation)
    return None


def _kind(record: Record) -> str:
    if said := _text(record, codec.KIND):
        return said
    try:
        return _read_kind(record.value or b"").kind
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
