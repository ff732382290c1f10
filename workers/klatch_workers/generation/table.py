"""What the log says of every request of one partition that is not concluded yet.

Fed by the follower with the partition's `chat.stream` and `trust.verdicts`; requests under way look things up here
and wait here for what they need to hear. It also knows what a successor must know: the floors from where it reads the
two topics again, and the cancels that came before their requests, or for nobody, which do not hold the floors back.
"""

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import NamedTuple

import structlog

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Opened, Said, Spoke, StreamState
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import (
    EmbeddingAdmitted,
    StreamAttempt,
    StreamBudget,
    StreamCancel,
    StreamEnd,
    StreamRetract,
    TrustVerdict,
)
from klatch_schemas.records import Cause, Partition, Record

log = structlog.get_logger(__name__)

ORPHAN_MS = 3_600_000
"""A cancel or a verdict is nobody's once requests that were asked so much later have been brought to their end.

Not measured by a clock: after an outage, of admission or of this stage, everything that waits is old.
"""

REMEMBERED = 10_000
"""How many concluded requests are remembered, so that what comes late for them is ignored."""


EARLY = 256
"""So many cancels without anything else of their request the snapshot carries; further ones hold the floors back."""

Seen = Mapping[str, tuple[int, int]]
"""By source partition: offset and effect of the last admission."""


class Early(NamedTuple):
    """A cancel of a request of which nothing else was heard."""

    tenant: str
    request: str
    offset: int
    """Of chat.stream."""
    timestamp_ms: int
    undo: bool


class _Concluded(NamedTuple):
    """What a successor needs of a concluded request, until that is committed."""

    stream_floor: int
    verdict_floor: int
    asked_ms: int


