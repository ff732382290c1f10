"""Records as every part of klatch passes them on: what was read, and what is to be written.

Plain named tuples: a record is made for every token, so making one must cost next to nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

Headers = Sequence[tuple[str, bytes | None]]


class Partition(NamedTuple):
    """A partition of a topic, by its full name."""

    topic: str
    number: int


class Record(NamedTuple):
    """A record as it was read from the log."""

    partition: Partition
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    def header(self, name: str) -> bytes | None:
        """The value of the first header called `name`; None also if it has none."""
        return next((value for key, value in self.headers if key == name), None)


class Draft(NamedTuple):
    """A record to be written. Without a partition number, the key's murmur2 hash decides."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


class Cause(NamedTuple):
    """Why a record was written: the input record, and which of its effects this is."""

    partition: Partition
    offset: int
    effect: int

    def __str__(self) -> str:
        return f"{self.partition.topic}/{self.partition.number}/{self.offset}/{self.effect}"

    @classmethod
    def parse(cls, text: str) -> "Cause":
        """Read what `str` wrote; raises ValueError."""
        topic, number, offset, effect = text.rsplit("/", 3)
        return cls(Partition(topic, int(number)), int(offset), int(effect))


def partition_of(key: bytes, count: int) -> int:
    """The partition that Kafka's standard partitioner gives `key` among `count`.

    Same as Java's `Utils.toPositive(Utils.murmur2(key)) % count`, so producers in any language agree.
    """
    return (_murmur2(key) & 0x7FFFFFFF) % count


def _murmur2(data: bytes) -> int:
    # org.apache.kafka.common.utils.Utils.murmur2: 32-bit MurmurHash2, seed 0x9747b28c, on unsigned integers.
    multiplier, mask = 0x5BD1E995, 0xFFFFFFFF
    value = (0x9747B28C ^ len(data)) & mask
    body = len(data) & ~3
    for at in range(0, body, 4):
        word = int.from_bytes(data[at : at + 4], "little") * multiplier & mask
        word = (word ^ word >> 24) * multiplier & mask
        value = (value * multiplier & mask) ^ word
    if tail := data[body:]:
        value = (value ^ int.from_bytes(tail, "little")) * multiplier & mask
    value = (value ^ value >> 13) * multiplier & mask
    return value ^ value >> 15
