# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""Batches as producers may write them: whatever is in them, a fetcher gets past it and tells what it could not read."""

import asyncio
import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from aiokafka.codec import gzip_decode  # type: ignore[import-untyped, unused-ignore]
from aiokafka.record._crecords import default_records  # type: ignore[import-untyped, unused-ignore]
from aiokafka.record.default_records import DefaultRecordBatchBuilder  # type: ignore[import-untyped, unused-ignore]
from aiokafka.record.util import calc_crc32c  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas import codec
from klatch_schemas.records import Partition, Record
from klatch_streams.kafka.fetching import Fetcher
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka.unpacking import Unpacked
from klatch_streams.kafka.wire import Fetched, Wire
from klatch_streams.log import LogError

PLACE = Partition("t", 0)
CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
CODEC_AT, FIRST_RECORD = 22, 61


def batch(start: int, count: int, compression: str = "none", header: str = "header") -> bytes:
    """Records `start`, `start + 1`, ..., as a producer makes them and a broker numbers them."""
    made = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=CODECS[compression],
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 20,
    )
    for number in range(count):
        value = b"value %d" % (start + number)
        made.append(number, timestamp=1_000 + number, key=b"key", value=value * 20, headers=[(header, b"said")])
    raw = bytearray(made.build())
    struct.pack_into(">q", raw, 0, start)
    return bytes(raw)


def checked(raw: bytes) -> bytes:
    """With the checksum that goes with what it holds, which a broker looks at."""
    mended = bytearray(raw)
    struct.pack_into(">I", mended, 17, calc_crc32c(bytes(mended[21:])))
    return bytes(mended)


class Canned:
    """A broker's answers to fetches: the bytes that stand from the batch of an offset on."""

    def __init__(self, *batches: bytes) -> None:
        self._batches = batches

    def leader(self, _: Partition) -> int:
        return 1

    async def fetch(self, _: int, __: int, offsets: Mapping[Partition, int], wait_ms: int) -> list[Fetched]:
        [(place, offset)] = offsets.items()
        left = b"".join(raw for raw in self._batches if end_of(raw) > offset)
        if not left:
            await asyncio.sleep(wait_ms / 1000)
        return [Fetched(place, offset, None, 1_000, Unpacked(place, offset, left, []) if left else None)]


def end_of(raw: bytes) -> int:
    """The offset after a batch: its base, and the delta of its last record."""
    return int(struct.unpack_from(">q", raw, 0)[0] + struct.unpack_from(">i", raw, 23)[0] + 1)


async def read(*batches: bytes, limit: int = 500) -> Sequence[Record]:
    """What comes out until the fetcher is behind the last batch."""
    fetcher = Fetcher(cast("Wire", Canned(*batches)), KafkaOptions("nowhere:1", read_limit=limit, fetch_wait_ms=10))
    records = list[Record]()
    try:
        fetcher.follow(PLACE, 0)
        while fetcher.position(PLACE) != end_of(batches[-1]):
            records += (await fetcher.read(100)).get(PLACE, [])
    finally:
        await fetcher.close()
    return records


def offsets(records: Sequence[Record]) -> list[int]:
    return [record.offset for record in records]


def told(record: Record) -> dict[str, Any]:
    """What a stand-in says; no stage can read it as an event."""
    with pytest.raises(codec.Unreadable, match="could not be unpacked"):
        codec.decode(record.value)
    said: dict[str, Any] = codec.loads(record.value or b"")
    return said


@pytest.mark.parametrize("compression", CODECS)
async def test_records_of_every_codec_are_read(compression: str) -> None:
    records = await read(batch(0, 3, compression), batch(3, 2, compression))
    assert offsets(records) == [0, 1, 2, 3, 4]
    assert records[4].value == b"value 4" * 20


@pytest.mark.parametrize("limit", [1, 2, 500])
@pytest.mark.parametrize("compression", CODECS)
async def test_a_header_name_that_is_no_utf_8_costs_no_record(compression: str, limit: int) -> None:
    bad = checked(batch(2, 3, "none", header="nam~").replace(b"nam~", b"nam\xff"))
    records = await read(batch(0, 2, compression), bad, batch(5, 1, compression), limit=limit)
    assert offsets(records) == [0, 1, 2, 3, 4, 5]
    assert [record.headers for record in records[2:5]] == [(("nam\\xff", b"said"),)] * 3
    assert records[3] == Record(PLACE, 3, 1_001, b"key", b"value 3" * 20, (("nam\\xff", b"said"),))