@dataclass(slots=True, eq=False)
class Tracked:
    """One request, as its partition tells of it."""

    tenant: str
    request: str
    assembly: Assembly = field(default_factory=Assembly)
    verdict: TrustVerdict | None = None
    asked_at: Cause | None = None
    """The request's place on chat.requests, as its verdict tells."""
    stream_floor: int | None = None
    """Where its stream begins."""
    verdict_floor: int | None = None
    last_ms: int = 0
    """Timestamp of the last record that told of it."""
    records: int = 0
    """How many records of its stream were heard; grows while somebody speaks."""
    granted: int = 0
    """How many completion tokens admission has granted since the request was admitted (`stream.budget`)."""
    spent: str | None = None
    """The budget that is used up: there is no more to be granted."""
    taken: bool = False
    """Whether this owner has met the request itself, on chat.admitted."""
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_early(self) -> bool:
        """Whether nothing was heard of its stream but cancels."""
        state = self.assembly.state
        return state.status == "cancelled" and not (state.attempt or state.settled or self.granted or self.spent)

    def tell(self) -> None:
        """Something happened that somebody may wait for."""
        self._news.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until `true()`, which is asked again whenever the log told something other than a delta."""
        while not true():
            self._news.clear()
            await self._news.wait()


class Table:
    """The requests of one partition."""

    def __init__(
        self,
        stream_position: int = 0,
        verdict_position: int = 0,
        early: Iterable[Early] = (),
        done: Mapping[Partition, int] = MappingProxyType({}),
    ) -> None:
        """The positions are those from which the two topics are going to be read, `early` what an earlier owner heard.

        Requests that were admitted below the offset of their partition in `done` are over; what the log says of them
        again is not kept.
        """
        self._tracked: dict[tuple[str, str], Tracked] = {}
        self._by_writer: dict[str, Tracked] = {}
        self.stream_position = stream_position
        self.verdict_position = verdict_position
        self.unreadable: list[tuple[Record, str]] = []
        """Records that no reader can use: for the dead letters, at the next checkpoint."""
        self._concluded: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._uncommitted: dict[int, _Concluded] = {}
        """By their offset on chat.admitted: after a crash they are met again."""
        self._progress_ms = 0
        """When the latest request was asked that is committed."""
        self._passed: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()
        self._done = done
        for cancel in early:
            tracked = self.of(cancel.tenant, cancel.request)
            tracked.assembly.state = StreamState(status="cancelled", undone=cancel.undo)
            tracked.stream_floor, tracked.last_ms = cancel.offset, cancel.timestamp_ms

    # --- fed by the follower

    def hear_stream(self, record: Record) -> None:
        """Fold a record of `chat.stream`."""
        self.stream_position = record.offset + 1
        try:
            said = codec.decode(record.value)
        except Unreadable as error:
            self.unreadable.append((record, str(error)))
        else:
            self._hear(record, said)
        self._wake_those_it_passed()

    def stream_moved(self, position: int) -> None:
        """All of `chat.stream` before `position` was heard; markers of transactions are nothing to be heard."""
        self.stream_position = max(self.stream_position, position)
        self._wake_those_it_passed()

    def verdicts_moved(self, position: int) -> None:
        """As `stream_moved`, of `trust.verdicts`."""
        self.verdict_position = max(self.verdict_position, position)

    def _wake_those_it_passed(self) -> None:
        while self._passed and self._passed[0][0] < self.stream_position:
            waiting = heapq.heappop(self._passed)[2]
            if not waiting.done():
                waiting.set_result(None)

    def hear_verdict(self, record: Record) -> None:
        """Keep a verdict on input: the first of a request counts."""
        self.verdict_position = record.offset + 1
        try:
            verdict = codec.decode_as(TrustVerdict, record.value)
        except Unreadable as error:
            self.unreadable.append((record, str(error)))
            return
        if verdict.stage != "input":
            return
        if (verdict.tenant, verdict.request) in self._concluded:
            return
        tracked = self.of(verdict.tenant, verdict.request)
        tracked.last_ms = record.timestamp_ms
        if tracked.verdict is None:
            if tracked.verdict_floor is None:
                tracked.verdict_floor = record.offset
            self.judge(tracked, verdict, record)

    def _hear(self, record: Record, said: Said) -> None:
        match said:
            case Delta():
                tracked = self._by_writer.get(said.writer)
                if tracked is None or tracked.request != said.request:
                    return
            case StreamAttempt() | StreamEnd() | StreamCancel() | StreamRetract() | StreamBudget():
                tracked = self.of(said.tenant, said.request)
            case EmbeddingAdmitted():
                return
            case _:
                self.unreadable.append((record, f"{said.KIND} does not belong into this topic"))
                return
        if self._is_over(tracked, record):
            # Of an earlier owner, a late cancel, or a zombie: it must not hold the floors back.
            self._tracked.pop((tracked.tenant, tracked.request), None)
            return
        tracked.records += 1
        tracked.last_ms = record.timestamp_ms
        if tracked.stream_floor is None:
            tracked.stream_floor = record.offset
        before = tracked.assembly.state.writer
        if isinstance(said, StreamBudget):
            tracked.granted, tracked.spent = max(tracked.granted, said.granted), said.limit
        heard = tracked.assembly.hear(record.offset, said)
        if isinstance(heard, Spoke):
            return
        if isinstance(heard, Opened):
            self._by_writer.pop(before, None)
            self._by_writer[heard.writer] = tracked
        tracked.tell()

    def _is_over(self, tracked: Tracked, record: Record) -> bool:
        if not tracked.taken and (cause := _cause_of(record)) and cause.offset < self._done.get(cause.partition, 0):
            self.forget(tracked.tenant, tracked.request)
        return (tracked.tenant, tracked.request) in self._concluded

    # --- asked by requests under way

    def of(self, tenant: str, request: str) -> Tracked:
        """What is known of a request, from now on kept."""
        tracked = self._tracked.get((tenant, request))
        if tracked is None:
            tracked = self._tracked[tenant, request] = Tracked(tenant, request)
        return tracked

    def take(self, tenant: str, request: str) -> Tracked:
        """The request itself was met: its records are needed until `forget`."""
        self._concluded.pop((tenant, request), None)
        tracked = self.of(tenant, request)
        tracked.taken = True
        # What it will say comes from here on, if nothing has been heard yet.
        if tracked.stream_floor is None:
            tracked.stream_floor = self.stream_position
        if tracked.verdict_floor is None:
            tracked.verdict_floor = self.verdict_position
        return tracked

    def replace(self, tracked: Tracked, assembly: Assembly) -> None:
        """`assembly` is the request's whole stream up to `stream_position`, which is more than was heard here."""
        self._by_writer.pop(tracked.assembly.state.writer, None)
        tracked.assembly = assembly
        if assembly.state.writer:
            self._by_writer[assembly.state.writer] = tracked
        tracked.tell()

    def judge(self, tracked: Tracked, verdict: TrustVerdict, record: Record) -> None:
        """The first verdict on the request, which stands in `record`."""
        tracked.verdict, tracked.asked_at = verdict, _cause_of(record)
        tracked.tell()

    def conclude(self, tracked: Tracked, admitted_at: int, asked_ms: int) -> None:
        """The request, taken from `admitted_at`, is concluded; a successor needs it until that is committed."""
        assert tracked.stream_floor is not None  # noqa: S101 - `take` has set them
        assert tracked.verdict_floor is not None  # noqa: S101
        self._uncommitted[admitted_at] = _Concluded(tracked.stream_floor, tracked.verdict_floor, asked_ms)
        self.forget(tracked.tenant, tracked.request)

    def forget(self, tenant: str, request: str) -> None:
        """Nothing of the request is needed any more, by a successor either; what comes late for it is ignored."""
        if tracked := self._tracked.get((tenant, request)):
            self._drop(tracked)
        self._concluded[tenant, request] = None
        if len(self._concluded) > REMEMBERED:
            self._concluded.popitem(last=False)

    def _drop(self, tracked: Tracked) -> None:
        del self._tracked[tracked.tenant, tracked.request]
        self._by_writer.pop(tracked.assembly.state.writer, None)

    async def passed(self, offset: int) -> None:
        """Wait until the record of `chat.stream` at `offset` has been read back."""
        if self.stream_position <= offset:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._passed, (offset, next(self._order), waiting))
            await waiting

    # --- asked by checkpoints

    def commit(self, low_water: int, seen: Seen) -> None:
        """All before `low_water` on chat.admitted is done; `seen` are the last places on chat.requests among it."""
        for offset in [offset for offset in self._uncommitted if offset < low_water]:
            self._progress_ms = max(self._progress_ms, self._uncommitted.pop(offset).asked_ms)
        for tracked in list(self._tracked.values()):
            if not tracked.taken and self._is_orphan(tracked, seen):
                self._drop(tracked)

    def _is_orphan(self, tracked: Tracked, seen: Seen) -> bool:
        if place := tracked.asked_at:
            # Admission decides in order: what it has not passed on, while later requests came, it never will.
            return seen.get(source_of(place), (-1, -1))[0] >= place.offset
        return tracked.last_ms < self._progress_ms - ORPHAN_MS

    def floors(self) -> tuple[int, int]:
        """The first offsets of chat.stream and trust.verdicts that a successor needs."""
        tracked, concluded = self._tracked.values(), self._uncommitted.values()
        early = {(cancel.tenant, cancel.request) for cancel in self.early()}
        needed = [one for one in tracked if (one.tenant, one.request) not in early]
        streams = [t.stream_floor for t in needed if t.stream_floor is not None]
        verdicts = [t.verdict_floor for t in tracked if t.verdict_floor is not None]
        return (
            min([self.stream_position, *streams, *(c.stream_floor for c in concluded)]),
            min([self.verdict_position, *verdicts, *(c.verdict_floor for c in concluded)]),
        )

    def early(self) -> list[Early]:
        """What a successor must be told beside the floors: the first of the cancels of which nothing else is known."""
        found = [
            Early(t.tenant, t.request, t.stream_floor, t.last_ms, t.assembly.state.undone)
            for t in self._tracked.values()
            if t.is_early and t.stream_floor is not None
        ]
        return sorted(found, key=lambda cancel: cancel.offset)[:EARLY]

    def forget_concluded(self, before: int) -> None:
        """Drop what an earlier owner concluded: every stream begun before that offset which nobody takes up."""
        for tracked in list(self._tracked.values()):
            state, floor = tracked.assembly.state, tracked.stream_floor
            if not tracked.taken and floor is not None and floor < before and (state.attempt or state.settled):
                self.forget(tracked.tenant, tracked.request)


def source_of(cause: Cause) -> str:
    """The partition of a cause, as one string."""
    return f"{cause.partition.topic}/{cause.partition.number}"


def _cause_of(record: Record) -> Cause | None:
    header = record.header(codec.CAUSE)
    try:
        return Cause.parse(header.decode()) if header else None
    except ValueError:
        return None
