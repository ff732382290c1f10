# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types; this module is the typed face of its record batches.
"""Makes records of what a fetch brought, batch by batch; whatever a producer wrote, reading gets past it.

Brokers look into batches no further than they must, so a batch may hold what aiokafka cannot unpack: a header name that
is not UTF-8, a codec or lengths that are none. Its records are read one by one then, leniently; from the first that
cannot be read on, the batch comes out as one stand-in, at its last offset, that every reader finds unreadable and
stages bury. Only a wrong checksum is an error: the bytes are not those that the broker took, and may come right.
"""

import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import structlog
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import decode_varint
from aiokafka.structs import TopicPartition

from klatch_schemas import codec
from klatch_schemas.records import Partition, Record
from klatch_streams.dead_letters import describe

log: Final = structlog.stdlib.get_logger()

READ_COMMITTED: Final = 1
# Of every batch: base offset and length, then, after the leader's epoch, its format.
_HEAD: Final = struct.Struct(">qi")
_FORMAT_AT: Final = 16
_V2: Final = 2


class Corrupt(Exception):
    """The bytes of a batch are not those that its checksum was made of, or there is no memory for what is in them."""


class _Batches:
    """The batches of a fetch, and which was given out last."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._records = MemoryRecords(data)
        self._next = 0
        self._at = 0
        self.last: Any = None

    def has_next(self) -> bool:
        return bool(self._records.has_next())

    def next_batch(self) -> Any:
        self._at = self._next
        self._next += _HEAD.size + _HEAD.unpack_from(self._data, self._at)[1]
        try:
            self.last = self._records.next_batch()
            if self.last.validate_crc():
                return self.last
        except Exception as error:  # whatever the bytes are
            raise Corrupt(f"a batch is none: {describe(error)}") from error
        raise Corrupt("a batch has a wrong checksum")

    @property
    def raw(self) -> bytes:
        """The batch that was given out last."""
        return self._data[self._at : self._next]


class Unpacked(PartitionRecords):  # type: ignore[misc, unused-ignore]
    """The records of a fetched partition, made one by one as they are taken; checks CRCs, skips what was aborted."""

    def __init__(self, partition: Partition, offset: int, data: bytes, aborted: object) -> None:
        self._batches = _Batches(data)
        super().__init__(
            TopicPartition(*partition),
            self._batches,
            aborted,
            offset,
            key_deserializer=None,
            value_deserializer=None,
            check_crcs=False,  # by `_Batches`
            isolation_level=READ_COMMITTED,
        )
        self._partition = partition
        self._mended = iter(tuple[Record, ...]())

    @property
    def next_offset(self) -> int:
        """The offset after what was taken."""
        return int(self.next_fetch_offset)

    def has_next(self) -> bool:
        """Whether the fetch brought anything."""
        return self._batches.has_next()

    def take(self, limit: int) -> list[Record]:
        """Up to `limit` records; fewer mean that there are no more, and `next_offset` is where to go on.

        Raises Corrupt.
        """
        records: list[Record] = []
        while len(records) < limit:
            try:
                for source in (self._mended, self):
                    unpacked: Iterator[Any] = islice(source, limit - len(records))
                    records += unpacked  # what came before an error counts
            except (Corrupt, MemoryError) as error:
                if records:
                    # Told by the next fetch, which begins at it.
                    return records
                if isinstance(error, Corrupt):
                    raise
                raise Corrupt("there is no memory to unpack a batch") from error
            except Exception as error:  # noqa: BLE001 - the boundary of a batch, whatever is in it
                self._mend(error)
            else:
                break
        return records

    def _consumer_record(self, _: object, record: Any) -> Record:
        return Record(self._partition, record.offset, record.timestamp, record.key, record.value, tuple(record.headers))

    def _mend(self, error: Exception) -> None:
        """Go on after the batch that failed, with what can be had of its records first."""
        end, raw = int(self._batches.last.next_offset), self._batches.raw
        self._mended = self._rest_of(raw, end, error)
        # The iterator ended with the error; what it knows of aborted producers is kept.
        self._records_iterator = self._unpack_records()

    def _rest_of(self, raw: bytes, end: int, error: Exception) -> Iterator[Record]:
        stamp = 0
        try:
            if raw[_FORMAT_AT] == _V2:
                batch = _DefaultRecordBatchPy(raw)
                stamp = batch.max_timestamp
                for record in _leniently(self._partition, batch):
                    if record.offset >= self.next_offset:
                        self.next_fetch_offset = record.offset + 1
                        yield record
            else:
                yield self._stand_in(raw, end, stamp, error)
        except MemoryError:
            raise
        except Exception as again:  # noqa: BLE001 - as `take`
            yield self._stand_in(raw, end, stamp, again)
        self.next_fetch_offset = max(self.next_offset, end)

    def _stand_in(self, raw: bytes, end: int, stamp: int, error: Exception) -> Record:
        place, first, last, why = self._partition, self.next_offset, end - 1, describe(error)
        log.error(
            "batch.unreadable",
            topic=place.topic,
            partition=place.number,
            first=first,
            last=last,
            bytes=len(raw),
            reason=why,
        )
        self.next_fetch_offset = max(first, end)
        return Record(place, self.next_offset - 1, stamp, None, codec.lost(first, last, len(raw), why))


def _leniently(partition: Partition, batch: Any) -> Iterator[Record]:
    """The records of a batch; bytes that are no UTF-8 in the name of a header come as escapes.

    https://kafka.apache.org/documentation/#recordbatch
    """
    batch._maybe_uncompress()  # noqa: SLF001
    buffer, at = batch._buffer, batch._pos  # noqa: SLF001

    def number() -> int:
        nonlocal at
        value, at = decode_varint(buffer, at)
        return int(value)

    def some(size: int) -> bytes | None:
        nonlocal at
        if size < 0:
            return None
        if at + size > len(buffer):
            raise ValueError("a record ends after its batch")
        at += size
        return bytes(buffer[at - size : at])

    for _ in range(batch._num_records):  # noqa: SLF001
        size = number()
        end = at + size
        number()  # attributes, of which there are none yet
        stamp, offset = batch.first_timestamp + number(), batch.base_offset + number()
        key, value = some(number()), some(number())
        headers = [((some(number()) or b"").decode(errors="backslashreplace"), some(number())) for _ in range(number())]
        if at != end:
            raise ValueError("a record is not as long as it says")
        if not batch.base_offset <= offset < batch.next_offset:
            raise ValueError("a record lies outside its batch")
        stamp = batch.max_timestamp if batch.timestamp_type else stamp
        yield Record(partition, offset, stamp, key, value, tuple(headers))
