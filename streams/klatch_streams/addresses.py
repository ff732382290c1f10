"""Where a record belongs: the key that its event names, in the partition that Kafka's partitioner gives that key.

A producer may have chosen another key, or a partitioner of its own (librdkafka's default is not Kafka's). A stage
that meets such a record writes it again where it belongs; one that comes back wrong once more is a dead letter.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from klatch_schemas.codec import Delta
from klatch_schemas.events import ChatAdmitted, Event
from klatch_schemas.records import Draft, Record, partition_of
from klatch_schemas.topics import Topic
from klatch_streams.dead_letters import DeadLetter

MOVED_FROM: Final = "moved-from"
"""`topic/partition/offset` of the record that this one is a copy of."""

_home: Final = lru_cache(maxsize=16_384)(partition_of)  # the hash costs microseconds, and keys come again


@dataclass(frozen=True, slots=True)
class Addresses:
    """The places of one topic."""

    topic: Topic
    partitions: int

    def key_of(self, event: Event | Delta) -> str:
        """The key that an event of this topic belongs under. Raises DeadLetter for an event of another topic."""
        if not isinstance(event, self.topic.holds):
            kind = event.KIND if isinstance(event, Event) else "stream.delta.v1"
            raise DeadLetter("wrong-topic", f"{kind} does not belong into {self.topic.name}")
        named = event.request if isinstance(event, ChatAdmitted) else event
        key: object = getattr(named, self.topic.key)
        return str(key)

    def belongs(self, record: Record, key: str) -> bool:
        """Whether `record` stands under `key` in the partition of `key`."""
        raw = key.encode()
        return record.key == raw and _home(raw, self.partitions) == record.partition.number

    def move(self, record: Record, key: str) -> Draft:
        """`record` as it should have been written. Raises DeadLetter if it was moved before."""
        if record.header(MOVED_FROM):
            raise DeadLetter("mis-keyed", "the record was moved once and is still under a wrong key or partition")
        origin = f"{record.partition.topic}/{record.partition.number}/{record.offset}"
        raw = key.encode()
        headers = [*record.headers, (MOVED_FROM, origin.encode())]
        return Draft(record.partition.topic, raw, record.value, headers, _home(raw, self.partitions))
