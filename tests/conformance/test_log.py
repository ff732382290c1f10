"""The `Log` port without groups: appends and tails, the same in memory and on Kafka."""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from aiokafka.partitioner import DefaultPartitioner  # type: ignore[import-untyped, unused-ignore]

from klatch_schemas.records import Draft, Partition, Record
from klatch_streams.catch_up import catch_up
from klatch_streams.follower import Follower
from klatch_streams.log import Log, LogError, OffsetGone, RecordTooLarge, Tail, UnknownTopic

if TYPE_CHECKING:
    from tests.conformance.conftest import World

LONG_MS = 20_000
SOON_S = 30
"""For a machine that pauses; a long poll is longer, and a read is made to be where nothing is to wait for it."""


def numbered(topic: str, count: int, partition: int | None = 0) -> list[Draft]:
    return [Draft(topic, b"k", b"%d" % number, partition=partition) for number in range(count)]


async def filled(log: Log, topic: str, count: int) -> Partition:
    await log.append(numbered(topic, count))
    return Partition(topic, 0)


async def read_until(tail: Tail, count: int) -> list[Record]:
    records = list[Record]()
    async with asyncio.timeout(LONG_MS / 1000):
        while len(records) < count:
            records += await tail.read(LONG_MS)
    return records


def offsets(records: Sequence[Record]) -> list[int]:
    return [record.offset for record in records]


async def test_append_says_where_each_record_stands(world: "World") -> None:
    topic = await world.topic(2)
    first = await world.log.append(
        [
            Draft(topic, None, b"a", partition=1),
            Draft(topic, None, b"b", partition=0),
            Draft(topic, None, b"c", partition=1),
        ]
    )
    assert list(first) == [(Partition(topic, 1), 0), (Partition(topic, 0), 0), (Partition(topic, 1), 1)]
    assert list(await world.log.append([Draft(topic, None, b"d", partition=1)])) == [(Partition(topic, 1), 2)]
    assert list(await world.log.append([])) == []


async def test_a_record_comes_back_as_it_was_written(world: "World") -> None:
    topic = await world.topic()
    before = time.time_ns() // 1_000_000
    headers = [("one", b"1"), ("one", b"2"), ("empty", b"")]
    await world.log.append([Draft(topic, "schlüssel".encode(), b"\x00\xff", headers), Draft(topic, b"k", None)])
    tail = await world.log.tail()
    tail.follow(Partition(topic, 0), 0)
    first, tombstone = await read_until(tail, 2)
    assert first[:2] == (Partition(topic, 0), 0)
    assert first.key == "schlüssel".encode()
    assert first.value == b"\x00\xff"
    assert list(first.headers) == headers
    assert before - 1 <= first.timestamp_ms <= time.time_ns() // 1_000_000 + 1
    assert (tombstone.offset, tombstone.key, tombstone.value) == (1, b"k", None)


async def test_keys_go_where_kafkas_own_partitioner_puts_them(world: "World") -> None:
    topic = await world.topic(8)
    keys = [random.randbytes(size) for size in range(1, 40)]  # noqa: S311
    places = await world.log.append([Draft(topic, key, b"v") for key in keys])
    everywhere = list(range(8))
    assert [place.number for place, _ in places] == [DefaultPartitioner()(key, everywhere, everywhere) for key in keys]


async def test_an_unknown_topic_is_an_error_that_names_it(world: "World") -> None:
    topic = await world.topic(2)
    for missing in ("no-such-topic", topic):
        partition = Partition(missing, 7)
        with pytest.raises(UnknownTopic, match=missing):
            await world.log.append([Draft(missing, b"k", b"v", partition=7)])
        with pytest.raises(UnknownTopic, match=missing):
            await world.log.bounds(partition)
        tail = await world.log.tail()
        tail.follow(partition, 0)
        with pytest.raises(UnknownTopic, match=missing):
            await tail.read(LONG_MS)
    with pytest.raises(UnknownTopic, match="no-such-topic"):
        await world.log.partitions("no-such-topic")
    assert await world.log.partitions(topic) == 2


async def test_a_record_too_large_is_refused_before_anything_is_sent(world: "World") -> None:
    topic = await world.topic()
    with pytest.raises(RecordTooLarge, match=r"1000000 bytes") as refused:
        await world.log.append([Draft(topic, b"k", b"small"), Draft(topic, b"k", b"x" * 1_000_001)])
    assert refused.value.limit == 1_000_000
    assert refused.value.size > 1_000_000
    assert await world.log.bounds(Partition(topic, 0)) == (0, 0)


async def test_an_append_larger_than_a_batch_stands_whole_and_in_order(world: "World") -> None:
    topic = await world.topic()
    values = [bytes([number]) * 300_000 for number in range(9)]
    places = await world.log.append([Draft(topic, b"k", value) for value in values])
    assert [offset for _, offset in places] == list(range(9))
    tail = await world.log.tail()
    tail.follow(Partition(topic, 0), 0)
    assert [record.value for record in await read_until(tail, 9)] == values


