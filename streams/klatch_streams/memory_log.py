"""An in-process `Log` that behaves as Kafka does: for tests, the Driver, and replays that need no broker.

It is production code under the production port: partitions by Kafka's partitioner, offsets, compaction, retention,
consumer groups with eager rebalances. Nothing is durable, nothing waits on a clock, and what can go wrong goes
wrong when the test says so: `fail_next_append`, `fall_silent`, `expel`, `compact`, `mark`, `truncate_before`, or a
cancelled task.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from klatch_schemas.records import Draft, Partition, Record, partition_of
from klatch_streams.log import AppendFailed, Listener, LogError, OffsetGone, RecordTooLarge, UnknownTopic
from klatch_streams.memory_group import MemoryGroup, MemoryMembership

_READ_LIMIT = 500


@dataclass(slots=True)
class Held:
    """What one partition holds: records in offset order, with gaps where compaction took some."""

    records: list[Record] = field(default_factory=list[Record])
    first: int = 0
    end: int = 0

    def at(self, offset: int) -> int:
        """The index of the first record at or after `offset`."""
        return bisect_left(self.records, offset, key=lambda record: record.offset)


class Signal:
    """Wakes readers when something may have changed for them."""

    def __init__(self) -> None:
        self._waiting = set[asyncio.Event]()

    def fire(self) -> None:
        """Wake everybody who waits."""
        for event in self._waiting:
            event.set()

    async def wait(self, ready: Callable[[], bool], wait_ms: int) -> None:
        """Return when `ready`, or after `wait_ms`; gives way to other tasks at least once."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            await asyncio.sleep(0)
            async with asyncio.timeout(wait_ms / 1000):
                while not ready():
                    event.clear()
                    await event.wait()
        except TimeoutError:
            return
        finally:
            self._waiting.discard(event)


