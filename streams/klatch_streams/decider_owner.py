"""Runs a pure decider on a partition: decide in offset order, write the effects, then be ready to snapshot.

A state counts only once the effects of the decisions that led to it are acknowledged, so a snapshot never runs
ahead of them; a crash anywhere repeats effects under the same causes, and never skips one. Whatever a decider
cannot use goes to `dead.letters` and the partition goes on; a log that cannot be written stops the owner for good.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import structlog

from klatch_schemas import codec
from klatch_schemas.errors import KlatchError, RequestTooLarge
from klatch_schemas.events import Event
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import Namespace
from klatch_streams.addresses import Addresses
from klatch_streams.dead_letters import DeadLetter, bury, dead_letter, describe
from klatch_streams.kernel import Decider, Emit, Input, drafts_of
from klatch_streams.log import Log, RecordTooLarge
from klatch_streams.snapshots import Parts, Snapshots

S = TypeVar("S")
GiveUp = Callable[[S, Input[S], str], tuple[S, Sequence[Emit]]]
"""What follows from an event that could not be decided, for the reason of that `code`: pure, like a decider."""
logger: Final = structlog.stdlib.get_logger()


@dataclass(frozen=True, slots=True)
class Held(Generic[S]):
    """The state of a key, and the last offset that went into it."""

    state: S
    applied: int


@dataclass(slots=True)
class _Batch(Generic[S]):
    """Decisions that wait for their effects to be acknowledged."""

    states: dict[str, Held[S]] = field(default_factory=dict[str, Held[S]])
    drafts: list[Draft] = field(default_factory=list[Draft])


class DeciderStage(Generic[S]):
    """Makes the owners of a decider's partitions."""

    def __init__(
        self, decider: Decider[S], log: Log, namespace: Namespace, give_up: GiveUp[S] = lambda state, _, __: (state, ())
    ) -> None:
        self.name = decider.name
        self.topic = namespace.of(decider.input)
        self._decider = decider
        self._log = log
        self._namespace = namespace
        self._give_up = give_up

    async def own(self, partition: Partition, committed: int) -> "DeciderOwner[S]":
        """Restore the states of `partition`. Raises LogError, StateLost."""
        addresses = Addresses(self._decider.input, await self._log.partitions(self.topic))
        states = Partition(self._namespace.of(self._decider.state), partition.number)
        snapshots = await Snapshots.open(self._log, states, committed)
        logger.info("decider.restored", stage=self.name, partition=partition.number, keys=len(snapshots.saved))
        decider, log, namespace = self._decider, self._log, self._namespace
        return DeciderOwner(decider, log, namespace, addresses, snapshots, committed, self._give_up)


