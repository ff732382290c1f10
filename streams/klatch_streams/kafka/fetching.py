"""Reads chosen partitions from chosen offsets: the one fetcher under `Tail` and `Membership`.

Following a partition is felt at once: while a poll waits at the broker, a poll that asks for the larger set goes out
on another connection, and whichever answers first counts. An answer counts only for the cursor and offset it was
asked for, so what was fetched before `unfollow` or a new `follow` never comes out. A cancelled `read` took nothing.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from klatch_schemas.records import Partition, Record
from klatch_streams.kafka import wire as wires
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka.unpacking import Corrupt, Unpacked
from klatch_streams.kafka.wire import Fetched, Wire
from klatch_streams.log import LogError, OffsetGone, UnknownTopic

# Connections to one node, opened when needed: so many partitions may be followed one by one within `fetch_wait_ms`
# on an idle node without waiting.
_LANES = 16
# After a fetch that brought something its reader gets the processor first: asking again at once would have its process
# and the broker at work for the next record while this one waits.
_BREATH_S = 0.002
# So many fetches in a row go without a longer rest: a request and the first tokens of its reply are not held up.
_BURST = 4
_BACKOFF_S = 0.1
_UNKNOWN_S = 1.0


class Silent(LogError):
    """No broker says anything about a partition that is being read."""


@dataclass(eq=False, slots=True)
class Cursor:
    """Where reading of one partition stands."""

    partition: Partition
    offset: int
    heard: float
    """When the broker last said something useful about it, by the reader's waiting clock."""
    paused: bool = False
    rest_until: float = 0.0
    ready: Unpacked | None = None
    error: LogError | None = None


@dataclass(eq=False, slots=True)
class Poll:
    """A fetch on its way."""

    node: int
    lane: int
    cursors: dict[Partition, Cursor]
    offsets: dict[Partition, int]
    task: asyncio.Task[list[Fetched]] | None = None

    def covers(self, cursor: Cursor) -> bool:
        """Whether its answer will count for `cursor`."""
        partition = cursor.partition
        return self.cursors.get(partition) is cursor and self.offsets[partition] == cursor.offset