class MemoryLog:
    """A `Log` of `topics` (full name to partition count)."""

    def __init__(
        self,
        topics: Mapping[str, int],
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        max_record_bytes: int = 1_000_000,
        appending: Callable[[Sequence[Draft]], Awaitable[None]] | None = None,
    ) -> None:
        """`appending` is awaited before each append, as if the call came later: a test may hold it there.

        The default of `max_record_bytes` is a tenth of a cluster's (`klatch_schemas.topics.MAX_RECORD_BYTES`), so that
        what is too large for a log stays small enough for a test.
        """
        self._held = {Partition(topic, number): Held() for topic, size in topics.items() for number in range(size)}
        self._topics = dict(topics)
        self._now_ms = now_ms
        self._max_record_bytes = max_record_bytes
        self._appending = appending
        self._order = asyncio.Lock()
        self._failures = list[tuple[str | None, bool]]()
        self._keyless = count()
        self._groups = dict[str, MemoryGroup]()
        self._tails = list[MemoryTail]()
        self._closed = False
        self._silence: asyncio.Future[None] | None = None
        self._asked = asyncio.Event()
        self.changed = Signal()

    # The port.

    async def append(self, drafts: Sequence[Draft]) -> Sequence[tuple[Partition, int]]:
        """See `Log.append`. A task killed on the way may have written the records of some partitions."""
        if self.silent:
            try:
                await self.answering()
            except LogError as error:
                raise AppendFailed(str(error)) from error
        groups = dict[Partition, list[int]]()
        for index, draft in enumerate(drafts):
            groups.setdefault(self._place(draft), []).append(index)
        if self._appending:
            await self._appending(drafts)
        stands = self._failure_of(drafts)
        where: list[tuple[Partition, int] | None] = [None] * len(drafts)
        async with self._order:
            for partition, indexes in groups.items():
                await asyncio.sleep(0)
                if stands is not False:
                    for index in indexes:
                        where[index] = self._write(partition, drafts[index])
                    self.changed.fire()
            await asyncio.sleep(0)
        if stands is not None:
            raise AppendFailed(f"the test said so; the records {'stand' if stands else 'do not stand'} in the log")
        return [place for place in where if place]

    async def partitions(self, topic: str) -> int:
        """See `Log.partitions`."""
        await asyncio.sleep(0)
        return self._count(topic)

    async def bounds(self, partition: Partition) -> tuple[int, int]:
        """See `Log.bounds`."""
        await self.answering()
        held = self.held(partition)
        return held.first, held.end

    async def offset_at(self, partition: Partition, timestamp_ms: int) -> int:
        """See `Log.offset_at`."""
        await self.answering()
        held = self.held(partition)
        return next((record.offset for record in held.records if record.timestamp_ms >= timestamp_ms), held.end)

    async def tail(self) -> "MemoryTail":
        """See `Log.tail`."""
        await self.answering()
        self._check_open()
        self._tails.append(tail := MemoryTail(self))
        return tail

    async def join(self, group: str, topic: str, listener: Listener) -> MemoryMembership:
        """See `Log.join`."""
        await self.answering()
        self._check_open()
        self._count(topic)
        if group not in self._groups:
            self._groups[group] = MemoryGroup(self)
        return self._groups[group].join(topic, listener)

    async def close(self) -> None:
        """See `Log.close`. Members leave their groups, tails end."""
        self._closed = True
        for tail in self._tails:
            await tail.close()
        for group in self._groups.values():
            await group.close()

    # What tests and the Driver may do besides.

    def records(self, topic: str) -> list[Record]:
        """Everything that `topic` holds, partition by partition."""
        parts = [Partition(topic, number) for number in range(self._count(topic))]
        return [record for part in parts for record in self._held[part].records]

    def members(self, group: str) -> Sequence[MemoryMembership]:
        """The members of `group`, in the order they joined."""
        return tuple(self._groups[group].members) if group in self._groups else ()

    def expel(self, member: MemoryMembership) -> None:
        """What the session timeout does to a member that is dead or hangs: the group goes on without it.

        To kill a stage, cancel its task first, so that nobody tells it `revoked`, and expel its member then.
        """
        member.expel()

    def fail_next_append(self, *, stands: bool = False, topic: str | None = None) -> None:
        """The next append (to `topic`) raises AppendFailed, and its records stand in the log or do not."""
        self._failures.append((topic, stands))

    def fall_silent(self) -> None:
        """What a cluster without leaders does: nobody is answered, until `answer`, and nothing that is asked happens.

        Members stay in their groups; `lose_patience` is what the wait ends in for those who ask.
        """
        self._silence = asyncio.get_running_loop().create_future()
        self._asked.clear()
        self.changed.fire()

    async def asked(self) -> None:
        """Return once somebody waits for an answer, who had not asked before the last `lose_patience`."""
        await self._asked.wait()

    def lose_patience(self) -> None:
        """Those who wait for an answer get a LogError instead; whoever asks from now on waits again."""
        silence, self._silence = self._silence, asyncio.get_running_loop().create_future()
        self._asked.clear()
        if silence:
            silence.set_exception(LogError("no broker answered in time"))
            silence.exception()  # also when nobody waits

    def answer(self) -> None:
        """Everybody is answered again."""
        silence, self._silence = self._silence, None
        if silence:
            silence.set_result(None)

    @property
    def silent(self) -> bool:
        """Whether nobody is answered."""
        return self._silence is not None

    async def answering(self) -> None:
        """Wait while the log is silent; gives way to other tasks at least once. Raises LogError."""
        await asyncio.sleep(0)
        while self._silence:
            self._asked.set()
            await asyncio.shield(self._silence)

    def mark(self, partition: Partition) -> None:
        """What the end of a transaction does: its marker takes an offset, and no reader is given it."""
        self.held(partition).end += 1
        self.changed.fire()

    def compact(self, topic: str, *, drop_tombstones: bool = False) -> None:
        """Keep only the last record of every key; offsets stay. Tombstones go when their time is said to be over."""
        for number in range(self._count(topic)):
            held = self._held[Partition(topic, number)]
            last = {record.key: record.offset for record in held.records}
            held.records = [
                record
                for record in held.records
                if last[record.key] == record.offset and not (drop_tombstones and record.value is None)
            ]

    def truncate_before(self, partition: Partition, offset: int) -> None:
        """What retention does: the log starts at `offset` from now on."""
        held = self.held(partition)
        held.first = max(held.first, min(offset, held.end))
        held.records = held.records[held.at(held.first) :]
        self.changed.fire()

    # For the readers of this log.

    def held(self, partition: Partition) -> Held:
        """What `partition` holds. Raises UnknownTopic."""
        if partition not in self._held:
            raise _unknown(*partition)
        return self._held[partition]

    def records_of(self, topic: str) -> list[Partition]:
        """The partitions of `topic`."""
        return [Partition(topic, number) for number in range(self._count(topic))]

    def ahead(self, positions: Mapping[Partition, int]) -> Iterable[Partition]:
        """The partitions among `positions` that hold something past them, or not what is asked for."""
        for partition, offset in positions.items():
            held = self._held.get(partition)
            if held is None or offset > held.end or offset < held.first or held.at(offset) < len(held.records):
                yield partition

    def take(self, positions: dict[Partition, int]) -> dict[Partition, list[Record]]:
        """Up to 500 records after `positions`, which move on.

        Raises OffsetGone and UnknownTopic, and forgets that position: whoever does not ask anew does without.
        """
        taken, room = dict[Partition, list[Record]](), _READ_LIMIT
        for partition in tuple(positions):
            self._check_position(positions, partition)
        for partition, offset in tuple(positions.items()):
            held = self.held(partition)
            at = held.at(offset)
            if records := held.records[at : at + room]:
                taken[partition] = records
                positions[partition] = records[-1].offset + 1
                room -= len(records)
            if at + len(records) == len(held.records):
                # What compaction took, and markers, are nothing to wait for.
                positions[partition] = held.end
        return taken

    def _check_position(self, positions: dict[Partition, int], partition: Partition) -> None:
        offset = positions[partition]
        held = self._held.get(partition)
        if held is None or not held.first <= offset <= held.end:
            del positions[partition]
            raise _unknown(*partition) if held is None else OffsetGone(partition, offset, held.first, held.end)

    # Writing.

    def _place(self, draft: Draft) -> Partition:
        number, size = draft.partition, self._count(draft.topic)
        if number is None:
            number = next(self._keyless) % size if draft.key is None else partition_of(draft.key, size)
        if not 0 <= number < size:
            raise _unknown(draft.topic, number)
        taken = len(draft.key or b"") + len(draft.value or b"") + sum(len(k) + len(v or b"") for k, v in draft.headers)
        if taken > self._max_record_bytes:
            raise RecordTooLarge(draft.topic, taken, self._max_record_bytes)
        return Partition(draft.topic, number)

    def _failure_of(self, drafts: Sequence[Draft]) -> bool | None:
        self._check_open()
        topics = {draft.topic for draft in drafts}
        for failure in self._failures:
            if failure[0] is None or failure[0] in topics:
                self._failures.remove(failure)
                return failure[1]
        return None

    def _write(self, partition: Partition, draft: Draft) -> tuple[Partition, int]:
        held = self._held[partition]
        offset, held.end = held.end, held.end + 1
        held.records.append(
            Record(partition, offset, self._now_ms(), draft.key, draft.value, tuple(draft.headers)),
        )
        return partition, offset

    def _count(self, topic: str) -> int:
        if topic not in self._topics:
            raise _unknown(topic)
        return self._topics[topic]

    def _check_open(self) -> None:
        if self._closed:
            raise LogError("this log was closed")