class DeciderOwner(Generic[S]):
    """A decider's work on one partition."""

    def __init__(
        self,
        decider: Decider[S],
        log: Log,
        namespace: Namespace,
        addresses: Addresses,
        snapshots: Snapshots,
        committed: int,
        give_up: GiveUp[S],
    ) -> None:
        self._give_up = give_up
        self.states = {
            key: Held(decider.load(key, dict(saved.parts)), saved.applied) for key, saved in snapshots.saved.items()
        }
        self._decider = decider
        self._log = log
        self._namespace = namespace
        self._addresses = addresses
        self._snapshots = snapshots
        self._dirty = set[str]()
        self._next = committed
        self._committed = committed
        self._taking = asyncio.Lock()

    async def take(self, records: Sequence[Record]) -> None:
        """Decide on `records`; returns when all their effects are acknowledged. Raises AppendFailed."""
        async with self._taking:
            try:
                await self._settle(records)
            except RecordTooLarge:
                # Found before anything was sent: one record at a time, to know which.
                for record in records:
                    await self._settle_alone(record)

    async def checkpoint(self) -> int:
        """Write the states that changed; returns the next offset.

        It takes the call itself as the word that what the last one returned has been committed.
        """
        committed, self._committed = self._committed, self._next
        dirty, self._dirty = self._dirty, set[str]()
        for key, applied in (await self._snapshots.forget(committed)).items():
            if self.states[key].applied == applied:
                del self.states[key]
        # Keys that change while this writes are written as they are then, which is later than needed and no harm.
        await self._snapshots.write(self._dumped(dirty))
        return self._committed

    async def release(self, drain_s: float) -> None:
        """Wait for what is being taken."""
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s), self._taking:
                pass

    def _dumped(self, keys: set[str]) -> Iterator[tuple[str, int, Parts]]:
        for key in keys:
            held = self.states[key]
            yield key, held.applied, self._decider.dump(held.state)

    async def _settle(self, records: Sequence[Record]) -> None:
        batch = _Batch[S]()
        for record in records:
            try:
                self._decide(record, batch)
            except DeadLetter as why:
                batch.drafts.append(self._letter(record, why))
        if batch.drafts:
            await self._log.append(batch.drafts)
        self._accept(batch, records)

    async def _settle_alone(self, record: Record) -> None:
        try:
            await self._settle([record])
        except RecordTooLarge as error:
            batch = _Batch[S]()
            with suppress(DeadLetter):
                event, key = self._read(record)
                if self._addresses.belongs(record, key):
                    self._set_aside(record, event, key, batch, RequestTooLarge.code)
            if batch.drafts:
                await self._log.append(batch.drafts)
            await bury(self._log, [self._letter(record, DeadLetter("too-large", str(error)))])
            self._accept(batch, [record])

    def _accept(self, batch: _Batch[S], records: Sequence[Record]) -> None:
        self.states.update(batch.states)
        self._dirty.update(batch.states)
        if records:
            self._next = max(self._next, records[-1].offset + 1)

    def _read(self, record: Record) -> tuple[Event, str]:
        """The event, and the key that it belongs under. Raises DeadLetter."""
        try:
            event = codec.decode(record.value)
        except codec.Unreadable as error:
            raise DeadLetter("unreadable", str(error)) from error
        key = self._addresses.key_of(event)
        if isinstance(event, codec.Delta):
            raise DeadLetter("wrong-topic", "deltas decide nothing")
        return event, key

    def _decide(self, record: Record, batch: _Batch[S]) -> None:
        event, key = self._read(record)
        held = batch.states.get(key) or self.states.get(key)
        if not self._addresses.belongs(record, key):
            batch.drafts.append(self._addresses.move(record, key))
            return
        if held and record.offset <= held.applied:
            return
        try:
            before = held.state if held else self._decider.initial(key)
            after, effects = self._decider.decide(before, Input(event, record.timestamp_ms))
            drafts = drafts_of(effects, record, self._namespace)
        except Exception as error:  # a bug in the decider: this record is set aside, the partition goes on
            logger.exception(
                "decider.failed", stage=self._decider.name, partition=record.partition.number, offset=record.offset
            )
            self._set_aside(record, event, key, batch, KlatchError.code)
            raise DeadLetter("decider-failed", describe(error)) from error
        self._note(record, key, batch, drafts, before, after)

    def _set_aside(self, record: Record, event: Event, key: str, batch: _Batch[S], code: str) -> None:
        """Whoever waits for what is not decided is told."""
        held = batch.states.get(key) or self.states.get(key)
        try:
            before = held.state if held else self._decider.initial(key)
            after, effects = self._give_up(before, Input(event, record.timestamp_ms), code)
            drafts = drafts_of(effects, record, self._namespace)
        except Exception:  # the same bug, perhaps: then there is only the letter
            logger.exception("decider.could_not_tell", stage=self._decider.name, offset=record.offset)
            return
        self._note(record, key, batch, drafts, before, after)

    def _note(self, record: Record, key: str, batch: _Batch[S], drafts: Sequence[Draft], before: S, after: S) -> None:
        batch.drafts += drafts
        # What changed nothing needs no snapshot: deciding it again comes to the same.
        if after is not before:
            batch.states[key] = Held(after, record.offset)

    def _letter(self, record: Record, why: DeadLetter) -> Draft:
        return dead_letter(record, self._namespace, self._decider.name, why)
