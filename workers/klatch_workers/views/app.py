# pyright: basic, reportMissingTypeStubs=false
# Faust's streams, events and tables are `Any` inside: this module and `tables` are where that ends.
"""The Faust app: one windowed table for each topic that views read.

Faust 0.15.3 delivers records and restores tables; what may be counted and committed is decided here, because Faust
loses records and commits past them (docs/decisions/0022). A record is counted if it is the next of its partition; one
that comes again is dropped; one before which another is missing stops the process, which begins again where it
committed. Once a second what was counted is written, and committed when it is durable. Unreadable records are
skipped with a log line: the stage that owns the topic dead-letters them.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import faust
import structlog
from mode.utils.queues import FlowControlEvent

from klatch_schemas import codec
from klatch_schemas.events import Event
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, TRUST_VERDICTS, Namespace, Topic
from klatch_workers.views.aggregate import COUNTED, Group, Tally, measure
from klatch_workers.views.calm import CalmTransport
from klatch_workers.views.offsets import Offsets
from klatch_workers.views.progress import Progress
from klatch_workers.views.shapes import Shape
from klatch_workers.views.tables import KEPT_S, MINUTE_S, DurableTable

log = structlog.get_logger(__name__)

SOURCES: Mapping[str, Topic] = {"usage": CHAT_REQUESTS, "refusals": CHAT_ADMITTED, "verdicts": TRUST_VERDICTS}
"""The input of each table: one, as a table's changelog has the partitions of its input."""

WRITE_S = 1.0
"""How often what was counted is written and committed: what a killed process counts again."""

_UNCOUNTED = {
    event.KIND.encode() for topic in SOURCES.values() for event in topic.holds if not issubclass(event, COUNTED)
}


class RecordLost(RuntimeError):
    """A record of the log did not arrive; whoever begins again at the committed offset will get it."""


class _Flow(FlowControlEvent):
    """Faust's streams resume after every recovery, flowing or not, and to resume drops what they hold."""

    def resume(self) -> None:
        if not self.is_active():
            super().resume()