@dataclass(eq=False, slots=True)
class Bell:
    """Wakes the reader, who may be waiting or about to."""

    _waiter: asyncio.Future[None] | None = None
    _rung: bool = False

    def ring(self) -> None:
        """There may be something to do."""
        self._rung = True
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Until it is rung (also before this call), or `seconds` have passed."""
        if not self._rung and seconds > 0:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(seconds, self.ring)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        else:
            await asyncio.sleep(0)
        self._rung = False


class Fetcher:
    """Fetches for one reader."""

    def __init__(self, wire: Wire, options: KafkaOptions, *, pause_ms: int | None = None) -> None:
        self._wire = wire
        self._options = options
        self._pause_s = (options.pause_ms if pause_ms is None else pause_ms) / 1000
        self._cursors = dict[Partition, Cursor]()
        self._polls = set[Poll]()
        self._asking = set[asyncio.Task[None]]()
        self._looking: asyncio.Task[None] | None = None
        self._rest_until = 0.0
        self._owed_until = 0.0
        self._waited = 0.0
        self._bell = Bell()
        self._loop = asyncio.get_running_loop()
        self.closed = False

    def follow(self, partition: Partition, offset: int, *, paused: bool = False) -> None:
        """Read `partition` from `offset` on (once it is resumed, if `paused`)."""
        self._cursors[partition] = Cursor(partition, offset, heard=self._waited, paused=paused)
        self._bell.ring()

    def unfollow(self, partition: Partition) -> None:
        """Read it no longer."""
        self._cursors.pop(partition, None)

    def position(self, partition: Partition) -> int | None:
        """The offset after what was given out, and after what no reader is given; None if it is not read."""
        cursor = self._cursors.get(partition)
        return cursor.offset if cursor else None

    def pause(self, partition: Partition) -> None:
        """Give out no more of it; what was fetched is kept."""
        if cursor := self._cursors.get(partition):
            cursor.paused = True

    def resume(self, partition: Partition) -> None:
        """Give out what comes next of it."""
        if cursor := self._cursors.get(partition):
            cursor.paused, cursor.heard = False, self._waited
            self._bell.ring()

    def clear(self) -> None:
        """Unfollow everything."""
        self._cursors.clear()

    def wake(self) -> None:
        """Let a `read` in progress look at its `until`."""
        self._bell.ring()

    async def read(self, wait_ms: int, until: Callable[[], bool] = lambda: False) -> Mapping[Partition, list[Record]]:
        """What has arrived; waits up to `wait_ms`, while not `until()`. Raises LogError."""
        await asyncio.sleep(0)
        deadline = self._loop.time() + wait_ms / 1000
        while not (self.closed or until()):
            # From here to the return nothing is awaited, so a cancelled read has taken nothing.
            if taken := self._take():
                return taken
            now = self._loop.time()
            rest = self._start_polls(now)
            if now >= deadline:
                self._check_silence()
                break
            await self._bell.wait(min(deadline - now, rest))
            self._waited += self._loop.time() - now
        return {}

    async def close(self) -> None:
        """Drop what is on its way; a `read` in progress ends."""
        self.closed = True
        self._cursors.clear()
        self._bell.ring()
        tasks: list[asyncio.Task[Any]] = [poll.task for poll in self._polls if poll.task]
        tasks += [*self._asking, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Taking.

    def _take(self) -> dict[Partition, list[Record]]:
        for cursor in self._cursors.values():
            if cursor.error and not cursor.paused:
                # Told once: whoever does not follow it anew does without, and still gets the others.
                del self._cursors[cursor.partition]
                raise cursor.error
        taken, room = dict[Partition, list[Record]](), self._options.read_limit
        for partition, cursor in list(self._cursors.items()):
            if not cursor.ready or cursor.paused:
                continue
            if records := self._unpack(cursor, cursor.ready, room):
                taken[partition] = records
                room -= len(records)
            if room == 0:
                # The others come first next time.
                self._cursors[partition] = self._cursors.pop(partition)
                break
        return taken

    def _unpack(self, cursor: Cursor, ready: Unpacked, room: int) -> list[Record]:
        try:
            records = ready.take(room)
        except Corrupt as error:
            cursor.ready, cursor.error = None, LogError(f"{_name(cursor.partition)} at {cursor.offset}: {error}")
            return []
        cursor.offset = ready.next_offset
        cursor.heard = self._waited
        if len(records) < room:
            cursor.ready = None
        return records

    # Polling.

    def _start_polls(self, now: float) -> float:
        """Ask for what nobody has asked for; returns after how many seconds there may be more to ask."""
        if now < self._rest_until:
            return self._rest_until - now
        by_node, lost, rest = dict[int, list[Cursor]](), list[Cursor](), inf
        for cursor in self._cursors.values():
            if cursor.ready or cursor.error or cursor.paused:
                continue
            if cursor.rest_until > now:
                rest = min(rest, cursor.rest_until - now)
            elif (node := self._wire.leader(cursor.partition)) is None:
                lost.append(cursor)
            else:
                by_node.setdefault(node, []).append(cursor)
        for node, cursors in by_node.items():
            polls = [poll for poll in self._polls if poll.node == node]
            if not all(any(poll.covers(cursor) for poll in polls) for cursor in cursors):
                self._poll(node, {poll.lane for poll in polls}, cursors)
        if lost:
            self._look(lost)
        return rest

    def _poll(self, node: int, busy: set[int], cursors: list[Cursor]) -> None:
        lane = next((lane for lane in range(_LANES) if lane not in busy), None)
        if lane is None:
            return
        by_partition = {cursor.partition: cursor for cursor in cursors}
        offsets = {cursor.partition: cursor.offset for cursor in cursors}
        answer = self._loop.create_task(self._wire.fetch(node, lane, offsets, self._options.fetch_wait_ms))
        poll = Poll(node, lane, by_partition, offsets, answer)
        self._polls.add(poll)
        answer.add_done_callback(lambda task: self._answered(poll, task))

    def _answered(self, poll: Poll, task: "asyncio.Task[list[Fetched]]") -> None:
        self._polls.discard(poll)
        if self.closed or task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._rest(task.result())
            for fetched in task.result():
                cursor = poll.cursors[fetched.partition]
                if self._cursors.get(fetched.partition) is cursor and poll.covers(cursor) and not cursor.ready:
                    self._heard(cursor, fetched)
        elif isinstance(error, ConnectionError):
            self._look(list(poll.cursors.values()))
        else:
            broken = LogError(f"what node {poll.node} answered makes no sense: {error!r}")
            broken.__cause__ = error
            for cursor in poll.cursors.values():
                cursor.error = broken
        self._bell.ring()

    def _rest(self, answer: list[Fetched]) -> None:
        """Take a breath; under load, let more arrive before the next poll.

        A fetch that brings something owes a pause; pauses are taken only for what is owed beyond `_BURST` of them.
        """
        if any(fetched.records for fetched in answer):
            now = self._loop.time()
            self._owed_until = max(now, self._owed_until) + self._pause_s
            self._rest_until = max(now + _BREATH_S, self._owed_until - _BURST * self._pause_s)

    def _heard(self, cursor: Cursor, fetched: Fetched) -> None:
        if fetched.error is None:
            if fetched.records:
                cursor.ready = fetched.records
            elif fetched.end <= cursor.offset:
                cursor.heard = self._waited
        elif wires.out_of_range(fetched.error):
            cursor.rest_until = inf
            asking = self._loop.create_task(self._explain(cursor))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
        elif wires.final(fetched.error):
            cursor.error = LogError(f"{_name(cursor.partition)} cannot be read: {fetched.error.__name__}")
        else:
            self._look([cursor])

    # When something is wrong.

    async def _explain(self, cursor: Cursor) -> None:
        """Find out why the broker does not hold the offset asked for."""
        try:
            first, end = await self._wire.bounds(cursor.partition)
        except LogError as error:
            cursor.error = error
        else:
            if not first <= cursor.offset <= end:
                cursor.error = OffsetGone(cursor.partition, cursor.offset, first, end)
        cursor.rest_until = self._loop.time() + _BACKOFF_S
        self._bell.ring()

    def _look(self, cursors: list[Cursor]) -> None:
        """Find out who leads these; they are asked for again in a moment."""
        for cursor in cursors:
            cursor.rest_until = self._loop.time() + _BACKOFF_S
        if self._looking is None:
            self._looking = self._loop.create_task(self._find_leaders(cursors))

    async def _find_leaders(self, cursors: list[Cursor]) -> None:
        try:
            if await self._wire.refresh({cursor.partition.topic for cursor in cursors}):
                for cursor in cursors:
                    topic, number = cursor.partition
                    missing = number >= (self._wire.count(topic) or 0)
                    if missing and self._waited - cursor.heard > _UNKNOWN_S:
                        cursor.error = UnknownTopic(
                            f"no {_name(cursor.partition)}; `klatch topics create` makes topics"
                        )
        finally:
            self._looking = None
            self._bell.ring()

    def _check_silence(self) -> None:
        """The watchdog: whoever reads on while a partition stays silent would wait for ever.

        `_waited` is a clock that runs only while somebody waits in `read`: back-pressure is not silence.
        """
        since = self._waited - self._options.patience_s
        silent = [
            cursor for cursor in self._cursors.values() if cursor.heard < since and not (cursor.ready or cursor.paused)
        ]
        if silent:
            names = ", ".join(f"{_name(cursor.partition)} at {cursor.offset}" for cursor in silent)
            raise Silent(f"no broker has answered for {self._options.patience_s:g} s about {names}")


def _name(partition: Partition) -> str:
    return f"{partition.topic}/{partition.number}"
