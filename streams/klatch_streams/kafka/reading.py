"""`Tail` on Kafka: assigned partitions without a group, on a connection of its own."""

from collections.abc import Sequence

from klatch_schemas.records import Partition, Record
from klatch_streams.kafka.fetching import Fetcher
from klatch_streams.kafka.wire import Wire
from klatch_streams.log import LogError


class KafkaTail:
    """See `Tail`."""

    def __init__(self, wire: Wire, fetcher: Fetcher) -> None:
        self._wire = wire
        self._fetcher = fetcher
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing of it is left."""
        return self._closed

    def follow(self, partition: Partition, offset: int) -> None:
        """See `Tail.follow`. A `read` in progress asks for it at once."""
        self._fetcher.follow(partition, offset)

    def unfollow(self, partition: Partition) -> None:
        """See `Tail.unfollow`."""
        self._fetcher.unfollow(partition)

    def position(self, partition: Partition) -> int | None:
        """See `Tail.position`."""
        return self._fetcher.position(partition)

    async def read(self, wait_ms: int) -> Sequence[Record]:
        """See `Tail.read`. A read that is cancelled has taken nothing."""
        if self._fetcher.closed:
            raise LogError("this tail was closed")
        taken = await self._fetcher.read(wait_ms)
        return [record for records in taken.values() for record in records]

    async def close(self) -> None:
        """See `Tail.close`."""
        await self._fetcher.close()
        await self._wire.close()
        self._closed = True
