# pyright: basic, reportMissingTypeStubs=false
# Faust's streams, events and tables are `Any` inside: this module and `tables` are where that ends.
"""The Faust app: one windowed table for each topic that views read.

Faust 0.15.3 is used within what was seen to hold: one event at a time per topic (`concurrency=1`), at-least-once, an
event acknowledged only when its change is durable, the last offset in every value. Unreadable records are skipped
with a log line: the stage that owns the topic dead-letters them.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import faust
import structlog

from klatch_schemas import codec
from klatch_schemas.events import ChatAdmitted, Event
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, TRUST_VERDICTS, Namespace, Topic
from klatch_workers.views.aggregate import Group, Tally, count, measure
from klatch_workers.views.calm import CalmTransport
from klatch_workers.views.shapes import Shape
from klatch_workers.views.tables import KEPT_S, MINUTE_S, DurableTable, decode_row, encode_row

log = structlog.get_logger(__name__)

SOURCES: Mapping[str, Topic] = {"usage": CHAT_REQUESTS, "refusals": CHAT_ADMITTED, "verdicts": TRUST_VERDICTS}
"""The input of each table: one, as a table's changelog has the partitions of its input."""


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
            broker_commit_interval=1.0,
            producer_linger=0.05,
        )
        self.app.transport = CalmTransport(self.app.conf.broker_consumer, self.app)
        self._namespace = namespace
        self._partitions = sum(shape.partitions for shape in shapes.values())
        self._tables = dict[str, DurableTable]()
        for name, shape in shapes.items():
            self._keep(name, shape.partitions)
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
            for ((_, tenant, model), (began_s, _)), value in table.data.items():
                if began_s >= start_s:
                    yield Group(tenant, model), decode_row(value).tally

    def _keep(self, name: str, partitions: int) -> None:
        table = cast("DurableTable", self.app.Table(name, partitions=partitions, default=bytes, value_type=bytes))
        windows = table.tumbling(float(MINUTE_S), expires=float(KEPT_S))
        self._tables[name] = table
        topic = self._namespace.of(SOURCES[name])
        source = self.app.topic(topic, key_type=bytes, value_type=bytes, partitions=partitions, allow_empty=True)
        self.app.agent(source, name=f"views.{name}", concurrency=1)(partial(self._read, windows))

    async def _read(self, windows: Any, stream: Any) -> None:
        # Faust acknowledges and skips an event whose handler raises: what is wrong here must stop the process.
        try:
            async for event in stream.noack().events():
                if not self._count(windows, event):
                    event.ack()
        except Exception as error:
            await self.app.crash(error)
            raise

    def _count(self, windows: Any, event: Any) -> bool:
        """Count an event, acknowledged once its change is durable; False if there was nothing to change."""
        message = event.message
        said = None if message.timestamp < time.time() - KEPT_S else self._decode(message)
        measured = measure(said) if said else None
        if measured is None:
            return False
        group, tally = measured
        # Partitions come and go one by one, so none may share a value with another.
        key = (message.partition, *group)
        value: bytes = windows[key].current(event)
        held = decode_row(value) if value else None
        row = count(held, message.offset, tally)
        if row is held:
            return False
        windows[key] = encode_row(row)
        windows.table.written.add_done_callback(partial(self._written, event))
        self.totals[group] = self.totals.get(group, Tally()).merge(tally)
        return True

    def _written(self, event: Any, change: "asyncio.Future[Any]") -> None:
        error = None if change.cancelled() else change.exception()
        if error:
            self._crashing = asyncio.ensure_future(self.app.crash(error))
        elif not change.cancelled():
            event.ack()

    def _decode(self, message: Any) -> Event | None:
        # Most of what admission says is not counted here, and holds a whole request each.
        if dict(message.headers or ()).get(codec.KIND) == ChatAdmitted.KIND.encode():
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