async def test_concurrent_appends_keep_the_order_of_their_calls(world: "World") -> None:
    topic = await world.topic(2)
    calls = [
        [Draft(topic, None, b"%d" % number, partition=part) for part in random.choice([(0,), (1,), (0, 1), (1, 0)])]  # noqa: S311
        for number in range(300)
    ]
    # The first call of all meets a topic that nobody here has heard of yet.
    places = await asyncio.gather(*[world.log.append(call) for call in calls])
    tail = await world.log.tail()
    for part in (0, 1):
        theirs = [offset for call in places for partition, offset in call if partition.number == part]
        assert theirs == list(range(len(theirs)))
        tail.follow(Partition(topic, part), 0)
    records = await read_until(tail, sum(map(len, calls)))
    for part in (0, 1):
        values = [int(record.value or b"") for record in records if record.partition.number == part]
        assert values == sorted(values)


async def test_an_append_cut_short_leaves_the_log_working_and_in_order(world: "World") -> None:
    topic = await world.topic()
    for _ in range(5):
        running = [asyncio.create_task(world.log.append(numbered(topic, 3))) for _ in range(20)]
        await asyncio.sleep(0)
        for task in running[::2]:
            task.cancel()
        await asyncio.wait(running)
        stood = [task.result()[0][1] for task in running[1::2]]
        assert stood == sorted(stood)
    end = (await world.log.bounds(Partition(topic, 0)))[1]
    assert end % 3 == 0
    assert list(await world.log.append(numbered(topic, 1))) == [(Partition(topic, 0), end)]


async def test_a_tail_reads_from_any_offset_to_the_end_and_what_comes_after(world: "World") -> None:
    topic = await world.topic()
    partition = await filled(world.log, topic, 6)
    for start in range(7):
        tail = await world.log.tail()
        tail.follow(partition, start)
        end = (await world.log.bounds(partition))[1]
        await world.log.append(numbered(topic, 1))
        assert offsets(await read_until(tail, end + 1 - start)) == list(range(start, end + 1))
        await tail.close()


async def test_read_is_empty_when_nothing_comes_in_time(world: "World") -> None:
    topic = await world.topic()
    tail = await world.log.tail()
    assert list(await tail.read(1)) == []
    tail.follow(await filled(world.log, topic, 1), 1)
    started = time.monotonic()
    assert list(await tail.read(50)) == []
    assert list(await tail.read(0)) == []
    assert 0.04 < time.monotonic() - started < SOON_S


async def test_a_partition_followed_while_a_read_waits_is_read_at_once(world: "World") -> None:
    idle, busy = await world.topic(), await world.topic(4)
    await world.log.append([Draft(busy, None, b"v", partition=part) for part in range(4)])
    tail = await world.log.tail()
    tail.follow(Partition(idle, 0), 0)
    assert list(await tail.read(200)) == []
    for part in range(4):
        reading = asyncio.create_task(tail.read(3 * LONG_MS))
        # The read shall be waiting already; nothing tells when it is.
        await asyncio.sleep(0.05)
        started = time.monotonic()
        tail.follow(Partition(busy, part), 0)
        assert [record.partition.number for record in await reading] == [part]
        assert time.monotonic() - started < SOON_S


async def test_nothing_of_an_unfollowed_partition_comes_out(world: "World") -> None:
    one, other = await world.topic(), await world.topic()
    tail = await world.log.tail()
    tail.follow(Partition(one, 0), 0)
    tail.follow(Partition(other, 0), 0)
    assert list(await tail.read(50)) == []
    await filled(world.log, one, 5)
    tail.unfollow(Partition(one, 0))
    tail.unfollow(Partition(one, 0))
    await filled(world.log, other, 1)
    assert [record.partition.topic for record in await read_until(tail, 1)] == [other]
    assert list(await tail.read(50)) == []
    tail.follow(Partition(one, 0), 3)
    assert offsets(await read_until(tail, 2)) == [3, 4]


async def test_whatever_is_followed_and_unfollowed_the_next_offset_is_the_one_asked_for(world: "World") -> None:
    topic = await world.topic(4)
    dice, parts = random.Random(7), [Partition(topic, number) for number in range(4)]  # noqa: S311
    for part in parts:
        await world.log.append([Draft(topic, None, b"v", partition=part.number) for _ in range(40)])
    tail, expected, seen = await world.log.tail(), dict[Partition, int](), 0
    for _ in range(400):
        part = dice.choice(parts)
        match dice.choice(("follow", "follow", "unfollow", "append", "read", "read")):
            case "follow":
                expected[part] = dice.randrange(40)
                tail.follow(part, expected[part])
            case "unfollow":
                expected.pop(part, None)
                tail.unfollow(part)
            case "append":
                await world.log.append([Draft(topic, None, b"v", partition=part.number)])
            case _:
                for record in await tail.read(dice.choice((0, 1, 5))):
                    assert record.offset == expected[record.partition]
                    expected[record.partition] += 1
                    seen += 1
    assert seen > 100