@pytest.mark.parametrize("limit", [1, 500])
async def test_a_batch_of_an_unknown_codec_comes_as_one_stand_in_and_the_next_is_read(limit: int) -> None:
    unknown = bytearray(batch(2, 3))
    unknown[CODEC_AT] = 7
    records = await read(batch(0, 2), checked(bytes(unknown)), batch(5, 1), limit=limit)
    assert offsets(records) == [0, 1, 4, 5]
    said = told(records[2])
    assert (said["first"], said["last"], said["bytes"]) == (2, 4, len(unknown))
    assert said["reason"].startswith("UnsupportedCodecError")
    assert b"value" not in (records[2].value or b"")


@pytest.mark.parametrize("compression", [name for name in CODECS if name != "none"])
async def test_a_batch_whose_compression_is_broken_is_passed_over(compression: str) -> None:
    raw = bytearray(batch(0, 3, compression))
    raw[FIRST_RECORD:] = b"\x00" * (len(raw) - FIRST_RECORD)
    records = await read(checked(bytes(raw)), batch(3, 1))
    assert (told(records[0])["first"], told(records[0])["last"]) == (0, 2)
    assert offsets(records) == [2, 3]


async def test_what_stands_before_the_record_that_cannot_be_read_is_not_lost() -> None:
    raw = bytearray(batch(0, 3))
    # The second record's key says that it is longer than the batch.
    second = raw.index(b"key", raw.index(b"key") + 1)
    raw[second - 1] = 0x7E
    records = await read(checked(bytes(raw)), batch(3, 1))
    assert offsets(records) == [0, 2, 3]
    assert (told(records[1])["first"], told(records[1])["last"]) == (1, 2)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_the_bytes_are_the_fetcher_gets_past_them_in_order(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - a seed that can be repeated
    for compression in CODECS:
        raw = bytearray(batch(1, 20, compression))
        for _ in range(dice.choice([1, 3, 20])):
            raw[dice.randrange(FIRST_RECORD, len(raw))] = dice.randrange(256)
        found = offsets(await read(batch(0, 1), checked(bytes(raw)), batch(21, 1)))
        assert found == sorted(set(found))
        assert (found[0], found[-1]) == (0, 21)
        assert 20 in found


async def test_a_wrong_checksum_is_an_error_that_names_the_place_after_what_came_before_it() -> None:
    wrong = bytearray(batch(2, 1))
    wrong[-1] ^= 1
    fetcher = Fetcher(cast("Wire", Canned(batch(0, 2), bytes(wrong))), KafkaOptions("nowhere:1"))
    fetcher.follow(PLACE, 0)
    assert offsets((await fetcher.read(60_000))[PLACE]) == [0, 1]
    with pytest.raises(LogError, match=r"t/0 at 2.*checksum"):
        await fetcher.read(60_000)
    await fetcher.close()


@pytest.mark.parametrize("before", [0, 2])
async def test_a_batch_for_which_there_is_no_memory_is_read_later_and_none_of_it_is_lost(
    monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    scarce = list[int]()

    def unpacked(packed: bytes) -> bytes:
        if scarce:
            scarce.pop()
            raise MemoryError
        return bytes(gzip_decode(packed))

    # Want of memory, which nothing else brings about in time: a library's function fails once, ours runs as it is.
    monkeypatch.setattr(default_records, "gzip_decode", unpacked)
    batches = [*([batch(0, before)] if before else []), batch(before, 3, "gzip")]
    fetcher = Fetcher(cast("Wire", Canned(*batches)), KafkaOptions("nowhere:1", fetch_wait_ms=10))
    fetcher.follow(PLACE, 0)
    scarce += [1, 1, 1]
    records, failures = list[Record](), 0
    while fetcher.position(PLACE) != before + 3:
        try:
            records += (await fetcher.read(100)).get(PLACE, [])
        except LogError:
            failures += 1
            fetcher.follow(PLACE, len(records))
    await fetcher.close()
    assert failures
    assert offsets(records) == list(range(before + 3))
    assert records[-1].value == b"value %d" % (before + 2) * 20
