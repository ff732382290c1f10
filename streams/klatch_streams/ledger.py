"""A view of a ledger: a compacted topic of one partition, small enough to be held whole.

It is complete, as of the call, when `open` returns, and follows changes as they are written. Records that cannot be
read are counted and skipped. It never goes stale in silence: a reader that fails ends in `failed`, which somebody
has to await.
"""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import Final, Generic, TypeVar

import structlog

from klatch_schemas import codec
from klatch_schemas.events import Event
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import Namespace, Topic
from klatch_streams.catch_up import catch_up
from klatch_streams.log import Log, Tail

E = TypeVar("E", bound=Event)
logger: Final = structlog.stdlib.get_logger()
_WAIT_MS: Final = 5_000


class Ledger(Generic[E]):
    """The events of a ledger by key. `async with await Ledger.open(...)` closes it."""

    def __init__(self, tail: Tail, of: type[E]) -> None:
        self.unreadable = 0
        """How many records were skipped."""
        self._tail = tail
        self._of = of
        self._held: dict[str, E] = {}
        self._change = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, log: Log, topic: Topic, namespace: Namespace, of: type[E]) -> "Ledger[E]":
        """Read the ledger to its end and go on following it. Raises LogError."""
        partition = Partition(namespace.of(topic), 0)
        first, end = await log.bounds(partition)
        ledger = cls(await log.tail(), of)
        try:
            async for records in catch_up(ledger._tail, partition, first, end):
                ledger._apply_all(records)
        except BaseException:
            await ledger._tail.close()
            raise
        ledger._following = asyncio.create_task(ledger._follow(), name=f"ledger {partition.topic}")
        return ledger

    def get(self, key: str) -> E | None:
        """The event that stands under `key`."""
        return self._held.get(key)

    def values(self) -> Collection[E]:
        """Every event that stands."""
        return self._held.values()

    def __len__(self) -> int:
        return len(self._held)

    async def changed(self) -> None:
        """Wait for the next change after this call."""
        await self._change.wait()

    async def failed(self) -> None:
        """Raises what made the ledger stop following its topic; returns when it was closed."""
        if self._following:
            with suppress(asyncio.CancelledError):
                await asyncio.shield(self._following)
            if not self._following.done():
                raise asyncio.CancelledError

    async def close(self) -> None:
        """Follow no longer; what is held stays."""
        if self._following:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._tail.close()

    async def __aenter__(self) -> "Ledger[E]":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _follow(self) -> None:
        while True:
            if records := await self._tail.read(_WAIT_MS):
                self._apply_all(records)
                # Whoever waits now is woken; who comes later waits for the next one.
                self._change.set()
                self._change = asyncio.Event()

    def _apply_all(self, records: Collection[Record]) -> None:
        for record in records:
            try:
                self._apply(record)
            except codec.Unreadable as error:
                self.unreadable += 1
                logger.warning(
                    "ledger.unreadable",
                    topic=record.partition.topic,
                    offset=record.offset,
                    reason=str(error),
                )

    def _apply(self, record: Record) -> None:
        try:
            key = (record.key or b"").decode()
        except UnicodeDecodeError as error:
            raise codec.Unreadable("the key is not UTF-8") from error
        if record.value is None:
            self._held.pop(key, None)
        else:
            self._held[key] = codec.decode_as(self._of, record.value)


async def publish(log: Log, topic: Topic, key: str, event: Event | None, namespace: Namespace) -> int:
    """Put `event` under `key` into a ledger, or take away what stands there (None); returns its offset.

    Raises AppendFailed.
    """
    if event is None:
        draft = Draft(namespace.of(topic), key.encode(), None)
    else:
        draft = codec.draft(namespace.of(topic), key, event)
    [(_, offset)] = await log.append([draft])
    return offset