async def test_a_cancelled_read_has_taken_nothing(world: "World") -> None:
    topic = await world.topic(2)
    tail, seen = await world.log.tail(), list[Record]()
    for part in (0, 1):
        tail.follow(Partition(topic, part), 0)

    async def write() -> None:
        for number in range(60):
            await world.log.append([Draft(topic, None, b"v", partition=number % 2)])

    async def read() -> None:
        seen.extend(await tail.read(LONG_MS))

    writing = asyncio.create_task(write())
    async with asyncio.timeout(30):
        while len(seen) < 60:
            reading = asyncio.create_task(read())
            for _ in range(random.randrange(12)):  # noqa: S311
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            # Between two cancelled reads, time for records to arrive.
            await asyncio.sleep(0.001)
    await writing
    for part in (0, 1):
        assert [record.offset for record in seen if record.partition.number == part] == list(range(30))


async def test_offsets_outside_the_log_are_gone_and_the_tail_can_go_on(world: "World") -> None:
    topic = await world.topic(2)
    partition = await filled(world.log, topic, 6)
    await world.truncate_before(partition, 2)
    assert await world.log.bounds(partition) == (2, 6)
    tail = await world.log.tail()
    tail.follow(Partition(topic, 1), 0)
    for offset in (1, 7):
        tail.follow(partition, offset)
        with pytest.raises(OffsetGone) as gone:
            await tail.read(LONG_MS)
        assert (gone.value.partition, gone.value.offset, gone.value.first, gone.value.end) == (partition, offset, 2, 6)
    tail.follow(partition, 2)
    assert offsets(await read_until(tail, 4)) == [2, 3, 4, 5]


async def test_one_partition_that_is_gone_does_not_swallow_records_of_another(world: "World") -> None:
    topic = await world.topic(2)
    await world.log.append([Draft(topic, None, b"v", partition=1)])
    tail = await world.log.tail()
    tail.follow(Partition(topic, 0), 9)
    tail.follow(Partition(topic, 1), 0)
    seen, failures = list[Record](), 0
    async with asyncio.timeout(SOON_S):
        while not (seen and failures):
            try:
                seen += await tail.read(LONG_MS)
            except OffsetGone:
                failures += 1
    assert offsets(seen) == [0]


async def test_a_time_finds_the_first_record_not_older(world: "World") -> None:
    topic = await world.topic()
    partition = await filled(world.log, topic, 2)
    # Time passes between the timestamps that are looked up.
    await asyncio.sleep(0.02)
    await world.log.append(numbered(topic, 2))
    tail = await world.log.tail()
    tail.follow(partition, 0)
    records = await read_until(tail, 4)
    assert await world.log.offset_at(partition, records[2].timestamp_ms) == 2
    assert await world.log.offset_at(partition, records[1].timestamp_ms + 1) == 2
    assert await world.log.offset_at(partition, 0) == 0
    assert await world.log.offset_at(partition, records[3].timestamp_ms + 60_000) == 4


async def test_closing_a_tail_ends_a_read_in_progress(world: "World") -> None:
    tail = await world.log.tail()
    tail.follow(Partition(await world.topic(), 0), 0)
    reading = asyncio.create_task(tail.read(3 * LONG_MS))
    # The read shall be waiting already; nothing tells when it is.
    await asyncio.sleep(0.05)
    await tail.close()
    async with asyncio.timeout(SOON_S):
        assert list(await reading) == []
    with pytest.raises(LogError, match="closed"):
        await tail.read(1)


async def test_a_closed_log_takes_nothing(world: "World") -> None:
    topic = await world.topic()
    await world.log.append(numbered(topic, 1))
    await world.log.close()
    with pytest.raises(LogError, match="closed"):
        await world.log.append(numbered(topic, 1))


@pytest.mark.parametrize("commit", [True, False], ids=["committed", "aborted"])
async def test_the_end_of_a_transaction_is_reached_though_it_is_no_record(world: "World", commit: bool) -> None:
    partition = await filled(world.log, await world.topic(), 2)
    await world.transaction(partition, b"said", commit=commit)
    first, end = await world.log.bounds(partition)
    assert (first, end) == (0, 4)
    stands = [0, 1, 2] if commit else [0, 1]
    tail = await world.log.tail()
    assert tail.position(partition) is None
    caught = [record async for records in catch_up(tail, partition, first, end) for record in records]
    assert (offsets(caught), tail.position(partition)) == (stands, 4)
    follower, heard = Follower(world.log), list[int]()
    await follower.follow(partition, 0, lambda record: heard.append(record.offset))
    assert (heard, follower.position(partition)) == (stands, 4)
    # From the marker itself on, too.
    await follower.follow(partition, 3, lambda record: heard.append(record.offset))
    assert heard == stands
    await follower.close()
