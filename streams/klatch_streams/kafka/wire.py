# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types; this module is the typed face of its client.
"""Questions to brokers: who leads a partition, what it holds, and fetches on connections ("lanes") of their own.

Retriable refusals are asked again for `patience_s`. A broker serves one request of a connection at a time, so a fetch
that waits for news would hold up every later request on its connection: hence lanes.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.structs import TopicPartition

from klatch_schemas.records import Partition
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka.unpacking import READ_COMMITTED, Unpacked
from klatch_streams.log import LogError, UnknownTopic

EARLIEST, LATEST = -2, -1
_PARTITION_BYTES = 1 << 20
_FETCH_BYTES = 8 << 20
_BACKOFF_S = 0.1
# Metadata of a topic that was made a moment ago may take this long to reach every broker.
_NEW_TOPIC_S = 1.0


class Unreachable(LogError):
    """No broker answered in time."""


class Fetched(NamedTuple):
    """What a broker said about one partition."""

    partition: Partition
    offset: int
    """The offset asked for."""
    error: type[Exception] | None
    end: int
    """The last stable offset: what readers may see ends here."""
    records: Unpacked | None


class Wire:
    """A client of the cluster."""

    def __init__(self, options: KafkaOptions, client: AIOKafkaClient) -> None:
        self._options = options
        self.client = client

    @classmethod
    async def open(cls, options: KafkaOptions, *, patience_s: float | None = None) -> "Wire":
        """Connect; tries for `startup_s` while the broker comes up. Raises Unreachable."""
        client = AIOKafkaClient(bootstrap_servers=options.bootstrap, client_id=options.client_id, **options.security())
        patience = options.startup_s if patience_s is None else patience_s
        deadline = time.monotonic() + patience
        while True:
            try:
                await client.bootstrap()
            except kafka.KafkaError as error:
                if time.monotonic() + _BACKOFF_S * 2 > deadline:
                    await client.close()
                    raise Unreachable(
                        f"no Kafka answers at {options.bootstrap} within {patience:g} s: is it running, and is this "
                        f"the address it advertises? Set --kafka or KLATCH_KAFKA ({error})"
                    ) from error
                await asyncio.sleep(_BACKOFF_S * 2)
            else:
                return cls(options, client)

    async def close(self) -> None:
        """Close all connections."""
        await self.client.close()

    # Who leads what.

    def count(self, topic: str) -> int | None:
        """The partition count as far as it is known here."""
        numbers = self.client.cluster.partitions_for_topic(topic)
        return len(numbers) if numbers else None

    async def partitions(self, topic: str) -> int:
        """The partition count. Raises UnknownTopic, Unreachable."""
        deadline = time.monotonic() + _NEW_TOPIC_S
        while (size := self.count(topic)) is None:
            await self.refresh([topic])
            if (size := self.count(topic)) is None:
                if topic in self.client.cluster.unauthorized_topics:
                    raise LogError(f"not allowed to read topic {topic}: give this user DESCRIBE on it")
                if time.monotonic() > deadline:
                    raise UnknownTopic(f"no topic {topic}; `klatch topics create` makes it")
                await asyncio.sleep(_BACKOFF_S)
        return size

    def leader(self, partition: Partition) -> int | None:
        """The node that leads `partition`, as far as it is known here."""
        node = self.client.cluster.leader_for_partition(TopicPartition(*partition))
        return None if node in (None, -1) else node

    async def refresh(self, topics: Iterable[str]) -> bool:
        """Ask who leads what, again; False if no broker answered."""
        for topic in topics:
            self.client.add_topic(topic)
        return bool(await self.client.force_metadata_update())

    # What partitions hold.

    async def bounds(self, partition: Partition) -> tuple[int, int]:
        """The first offset held and the next to be written."""
        first, end = await asyncio.gather(self.offset_at(partition, EARLIEST), self.offset_at(partition, LATEST))
        return first, end

    async def offset_at(self, partition: Partition, timestamp_ms: int) -> int:
        """The first offset at or after a time (or EARLIEST, or LATEST). Raises UnknownTopic, Unreachable."""
        if partition.number >= await self.partitions(partition.topic):
            raise UnknownTopic(f"topic {partition.topic} has no partition {partition.number}")
        deadline = time.monotonic() + self._options.patience_s
        while True:
            try:
                offset = await self._list_offset(partition, timestamp_ms)
            except kafka.KafkaError as error:
                if not error.retriable or time.monotonic() > deadline:
                    raise Unreachable(
                        f"no offset of {partition.topic}/{partition.number} to be had: {error}"
                    ) from error
                await self.refresh([partition.topic])
                await asyncio.sleep(_BACKOFF_S)
            else:
                return await self.offset_at(partition, LATEST) if offset < 0 else offset

    async def _list_offset(self, partition: Partition, timestamp_ms: int) -> int:
        node = self.leader(partition)
        if node is None:
            raise kafka.LeaderNotAvailableError(partition)
        asked = [(partition.topic, [(partition.number, timestamp_ms)])]
        response = await self.client.send(node, OffsetRequest(-1, READ_COMMITTED, asked), group=_lane("offsets"))
        ((_, ((_, code, _, offset),)),) = response.topics
        error = kafka.for_code(code)
        if error is not kafka.NoError:
            raise error(partition)
        return int(offset)

    # Fetches.

    async def fetch(self, node: int, lane: int, offsets: Mapping[Partition, int], wait_ms: int) -> list[Fetched]:
        """Ask `node` for what stands at `offsets`; answers when there is something, or after `wait_ms`.

        Raises ConnectionError.
        """
        by_topic = dict[str, list[tuple[int, int, int]]]()
        for partition, offset in offsets.items():
            by_topic.setdefault(partition.topic, []).append((partition.number, offset, _PARTITION_BYTES))
        request = FetchRequest(wait_ms, 1, _FETCH_BYTES, READ_COMMITTED, list(by_topic.items()))
        try:
            response = await self.client.send(node, request, group=_lane(f"fetch-{lane}"))
        except kafka.KafkaError as error:
            raise ConnectionError(f"node {node}: {error}") from error
        return list(_fetched(response, offsets))


def _fetched(response: Any, offsets: Mapping[Partition, int]) -> Iterator[Fetched]:
    for topic, partitions in response.topics:
        for number, code, _, *rest in partitions:
            partition = Partition(topic, number)
            offset, error = offsets[partition], kafka.for_code(code)
            if error is not kafka.NoError:
                yield Fetched(partition, offset, error, -1, None)
                continue
            # v11 ends [..., aborted, preferred replica, records]; v4 to v10 end [..., aborted, records].
            aborted = rest[-3] if response.API_VERSION >= 11 else rest[-2]
            records = Unpacked(partition, offset, rest[-1] or b"", aborted)
            yield Fetched(partition, offset, None, rest[0], records if records.has_next() else None)


def _lane(name: str) -> Any:
    # aiokafka keeps a connection for each node and group of uses; it knows two uses, and takes any other as well.
    return name


def final(error: type[Exception]) -> bool:
    """Whether asking again cannot help; all else passes as leaders move and brokers come back."""
    return issubclass(error, (kafka.TopicAuthorizationFailedError, kafka.InvalidTopicError))


def out_of_range(error: type[Exception]) -> bool:
    """Whether the broker does not hold the offset."""
    return issubclass(error, kafka.OffsetOutOfRangeError)


def unknown_topic(error: type[Exception]) -> bool:
    """Whether the broker knows no such topic (yet)."""
    return issubclass(error, kafka.UnknownTopicOrPartitionError)