class Views:
    """The tables, and what this process has counted since it started."""

    def __init__(self, kafka: str, namespace: Namespace, shapes: Mapping[str, Shape], data: Path) -> None:
        """`shapes` has one of each source, by the name of its table. Makes the folder `data`."""
        self.totals = dict[Group, Tally]()
        self.skipped = 0
        data.mkdir(parents=True, exist_ok=True)
        self.app = faust.App(
            namespace.group("views"),
            broker=[f"kafka://{server.strip()}" for server in kafka.split(",")],
            datadir=data,
            store="memory://",
            Table=DurableTable,
            key_serializer="raw",
            value_serializer="raw",
            topic_replication_factor=max(shape.replicas for shape in shapes.values()),
            topic_disable_leader=True,
            web_enabled=False,
            autodiscover=False,
            broker_session_timeout=10.0,
            broker_heartbeat_interval=3.0,
            # Nothing is ever acknowledged to it, so it would wait for that for ever.
            stream_wait_empty=False,
            producer_linger=0.05,
        )
        self.app.transport = CalmTransport(self.app.conf.broker_consumer, self.app)
        self.app.flow_control = _Flow()
        self._namespace = namespace
        self._partitions = sum(shape.partitions for shape in shapes.values())
        self._tables = dict[str, DurableTable]()
        for name, shape in shapes.items():
            self._keep(name, shape.partitions)
        self._offsets = Offsets(kafka, namespace.group("views"))
        self._progress = dict[tuple[str, int], Progress]()
        self._assignment = 0
        self._committed: asyncio.Task[Mapping[tuple[str, int], int]] | None = None
        self._settling = asyncio.Lock()
        self.app.on_partitions_assigned.connect(self._assigned)
        self.app.timer(WRITE_S)(self._write)
        self.app.timer(float(MINUTE_S))(self._forget)

    @property
    def recovering(self) -> bool:
        """Whether the tables are being restored or handed over, and do not hold all of their partitions."""
        return not self.app.rebalancing_count or self.app.rebalancing or self.app.in_recovery

    @property
    def complete(self) -> bool:
        """Whether this process counts all partitions, and shares none with others of its group."""
        inputs = {self._namespace.of(topic) for topic in SOURCES.values()}
        return sum(tp.topic in inputs for tp in self.app.consumer.assignment()) == self._partitions

    def since(self, start_s: float) -> Iterator[tuple[Group, Tally]]:
        """What was counted in the minutes that began at `start_s` or later."""
        for table in self._tables.values():
            yield from table.since(start_s)

    async def stop(self) -> None:
        """Commit what was counted and end. Without a broker this waits for one for ever."""
        if not self.app.crash_reason:
            await self._write()
        await self.app.stop()
        await self._offsets.close()

    def _keep(self, name: str, partitions: int) -> None:
        table = cast("DurableTable", self.app.Table(name, partitions=partitions, default=bytes, value_type=bytes))
        table.tumbling(float(MINUTE_S), expires=float(KEPT_S))
        self._tables[name] = table
        topic = self._namespace.of(SOURCES[name])
        source = self.app.topic(topic, key_type=bytes, value_type=bytes, partitions=partitions, allow_empty=True)
        self.app.agent(source, name=f"views.{name}", concurrency=1)(partial(self._read, table))

    def _assigned(self, *_: Any, **__: Any) -> None:
        # Partitions are read again from where they were committed, those that stayed too.
        self._progress.clear()
        self._committed = None
        for table in self._tables.values():
            table.drop_unwritten()
        self._assignment = self.app.rebalancing_count

    def _holds(self, assignment: int) -> bool:
        # Faust counts a rebalance when it begins, before anything is taken away.
        return assignment == self._assignment == self.app.rebalancing_count

    async def _read(self, table: DurableTable, stream: Any) -> None:
        # Faust skips an event whose handler raises: what is wrong here must stop the process.
        try:
            async for event in stream.noack().events():
                if progress := await self._next(event.message):
                    self._count(table, event.message)
                    progress.take(event.message.offset)
        except Exception as error:
            await self.app.crash(error)
            raise

    async def _next(self, message: Any) -> Progress | None:
        """The progress of a record's partition, if the record is its next. Raises RecordLost."""
        assignment, (topic, partition), offset = self._assignment, message.tp, message.offset
        if not self._holds(assignment):
            return None
        progress = self._progress.get(message.tp) or await self._begin(assignment, message.tp)
        place = progress.place(offset)
        lost = place == "early" and await self._offsets.holds(topic, partition, progress.next, offset)
        if place == "repeated" or not self._holds(assignment):
            return None
        if lost:
            raise RecordLost(f"{topic}/{partition}: {offset} came where {progress.next} is next")
        return progress

    async def _begin(self, assignment: int, tp: tuple[str, int]) -> Progress:
        # Asked once for all partitions: what this process has not begun to read, it cannot commit.
        if self._committed is None:
            self._committed = asyncio.create_task(self._offsets.committed())
        progress = Progress((await asyncio.shield(self._committed)).get(tp, 0))
        if self._holds(assignment):
            self._progress[tp] = progress
        return progress

    def _count(self, table: DurableTable, message: Any) -> None:
        said = None if message.timestamp < time.time() - KEPT_S else self._decode(message)
        measured = measure(said) if said else None
        if measured is not None:
            group, tally = measured
            table.count(message.partition, group, message.timestamp, message.offset, tally)

    async def _write(self) -> None:
        try:
            async with self._settling:
                await self._settle()
        except Exception as error:  # noqa: BLE001 - the timer of a Faust app is a boundary: the process stops
            await self.app.crash(error)

    async def _settle(self) -> None:
        """Write what was counted, wait until it is durable, commit."""
        assignment = self._assignment
        if not self._holds(assignment):
            return
        taken = {tp: progress.next for tp, progress in self._progress.items() if progress.next > progress.committed}
        changes = [change for table in self._tables.values() for change in table.write()]
        for group, tally, _ in changes:
            self.totals[group] = self.totals.get(group, Tally()).merge(tally)
        await asyncio.gather(*(durable for _, _, durable in changes))
        # Faust's own commits pass records that were not acknowledged, so it is told of none and commits nothing.
        if taken and self._holds(assignment) and await cast("Any", self.app.consumer)._commit(taken):  # noqa: SLF001
            for tp, offset in taken.items():
                if progress := self._progress.get(tp):
                    progress.committed = max(progress.committed, offset)

    def _decode(self, message: Any) -> Event | None:
        # What is not counted may be large: what admission admits holds a whole request.
        if dict(message.headers or ()).get(codec.KIND) in _UNCOUNTED:
            return None
        try:
            said = codec.decode(message.value)
        except codec.Unreadable as error:
            self.skipped += 1
            where = {"topic": message.topic, "partition": message.partition, "offset": message.offset}
            log.warning("views.skipped", **where, reason=str(error))
            return None
        return said if isinstance(said, Event) else None

    async def _forget(self) -> None:
        for table in self._tables.values():
            table.forget(time.time() - KEPT_S)
