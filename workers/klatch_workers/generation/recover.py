"""What the log knows of a request that comes again long after the table has forgotten it: a redriven one.

An admission that was redriven may have been answered already, at any time since it was first seen, by this owner or
by any before it. So everything that was said of it since is read from the log: its stream up to where the table
stands, its verdict, its turn and its settlement. That is a scan of what four partitions got since, and it is rare.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Said
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import ChatAdmitted, TrustVerdict, TurnFinished, UsageSettled
from klatch_schemas.ids import RequestId, Tenant
from klatch_schemas.records import Cause, Partition, Record, partition_of
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS, HOUR_MS, TRUST_VERDICTS, Namespace
from klatch_streams import dead_headers as dead
from klatch_streams.catch_up import catch_up
from klatch_streams.log import Log, OffsetGone
from klatch_workers.generation.conclude import has_turn
from klatch_workers.generation.table import Table, Tracked

_MARGIN_MS: Final = HOUR_MS
"""Clocks differ, and a cancel or a verdict may come before the admission."""


def was_redriven(record: Record) -> bool:
    """Whether an admission, or the request it follows from, was redriven."""
    return dead.times_redriven(record) > 0


def cause_of(record: Record) -> Cause:
    """What the effects of an admission are named after: its record; of a redriven one the first, so ids stay."""
    own = Cause(record.partition, record.offset, 0)
    try:
        first = Cause.parse(f"{dead.origin_of(record)}/0")
    except ValueError:
        return own
    # One that was redriven as a request has no earlier admission.
    return first if first.partition == record.partition else own


@dataclass(slots=True)
class Past:
    """What has happened to a request before."""

    assembly: Assembly
    settled: bool = False
    turned: bool = False

    @property
    def concluded(self) -> bool:
        """Whether nothing is left to do; a stream that retention has taken is known by what followed from it."""
        if not self.assembly.state.settled:
            return self.settled or self.turned
        return self.settled and (self.turned or not has_turn(self.assembly))


class Archive:
    """Reads what one owner's partition has said of single requests."""

    def __init__(self, log: Log, namespace: Namespace, number: int, table: Table) -> None:
        self._log, self._namespace, self._number, self._table = log, namespace, number, table

    async def recover(self, admitted: ChatAdmitted, record: Record, tracked: Tracked) -> Past:
        """Complete what the table knows of a request; returns what it cannot know. Raises LogError."""
        tenant, request = admitted.request.tenant, admitted.request.request
        first = dead.number_in(record, dead.FIRST_SEEN) or record.timestamp_ms
        since_ms = max(0, min(first, record.timestamp_ms, admitted.requested_ms) - _MARGIN_MS)
        turns = Partition(self._namespace.of(CHAT_TURNS), self._number)
        past = Past(Assembly())
        async for said, _ in self._about(turns, request, since_ms):
            past.turned |= isinstance(said, TurnFinished) and said.tenant == tenant
        async for said, _ in self._about(await self._requests_of(tenant), request, since_ms):
            past.settled |= isinstance(said, UsageSettled) and said.tenant == tenant and said.request == request
        await self._verdict(tracked, since_ms)
        past.assembly = await self._stream(tracked, since_ms)
        return past

    async def _requests_of(self, tenant: Tenant) -> Partition:
        topic = self._namespace.of(CHAT_REQUESTS)
        return Partition(topic, partition_of(tenant.encode(), await self._log.partitions(topic)))

    async def _verdict(self, tracked: Tracked, since_ms: int) -> None:
        verdicts = Partition(self._namespace.of(TRUST_VERDICTS), self._number)
        async for said, record in self._about(verdicts, RequestId(tracked.request), since_ms):
            if isinstance(said, TrustVerdict) and said.stage == "input" and said.tenant == tracked.tenant:
                # The first counts: what the table has heard meanwhile is this one or a later one.
                self._table.judge(tracked, said, record)
                return

    async def _stream(self, tracked: Tracked, since_ms: int) -> Assembly:
        partition = Partition(self._namespace.of(CHAT_STREAM), self._number)
        while True:
            try:
                return await self._fold(tracked, partition, await self._log.offset_at(partition, since_ms))
            except OffsetGone:
                # Retention overtook the reading: from what is left, once more.
                continue

    async def _fold(self, tracked: Tracked, partition: Partition, position: int) -> Assembly:
        table, assembly = self._table, Assembly()
        tail = await self._log.tail()
        try:
            # The table reads on meanwhile.
            while position < (end := table.stream_position):
                async for records in catch_up(tail, partition, position, end):
                    for record in records:
                        if record.offset >= table.stream_position:
                            break
                        if (said := _said(record, tracked.request)) and _is_of(said, tracked):
                            assembly.hear(record.offset, said)
                position = tail.position(partition) or end
            # Nothing is awaited in between: what the table hears from here on is what comes next.
            table.replace(tracked, assembly)
            return assembly
        finally:
            await tail.close()

    async def _about(
        self, partition: Partition, request: RequestId, since_ms: int
    ) -> AsyncIterator[tuple[Said, Record]]:
        """Events since then that name the request, up to now."""
        position = await self._log.offset_at(partition, since_ms)
        _, end = await self._log.bounds(partition)
        tail = await self._log.tail()
        try:
            async for records in catch_up(tail, partition, position, end):
                for record in records:
                    if said := _said(record, request):
                        yield said, record
        finally:
            await tail.close()


def _said(record: Record, request: str) -> Said | None:
    # Most records are about others, and are not decoded. Ids are plain ASCII: no writer has a reason to escape them.
    if request.encode() not in (record.value or b""):
        return None
    try:
        said = codec.decode(record.value)
    except Unreadable:
        return None
    return said if getattr(said, "request", None) == request else None


def _is_of(said: Said, tracked: Tracked) -> bool:
    # A delta names no tenant; it counts only under the opening of the right one.
    return isinstance(said, Delta) or getattr(said, "tenant", None) == tracked.tenant
