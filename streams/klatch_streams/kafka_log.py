"""The `Log` on Apache Kafka 3.x and 4.x: acknowledged appends, group-less tails, and consumer group memberships.

Every tail and membership has connections of its own; appends share one producer. Offsets end where committed
transactions end. An append that failed may stand in the log, twice at worst without `idempotent`; see
docs/decisions/0002-producer-settings.md.
"""

from collections.abc import Sequence

from klatch_schemas.records import Draft, Partition
from klatch_streams.kafka.fetching import Fetcher
from klatch_streams.kafka.membership import KafkaMembership
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka.producing import Producer
from klatch_streams.kafka.reading import KafkaTail
from klatch_streams.kafka.wire import Unreachable, Wire
from klatch_streams.log import Listener

__all__ = ["KafkaLog", "KafkaOptions", "Unreachable"]


class KafkaLog:
    """A `Log` on one cluster."""

    def __init__(self, wire: Wire, options: KafkaOptions) -> None:
        self._wire = wire
        self._options = options
        self._producer = Producer(wire, options)
        self._readers = list[KafkaTail | KafkaMembership]()

    @classmethod
    async def open(cls, options: KafkaOptions) -> "KafkaLog":
        """Connect; tries for `startup_s` while the broker comes up. Raises Unreachable."""
        return cls(await Wire.open(options), options)

    async def append(self, drafts: Sequence[Draft]) -> Sequence[tuple[Partition, int]]:
        """See `Log.append`. Also raises RecordTooLarge, before anything is sent."""
        return await self._producer.append(drafts)

    async def partitions(self, topic: str) -> int:
        """See `Log.partitions`."""
        return await self._wire.partitions(topic)

    async def bounds(self, partition: Partition) -> tuple[int, int]:
        """See `Log.bounds`."""
        return await self._wire.bounds(partition)

    async def offset_at(self, partition: Partition, timestamp_ms: int) -> int:
        """See `Log.offset_at`."""
        return await self._wire.offset_at(partition, max(timestamp_ms, 0))

    async def tail(self, *, pause_ms: int | None = None) -> KafkaTail:
        """See `Log.tail`. `pause_ms` instead of the options' for this one."""
        wire = await Wire.open(self._options)
        tail = KafkaTail(wire, Fetcher(wire, self._options, pause_ms=pause_ms))
        self._remember(tail)
        return tail

    async def join(self, group: str, topic: str, listener: Listener) -> KafkaMembership:
        """See `Log.join`."""
        wire = await Wire.open(self._options)
        try:
            await wire.partitions(topic)
        except BaseException:
            await wire.close()
            raise
        # Nothing is awaited from here on, so the listener hears nothing before the caller has its membership.
        member = KafkaMembership(wire, self._options, group, topic, listener)
        self._remember(member)
        return member

    def _remember(self, reader: KafkaTail | KafkaMembership) -> None:
        # A process opens tails for as long as it lives, each with what its client knows of the cluster.
        self._readers = [*(one for one in self._readers if not one.closed), reader]

    async def close(self) -> None:
        """See `Log.close`. Members leave their groups, tails end."""
        while self._readers:
            await self._readers.pop().close()
        await self._producer.close()
        await self._wire.close()
