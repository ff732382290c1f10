"""A view of a ledger: a compacted topic of one partition, small enough to be held whole.

It is complete, as of the call, when `open` returns, and follows changes as they are written. Records that cannot be
read are counted and skipped. It never goes stale in silence: a reader that fails ends in `failed`, which somebody
has to await. With patience it outlasts a log that does not answer: it says so, and goes on where it was.
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
from klatch_streams.log import Log, LogError, OffsetGone, Tail, UnknownTopic

E = TypeVar("E", bound=Event)
logger: Final = structlog.stdlib.get_logger()
_WAIT_MS: Final = 5_000
_AGAIN_S: Final = 0.5


class Ledger(Generic[E]):
    """The events of a ledger by key. `async with await Ledger.open(...)` closes it."""

    def __init__(self, log: Log, partition: Partition, tail: Tail, of: type[E], patience_s: float) -> None:
        self.unreadable = 0
        """How many records were skipped."""
        self._log = log
        self._partition = partition
        self._tail = tail
        self._of = of
        self._patience_s = patience_s
        self._position = 0
        self._held: dict[str, E] = {}
        self._change = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, log: Log, topic: Topic, namespace: Namespace, of: type[E], *, patience_s: float = 0
    ) -> "Ledger[E]":
        """Read the ledger to its end and go on following it. Raises LogError.

        For `patience_s` it stays as it is while the log does not answer; then it has failed.
        """
        partition = Partition(namespace.of(topic), 0)
        first, end = await log.bounds(partition)
        ledger = cls(log, partition, await log.tail(), of, patience_s)
        ledger._position = first
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
        since: float | None = None
        while True:
            try:
                records = await self._tail.read(_WAIT_MS)
            except (OffsetGone, UnknownTopic):
                raise
            except LogError as error:
                now = asyncio.get_running_loop().time()
                since = since or now
                if now - since >= self._patience_s:
                    raise
                logger.warning("ledger.log_failed", topic=self._partition.topic, error=str(error))
                await self._reopen()
                continue
            since = None
            if records:
                self._apply_all(records)
                # Whoever waits now is woken; who comes later waits for the next one.
                self._change.set()
                self._change = asyncio.Event()

    async def _reopen(self) -> None:
        with suppress(LogError):
            await self._tail.close()
        await asyncio.sleep(_AGAIN_S)
        # A tail that cannot be opened leaves the closed one, whose next read fails again.
        with suppress(LogError):
            tail = await self._log.tail()
            tail.follow(self._partition, self._position)
            self._tail = tail

    def _apply_all(self, records: Collection[Record]) -> None:
        for record in records:
            self._position = record.offset + 1
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
