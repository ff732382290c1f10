"""The follower: complete before `follow` returns, several at once, failures told to everybody, leaving, retention."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from klatch_schemas.records import Draft, Partition, Record
from klatch_streams.follower import Follower
from klatch_streams.log import LogError, OffsetGone
from klatch_streams.memory_log import MemoryLog

A, B = Partition("t", 0), Partition("t", 1)


class Heard:
    """A handler that remembers."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self._more = asyncio.Event()

    def __call__(self, record: Record) -> None:
        self.offsets.append(record.offset)
        self._more.set()

    async def until(self, count: int) -> list[int]:
        while len(self.offsets) < count:
            self._more.clear()
            await self._more.wait()
        return self.offsets


@pytest.fixture
async def log() -> AsyncIterator[MemoryLog]:
    log = MemoryLog({"t": 2})
    yield log
    await log.close()


@pytest.fixture
async def follower(log: MemoryLog) -> AsyncIterator[Follower]:
    follower = Follower(log, wait_ms=20)
    yield follower
    await follower.close()


async def fill(log: MemoryLog, partition: Partition, count: int) -> None:
    await log.append([Draft("t", None, b"x", (), partition.number) for _ in range(count)])


async def test_follow_returns_when_the_handler_has_had_all_that_stood(log: MemoryLog, follower: Follower) -> None:
    await fill(log, A, 1_200)  # more than one read
    heard = Heard()
    await follower.follow(A, 100, heard)
    assert heard.offsets == list(range(100, 1_200))
    await fill(log, A, 2)
    assert (await heard.until(1_102))[-2:] == [1_200, 1_201]
    assert follower.position(A) == 1_202


async def test_an_empty_partition_is_complete_at_once(follower: Follower) -> None:
    async with asyncio.timeout(60):
        await follower.follow(A, 0, Heard())
    assert follower.position(A) == 0


async def test_several_may_begin_to_follow_at_once(log: MemoryLog, follower: Follower) -> None:
    await fill(log, A, 700)
    await fill(log, B, 700)
    one, other = Heard(), Heard()
    await asyncio.gather(follower.follow(A, 0, one), follower.follow(B, 600, other))
    assert (one.offsets, other.offsets) == (list(range(700)), list(range(600, 700)))


async def test_a_partition_that_is_followed_no_longer_is_heard_no_more(log: MemoryLog, follower: Follower) -> None:
    gone, stays = Heard(), Heard()
    await follower.follow(A, 0, gone)
    await follower.follow(B, 0, stays)
    follower.unfollow(A)
    follower.unfollow(A)
    await fill(log, A, 3)
    await fill(log, B, 3)
    await stays.until(3)
    assert gone.offsets == []


async def test_a_partition_that_comes_back_is_read_from_where_its_new_owner_asks(
    log: MemoryLog, follower: Follower
) -> None:
    before, after = Heard(), Heard()
    await fill(log, A, 10)
    await follower.follow(A, 0, before)
    follower.unfollow(A)
    await fill(log, A, 10)
    await follower.follow(A, 5, after)
    assert (before.offsets, after.offsets) == (list(range(10)), list(range(5, 20)))


async def test_what_retention_has_taken_is_passed_over(log: MemoryLog, follower: Follower) -> None:
    await fill(log, A, 10)
    log.truncate_before(A, 6)
    heard = Heard()
    await follower.follow(A, 2, heard)
    assert heard.offsets == [6, 7, 8, 9]


async def test_an_offset_that_never_was_fails_the_follower(log: MemoryLog, follower: Follower) -> None:
    await fill(log, A, 3)
    with pytest.raises(OffsetGone):
        await asyncio.gather(follower.follow(A, 9, Heard()), follower.failure())


async def test_a_handler_that_fails_fails_everybody_who_waits_and_follows_later(
    log: MemoryLog, follower: Follower
) -> None:
    def broken(_: Record) -> None:
        raise LogError("broken")

    watching = asyncio.create_task(follower.failure())
    await fill(log, A, 1)
    with pytest.raises(LogError, match="broken"):
        await follower.follow(A, 0, broken)
    with pytest.raises(LogError, match="broken"):
        await watching
    await fill(log, B, 1)
    with pytest.raises(LogError, match="broken"):
        await follower.follow(B, 0, Heard())


async def test_a_marker_at_the_end_is_nothing_to_wait_for(log: MemoryLog, follower: Follower) -> None:
    await fill(log, A, 2)
    log.mark(A)
    log.mark(B)
    heard, moved = Heard(), list[int]()
    await follower.follow(A, 0, heard, moved.append)
    await follower.follow(B, 0, heard)
    assert (heard.offsets, moved[-1], follower.position(A), follower.position(B)) == ([0, 1], 3, 3, 1)
