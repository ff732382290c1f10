"""The stage: restores a partition, owns it, and gives every admitted request its way to the end.

Restoring reads the snapshot (where to read from, the last turn of every conversation) and then what the log says of
every stream and verdict that is not concluded; nothing is fed before that is complete. The order of a checkpoint is
the runner's: what is done stands in the log, then the snapshot, then the offset.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import uuid4

import msgspec
import structlog

from klatch_agents.gateway.port import Gateway
from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.events import ChatAdmitted, ChatRefused
from klatch_schemas.records import Cause, Partition, Record
from klatch_schemas.topics import (
    CHAT_ADMITTED,
    CHAT_STREAM,
    CHAT_TURNS,
    GENERATION_STATE,
    TRUST_VERDICTS,
    Namespace,
)
from klatch_streams.addresses import MOVED_FROM, Addresses
from klatch_streams.batches import Batches
from klatch_streams.dead_letters import DeadLetter, bury, dead_letter, describe
from klatch_streams.follower import Follower
from klatch_streams.generation import TRIES
from klatch_streams.keyed_owner import Doing, GivenBack, KeyedOwner
from klatch_streams.log import Log, LogError, RecordTooLarge
from klatch_streams.snapshots import Snapshots
from klatch_streams.stalls import Stalls
from klatch_workers.generation.conclude import PriceOf
from klatch_workers.generation.interruptions import Interruptions
from klatch_workers.generation.kept_heads import KeptHeads
from klatch_workers.generation.lines import Lines, Place
from klatch_workers.generation.means import Means
from klatch_workers.generation.prepare import Preparer
from klatch_workers.generation.recover import Archive, was_redriven
from klatch_workers.generation.request import RequestUnderWay
from klatch_workers.generation.table import Early, Table, source_of
from klatch_workers.generation.turns import Conversations, TurnReader

log: Final = structlog.stdlib.get_logger(__name__)

_POSITION: Final = "position"

Seen = dict[str, tuple[int, int]]
"""By source partition: offset and effect of the last admission that was taken."""


class GenerationStage:
    """Makes owners of partitions of `chat.admitted`; one a process."""

    name = "generation"

    def __init__(
        self,
        log: Log,
        namespace: Namespace,
        gateway: Gateway,
        preparer: Preparer,
        *,
        max_in_flight: int = 512,
        tries: int = TRIES,
        prices: PriceOf = lambda _model, _deployment: None,
    ) -> None:
        self.topic = namespace.of(CHAT_ADMITTED)
        self.log, self.namespace = log, namespace
        self.gateway, self.preparer = gateway, preparer
        self.max_in_flight, self.tries, self.prices = max_in_flight, tries, prices
        self.follower = Follower(log)
        self.batches = Batches(log)
        self.stalls = Stalls()
        self._watching: asyncio.Task[None] | None = None
        self._turns = TurnReader(log)

    async def own(self, partition: Partition, committed: int) -> "GenerationOwner":
        """Restore a partition. Raises LogError, StateLost."""
        if self._watching is None:
            self._watching = asyncio.create_task(self.stalls.run(), name="stalls")
        number = partition.number
        snapshots = await Snapshots.open(self.log, self._beside(GENERATION_STATE, number), committed)
        position = _Position.load(snapshots)
        turns = self._beside(CHAT_TURNS, number)
        conversations = Conversations(turns, self._turns)
        heads = KeptHeads(self.log, turns, conversations, snapshots)
        stream, verdicts = self._beside(CHAT_STREAM, number), self._beside(TRUST_VERDICTS, number)
        done = {partition: max(committed, position.applied)}
        table = Table(position.stream_floor, position.verdict_floor, position.early, done)
        means = Means(
            log=self.log,
            namespace=self.namespace,
            partition=number,
            table=table,
            conversations=conversations,
            batches=self.batches,
            gateway=self.gateway,
            preparer=self.preparer,
            tries=self.tries,
            prices=self.prices,
            stalls=self.stalls,
            # Not the process's: what it wrote when it owned the partition before may still be on its way.
            owner=uuid4().hex[:12],
        )
        try:
            await self.follower.follow(stream, position.stream_floor, table.hear_stream, table.stream_moved)
            await self.follower.follow(verdicts, position.verdict_floor, table.hear_verdict, table.verdicts_moved)
            # In this order: whatever was opened before `opened` was admitted before `admitted`.
            opened = table.stream_position
            _, admitted = await self.log.bounds(partition)
            addresses = Addresses(CHAT_ADMITTED, await self.log.partitions(self.topic))
        except BaseException:
            self.give_up(number)
            raise
        return GenerationOwner(self, means, snapshots, heads, position, _Ends(committed, admitted, opened), addresses)

    def give_up(self, number: int) -> None:
        """Follow a partition's topics no longer."""
        self.follower.unfollow(self._beside(CHAT_STREAM, number))
        self.follower.unfollow(self._beside(TRUST_VERDICTS, number))

    async def close(self) -> None:
        """Flush and give back connections."""
        if self._watching:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self.batches.close()
        await self.follower.close()
        await self._turns.close()

    def _beside(self, topic: Any, number: int) -> Partition:
        return Partition(self.namespace.of(topic), number)


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a successor goes on, beside the committed offset."""

    stream_floor: int
    verdict_floor: int
    seen: Seen
    early: Sequence[Early] = ()
    applied: int = 0
    """All before this offset of chat.admitted is done: the floors know nothing of it any more."""

    @classmethod
    def load(cls, snapshots: Snapshots) -> "_Position":
        saved = snapshots.saved.get(_POSITION)
        at: Any = saved.parts["at"] if saved else {"stream": 0, "verdicts": 0, "seen": {}}
        seen = {source: (int(offset), int(effect)) for source, (offset, effect) in at["seen"].items()}
        early = [Early(*cancel) for cancel in at.get("early", ())]
        return cls(at["stream"], at["verdicts"], seen, early, saved.applied if saved else 0)

    def parts(self) -> dict[str, object]:
        seen = {source: list(last) for source, last in self.seen.items()}
        early = [list(cancel) for cancel in self.early]
        return {"at": {"stream": self.stream_floor, "verdicts": self.verdict_floor, "seen": seen, "early": early}}


class _Ends(NamedTuple):
    """Up to where the log was read when the partition was restored."""

    committed: int
    """On chat.admitted, by earlier owners."""
    admitted: int
    opened: int
    """On chat.stream."""


class _Named(msgspec.Struct):
    conversation: str


class _Admitted(msgspec.Struct):
    request: _Named


_read_admitted: Final = msgspec.json.Decoder(_Admitted).decode


def _named(record: Record) -> _Named | None:
    value = record.value or b""
    try:
        try:
            return _read_admitted(value).request
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return msgspec.convert(codec.loads(value), _Admitted).request
    except (msgspec.ValidationError, Unreadable):
        return None


def _line_of(record: Record) -> Hashable:
    """Admissions that stand where they belong wait in `Lines`, where they can be ended; all others by their key."""
    named = _named(record)
    stands_where_it_belongs = named is not None and named.conversation.encode("utf-8", "replace") == record.key
    return record.offset if stands_where_it_belongs else record.key


async def _fault_of(doing: Callable[[], Awaitable[None]]) -> DeadLetter | None:
    """What of ours kept a request from what it needs. Raises LogError and GivenBack: these are none of its own."""
    try:
        await doing()
    except RecordTooLarge as error:
        # It would be too large for the next owner too.
        return DeadLetter("too-large", str(error))
    except (LogError, GivenBack):
        raise
    except Exception as error:  # noqa: BLE001 - the boundary of a record
        return DeadLetter("failed", describe(error))
    return None


class GenerationOwner:
    """One partition of `chat.admitted`."""

    def __init__(
        self,
        stage: GenerationStage,
        means: Means,
        snapshots: Snapshots,
        heads: KeptHeads,
        restored: _Position,
        ends: _Ends,
        addresses: Addresses,
    ) -> None:
        self._stage, self._means, self._snapshots, self._addresses = stage, means, snapshots, addresses
        self._archive = Archive(stage.log, stage.namespace, means.partition, means.table)
        self._heads, self._ends = heads, ends
        self._caught_up = False
        self._written, self._committed = restored, ends.committed
        self._seen, self._durably_seen = dict(restored.seen), dict(restored.seen)
        self._done_before = restored.applied
        self._repeated: set[int] = set()
        self._causes: deque[tuple[int, str, tuple[int, int]]] = deque()
        doing = Doing(
            stage.name,
            self._handle,
            order_by=_line_of,
            before_commit=self._before_commit,
        )
        self._lines = Lines(stage.max_in_flight)
        self._doer = KeyedOwner(doing, stage.log, stage.namespace, ends.committed)

    async def take(self, records: Sequence[Record]) -> None:
        """Accept admitted requests; those that an admission repeated after a crash are dropped by their cause."""
        for record in records:
            if record.offset < self._done_before:
                self._repeated.add(record.offset)
            else:
                self._look_at_cause(record)
        await self._doer.take(records)

    async def checkpoint(self) -> int:
        """Write the snapshot that goes with the offset that is returned."""
        return await self._doer.checkpoint()

    async def release(self, drain_s: float) -> None:
        """Finish what has begun, then leave the rest to the next owner."""
        self._lines.close()
        await self._doer.release(drain_s)
        self._stage.give_up(self._means.partition)

    def _look_at_cause(self, record: Record) -> None:
        header = record.header(codec.CAUSE)
        # A record that was moved to where it belongs comes out of order; it is written only once. One that was
        # redriven comes again by intention: whether it was answered is asked of the log.
        if header is None or record.header(MOVED_FROM) or was_redriven(record):
            return
        try:
            cause = Cause.parse(header.decode())
        except ValueError:
            return
        source = source_of(cause)
        last = (cause.offset, cause.effect)
        if last <= self._seen.get(source, (-1, -1)):
            self._repeated.add(record.offset)
        else:
            self._seen[source] = last
            self._causes.append((record.offset, source, last))

    async def _handle(self, record: Record) -> None:
        if record.offset in self._repeated:
            self._repeated.discard(record.offset)
            return
        try:
            event = codec.decode(record.value)
        except Unreadable as error:
            raise DeadLetter("unreadable", str(error)) from error
        key = self._addresses.key_of(event)
        if not self._addresses.belongs(record, key):
            await self._stage.log.append([self._addresses.move(record, key)])
            return
        match event:
            case ChatAdmitted(request=request):
                tracked = self._means.table.take(request.tenant, request.request)
                # Met in the order of admission: nothing is awaited before.
                place = self._lines.join(tracked, request.conversation, record.offset)
                if not place.is_up and place.when_met(request.if_busy) == "wait":
                    waiting = Interruptions(tracked, request.deadline_ms, lambda: False)
                    # Thousands may wait. What they ask is read again when it is needed.
                    del event, request
                    await waiting.until(lambda: place.is_up, alone=True)
                    if self._lines.closed:
                        raise GivenBack
                    event = codec.decode_as(ChatAdmitted, record.value)
                await self._bring_to_its_end(event, record, place)
            case ChatRefused():
                self._means.table.forget(event.tenant, event.request)
            case _:
                raise DeadLetter("wrong-topic", "only admissions and refusals belong into chat.admitted")

    async def _bring_to_its_end(self, admitted: ChatAdmitted, record: Record, place: Place) -> None:
        request, tracked = admitted.request, place.tracked
        if was_redriven(record):
            # It may have been redriven more than once: what the one before it says has to stand.
            await place.turn()
            if (await self._archive.recover(admitted, record, tracked)).concluded:
                log.info("redriven.was_answered", request=request.request, offset=record.offset)
                self._means.table.conclude(tracked, record.offset, admitted.requested_ms)
                place.leave()
                return
            place.given_up = tracked.assembly.state.attempt
        under_way = RequestUnderWay.of(self._means, admitted, record, place)
        # A fault of ours in what this request needs must not stop the others of its partition, again and again.
        if why := await _fault_of(under_way.run):
            log.error("request.given_up", request=request.request, reason=why.reason, fault=why.error)
            # Its readers are told before it is buried; what prevents that as well is in the worker's log.
            if twice := await _fault_of(under_way.fail):
                log.error("request.end_lost", request=request.request, reason=twice.reason, fault=twice.error)
        self._means.table.conclude(tracked, record.offset, admitted.requested_ms)
        place.leave()
        if why:
            raise why

    async def _before_commit(self, low_water: int) -> None:
        table = self._means.table
        if not self._caught_up and low_water >= self._ends.admitted:
            # All that an earlier owner may have left open has been brought to its end: the rest was concluded.
            self._caught_up = True
            table.forget_concluded(self._ends.opened)
        while self._causes and self._causes[0][0] < low_water:
            _, source, last = self._causes.popleft()
            self._durably_seen[source] = last
        table.commit(low_water, self._durably_seen)
        # Both in one step: what is heard from here on is not below the floors, and among the next letters.
        floors, early, unreadable, table.unreadable = table.floors(), table.early(), table.unreadable, []
        await self._bury(unreadable)
        position = _Position(*floors, dict(self._durably_seen), early, low_water)
        # It takes the call itself as the word that what the last one was about has been committed.
        committed, self._committed = self._committed, low_water
        await self._heads.forget_aged(committed)
        # Heads first: a position that stands without them would have their requests passed over.
        if (heads := self._heads.changed()) or position != self._written:
            await self._snapshots.write([*heads, (_POSITION, low_water, position.parts())])
            self._written = position

    async def _bury(self, unreadable: Sequence[tuple[Record, str]]) -> None:
        if unreadable:
            letters = [
                dead_letter(record, self._stage.namespace, self._stage.name, DeadLetter("unreadable", why))
                for record, why in unreadable
            ]
            await bury(self._stage.log, letters)
