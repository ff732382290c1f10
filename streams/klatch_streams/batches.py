"""Self-clocked batches: many small records become few appends, without a timer a record.

Records are collected per partition. A batch leaves when the one before it is acknowledged and the next beat has come
(the same for all partitions), or at once after a pause; an urgent record (a reply's first delta, an end) does not wait
for the beat. A record that others may follow soon (the opening of an attempt) can be held for a few milliseconds, to
leave with them. The cost of a token is wake-ups and requests, not bytes (`docs/performance.md`), so they are spent on
purpose: where many records leave at every beat, beats are longer.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from klatch_schemas.records import Draft, Partition
from klatch_streams.log import Log, RecordTooLarge

Place = tuple[Partition, int]

# A timer may fire a little early (uvloop's clock has milliseconds): waiting for less would be a loop without a rest.
_CLOSE_S = 0.000_5


class Beat:
    """When batches leave: every `quick_s`, or every `calm_s` while `many` records or more leave at every beat.

    Beats are the same for whoever asks: then one request carries what they have, and one fetch brings it.
    """

    def __init__(self, quick_s: float = 0.020, calm_s: float = 0.030, many: int = 32) -> None:
        self._quick_s, self._calm_s, self._many = quick_s, calm_s, many
        self.interval_s = quick_s
        self._left = 0
        """How many records have left in the interval that ends at `_until`."""
        self._until = float("-inf")

    def after(self, now: float) -> float:
        """The first beat after `now`."""
        return (now // self.interval_s + 1) * self.interval_s

    def leave(self, now: float, records: int) -> None:
        """So many records leave at `now`."""
        now += _CLOSE_S  # who leaves a little early leaves at the beat
        if now >= self._until:
            # The interval is over; if another has passed since without a record, nothing is busy any more.
            busy = self._left >= self._many and now < self._until + self.interval_s
            self.interval_s = self._calm_s if busy else self._quick_s
            self._until, self._left = self.after(now), 0
        self._left += records


class Batches:
    """Appends to the partitions of one topic, in the order of `write`, each draft naming its partition."""

    def __init__(self, log: Log, beat: Beat | None = None, most: int = 500, room_bytes: int = 4 * 1024 * 1024) -> None:
        """`room_bytes` may wait or be on their way for each partition before `room` makes writers wait."""
        self._log = log
        self._room_bytes = room_bytes
        self._beat = beat or Beat()
        self._most = most
        self._lanes: dict[int, _Lane] = {}

    def write(self, draft: Draft, *, urgent: bool = False, hold_s: float = 0.0) -> "Written":
        """Put a record in line; raises what made an earlier append to its partition fail.

        What is in line leaves `hold_s` later at the latest, and before only with an urgent record.
        """
        assert draft.partition is not None  # noqa: S101 - a caller's mistake, seen in the first test
        lane = self._lanes.get(draft.partition)
        if lane is None:
            lane = self._lanes[draft.partition] = _Lane(self._log, self._beat, self._most)
        return lane.write(draft, urgent, hold_s)

    async def room(self, partition: int) -> None:
        """Wait while too much is in line for a partition: a log that does not answer stops those who write to it.

        Raises what made an append to the partition fail.
        """
        if (lane := self._lanes.get(partition)) and lane.bytes > self._room_bytes:
            await lane.until(self._room_bytes)

    async def close(self) -> None:
        """Append what is in line, then stop."""
        await asyncio.gather(*(lane.drain() for lane in self._lanes.values()))


class Written(NamedTuple):
    """A record in line."""

    batch: "_Batch"
    number: int

    async def durable(self) -> int:
        """Its offset, once it is durable. Raises AppendFailed; RecordTooLarge concerns this record alone."""
        place = (await asyncio.shield(self.batch.done))[self.number]
        if isinstance(place, RecordTooLarge):
            raise place
        return place[1]


class _Batch:
    """Records that leave together."""

    __slots__ = ("done", "drafts", "leaves_at", "urgent")

    def __init__(self) -> None:
        self.drafts: list[Draft] = []
        self.urgent = False
        self.leaves_at: float | None = None
        """When a record that is held wants to leave."""
        self.done: asyncio.Future[Sequence[Place | RecordTooLarge]] = asyncio.get_running_loop().create_future()


class _Lane:
    """The records of one partition, and the task that appends them while there are any."""

    def __init__(self, log: Log, beat: Beat, most: int) -> None:
        self._log, self._beat, self._most = log, beat, most
        self._waiting: list[_Batch] = []
        self._hurry = asyncio.Event()
        self._closing = False
        self._left_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self.bytes = 0
        """Of values in line and on their way."""
        self._less = asyncio.Event()

    def write(self, draft: Draft, urgent: bool, hold_s: float) -> Written:
        if self._failure:
            raise self._failure
        if not self._waiting or len(self._waiting[-1].drafts) >= self._most:
            self._waiting.append(_Batch())
        batch = self._waiting[-1]
        batch.drafts.append(draft)
        self.bytes += len(draft.value or b"")
        if hold_s and batch.leaves_at is None:
            batch.leaves_at = asyncio.get_running_loop().time() + hold_s
            self._hurry.set()
        if urgent:
            batch.urgent = True
        if urgent or len(self._waiting) > 1:
            self._hurry.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="batches")
        return Written(batch, len(batch.drafts) - 1)

    async def until(self, most: int) -> None:
        while not self._failure and self.bytes > most:
            self._less.clear()
            await self._less.wait()
        if self._failure:
            raise self._failure

    async def drain(self) -> None:
        self._closing = True
        self._hurry.set()
        if self._task:
            await self._task

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._interval()
                await self._leave(self._waiting.pop(0))
        finally:
            self._task = None

    async def _interval(self) -> None:
        loop = asyncio.get_running_loop()
        until = self._departure(loop.time())
        while until - loop.time() > _CLOSE_S and not self._in_a_hurry():
            self._hurry.clear()
            timer = loop.call_at(until, self._hurry.set)
            await self._hurry.wait()
            timer.cancel()
            if (held := self._waiting[0].leaves_at) is not None:  # it may have come meanwhile
                until = min(until, held)
        self._left_at = loop.time()
        self._beat.leave(self._left_at, len(self._waiting[0].drafts))

    def _departure(self, now: float) -> float:
        if (held := self._waiting[0].leaves_at) is not None:
            return held
        if now < self._left_at + self._beat.interval_s:
            return self._beat.after(now)
        return now

    def _in_a_hurry(self) -> bool:
        return self._closing or self._waiting[0].urgent or len(self._waiting) > 1

    async def _leave(self, batch: _Batch) -> None:
        try:
            batch.done.set_result(await self._appended(batch.drafts))
        except Exception as error:  # noqa: BLE001 - whatever it is, every writer is told
            self._fail(batch, error)
        self.bytes -= sum(len(draft.value or b"") for draft in batch.drafts)
        self._less.set()

    async def _appended(self, drafts: Sequence[Draft]) -> Sequence[Place | RecordTooLarge]:
        try:
            return await self._log.append(drafts)
        except RecordTooLarge as error:
            # Found before anything was sent. It concerns one record: the others are somebody else's.
            if len(drafts) == 1:
                return [error]
        return [place for draft in drafts for place in await self._appended([draft])]

    def _fail(self, batch: _Batch, error: Exception) -> None:
        # Whoever wrote to this partition may no longer write: what stands in the log is unknown until read back.
        self._failure = error
        for failed in (batch, *self._waiting):
            failed.done.set_exception(error)
            failed.done.exception()
        self._waiting.clear()