class MemoryTail:
    """A `Tail` of a `MemoryLog`."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._positions = dict[Partition, int]()
        self._closed = False

    def follow(self, partition: Partition, offset: int) -> None:
        """See `Tail.follow`."""
        self._positions[partition] = offset
        self._log.changed.fire()

    def unfollow(self, partition: Partition) -> None:
        """See `Tail.unfollow`."""
        self._positions.pop(partition, None)

    def position(self, partition: Partition) -> int | None:
        """See `Tail.position`."""
        return self._positions.get(partition)

    async def read(self, wait_ms: int) -> Sequence[Record]:
        """See `Tail.read`. A read that is cancelled has taken nothing."""
        if self._closed:
            raise LogError("this tail was closed")
        await self._log.changed.wait(self._ready, wait_ms)
        if self._log.silent:
            await self._log.answering()
        taken = self._log.take(self._positions) if not self._closed else {}
        return [record for records in taken.values() for record in records]

    async def close(self) -> None:
        """See `Tail.close`."""
        self._closed = True
        self._log.changed.fire()
        await asyncio.sleep(0)

    def _ready(self) -> bool:
        return self._closed or self._log.silent or any(True for _ in self._log.ahead(self._positions))


def _unknown(topic: str, number: int | None = None) -> UnknownTopic:
    what = f"no topic {topic}" if number is None else f"topic {topic} has no partition {number}"
    return UnknownTopic(f"{what}; `klatch topics create` makes it")
