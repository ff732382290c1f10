# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""Faust's consumers get past whatever a producer wrote, as klatch's own fetcher does.

aiokafka 0.14.0 raises where it cannot unpack a batch, again at each call: one header name that is not UTF-8, and its
partition is read on by nobody. It has no hook for it, so two of its names are set for the process.
"""

from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import ConsumerRecord, TopicPartition

from klatch_schemas.records import Partition
from klatch_streams.kafka.unpacking import Corrupt, Unpacked


def read_whatever_was_written() -> None:
    """Have aiokafka's consumers of this process read as `Unpacked` does; of a time they do not tell who set it."""
    fetcher.MemoryRecords, fetcher.PartitionRecords = _Fetched, _Lenient


class _Fetched(MemoryRecords):  # type: ignore[misc, unused-ignore]
    """Remembers what it is made of."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)  # pyright: ignore[reportAbstractUsage]
        self.data = data


class _Lenient:
    """In place of aiokafka's `PartitionRecords`: always checks checksums, skips what was aborted."""

    def __init__(self, tp: TopicPartition, fetched: _Fetched, aborted: object, offset: int, *_: object) -> None:
        self._unpacked = Unpacked(Partition(*tp), offset, fetched.data, aborted)

    @property
    def next_fetch_offset(self) -> int:
        return self._unpacked.next_offset

    def __iter__(self) -> "_Lenient":
        return self

    def __next__(self) -> ConsumerRecord[Any, Any]:
        try:
            records = self._unpacked.take(1)
        except Corrupt as error:
            raise CorruptRecordException(str(error)) from error
        for (topic, number), offset, stamp, key, value, headers in records:
            sizes = (-1 if key is None else len(key)), (-1 if value is None else len(value))
            named: Any = headers  # whose values may be none, other than aiokafka's type says
            return ConsumerRecord(topic, number, offset, stamp, 0, key, value, None, *sizes, named)
        raise StopIteration
