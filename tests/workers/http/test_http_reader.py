"""Laws of the reader: whatever its pace, its start and the size of its buffer, it hears every record once, in order."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from klatch_schemas import codec
from klatch_schemas.errors import LogMoved, Unavailable
from klatch_schemas.events import StreamAttempt, StreamCancel, StreamEnd, StreamRetract
from klatch_schemas.ids import RequestId, Tenant
from klatch_schemas.records import Draft, Partition, Record
from klatch_streams.memory_log import MemoryLog
from klatch_workers.http.door import Terms
from klatch_workers.http.hub import Hub
from klatch_workers.http.reader import Reader, Stream

MINE = Stream(Tenant("acme"), RequestId("mine"))
PLACE = Partition("s", 0)


def _delta(request: str, seq: int) -> Draft:
    value = codec.encode_delta(codec.delta_prefix(request, 1, "w"), seq, b'{"choices":[]}')
    return codec.delta_draft("s", b"k", 0, value)


async def _write(log: MemoryLog, count: int, dice: random.Random) -> None:
    for seq in range(count):
        await log.append([_delta(dice.choice(["mine", "mine", "other"]), seq) for _ in range(dice.randint(1, 5))])
        if dice.random() < 0.3:
            await asyncio.sleep(0)
    await log.append([_delta("mine", count)])


def _mine(log: MemoryLog) -> list[int]:
    return [record.offset for record in log.records("s") if b'"mine"' in (record.value or b"")]


@pytest.mark.parametrize("seed", range(20))
async def test_every_record_is_heard_once_in_order_from_any_start_at_any_pace(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - a seed that can be repeated
    log = MemoryLog({"s": 1})
    hub = Hub(log, Terms(buffer_bytes=dice.choice([100, 400, 2_000, 1_000_000])))
    hub.start()
    await _write(log, dice.randint(0, 300), dice)
    _, end = await log.bounds(PLACE)
    start = dice.choice([None, 0, dice.randint(0, end)])
    reader = await hub.open(MINE, PLACE, start)
    begin = end if start is None else start
    writing = asyncio.create_task(_write(log, 300, random.Random(seed + 1)))  # noqa: S311
    heard = list[int]()
    # The writer's last record is one of this stream: until it was heard, there is more to come.
    while not (writing.done() and heard and heard[-1] == _mine(log)[-1]):
        heard += [offset for offset, _ in await reader.read()]
        if dice.random() < 0.2:
            for _ in range(dice.randint(1, 50)):
                await asyncio.sleep(0)
    assert heard == [offset for offset in _mine(log) if offset >= begin]
    await reader.close()
    await hub.close()


async def test_a_hub_whose_place_retention_took_tells_its_readers_and_goes_on() -> None:
    log = MemoryLog({"s": 1})
    hub = Hub(log, Terms())
    reader = await hub.open(MINE, PLACE)
    await log.append([_delta("mine", 0), _delta("mine", 1)])
    log.truncate_before(PLACE, 1)
    hub.start()
    with pytest.raises(LogMoved):
        await reader.read()
    await reader.close()
    again = await hub.open(MINE, PLACE)
    await log.append([_delta("mine", 2)])
    assert [offset for offset, _ in await again.read()] == [2]
    await again.close()
    await hub.close()


async def test_a_hub_survives_a_tail_that_breaks_and_misses_nothing() -> None:
    log = MemoryLog({"s": 1})
    hub = Hub(log, Terms())
    hub.start()
    reader = await hub.open(MINE, PLACE)
    await log.append([_delta("mine", 0)])
    await reader.read()
    assert hub._tail  # pyright: ignore[reportPrivateUsage]
    await hub._tail.close()  # pyright: ignore[reportPrivateUsage]
    await log.append([_delta("mine", 1)])
    assert [offset for offset, _ in await reader.read()] == [1]
    await reader.close()
    await hub.close()


class Faulty(MemoryLog):
    """A log whose reading fails once as no log should."""

    sound = False

    def take(self, positions: dict[Partition, int]) -> dict[Partition, list[Record]]:
        taken = super().take(positions)
        if taken and not self.sound:
            self.sound = True
            raise ZeroDivisionError
        return taken


async def test_a_hub_that_fails_tells_its_readers_and_reads_on_for_the_next() -> None:
    log = Faulty({"s": 1})
    hub = Hub(log, Terms())
    hub.start()
    reader = await hub.open(MINE, PLACE)
    await log.append([_delta("mine", 0)])
    with pytest.raises(Unavailable, match="read on"):
        await reader.read()
    await reader.close()
    again = await hub.open(MINE, PLACE, 0)
    await log.append([_delta("mine", 1)])
    heard = list[int]()
    while len(heard) < 2:
        heard += [offset for offset, _ in await again.read()]
    assert heard == [0, 1]
    await again.close()
    await hub.close()


async def test_a_marker_before_its_place_does_not_keep_a_reader_from_catching_up() -> None:
    log = MemoryLog({"s": 1})
    await log.append([_delta("mine", 0)])
    log.mark(PLACE)
    hub = Hub(log, Terms())
    hub.start()
    reader = await hub.open(MINE, PLACE, 0)
    heard = list(await reader.read())
    while not reader.caught_up:
        heard += await reader.read()
    assert [offset for offset, _ in heard] == [0]
    await reader.close()
    await hub.close()


# --- of which the beginning is not where it is read from


class Told:
    """A hub on a log that tells of `MINE`, and a reader of what it reads."""

    def __init__(self) -> None:
        self.log = MemoryLog({"s": 1})
        self.hub = Hub(self.log, Terms())
        self.hub.start()

    async def tell(self, kind: type[Any], tenant: str = "acme", **fields: Any) -> int:
        """Append an event of the stream; returns its offset."""
        named = {"request": "mine", "tenant": tenant, "conversation": "c", "writer": "w", **fields}
        event = kind.model_validate({name: named[name] for name in named if name in kind.model_fields})
        [(_, offset)] = await self.log.append([codec.draft("s", "c", event)._replace(partition=0)])
        return offset

    async def say(self, seq: int) -> int:
        """Append a delta of the stream; returns its offset."""
        [(_, offset)] = await self.log.append([_delta("mine", seq)])
        return offset

    async def read(self, start: int) -> Reader:
        """A reader that begins at a place that was guessed."""
        return await self.hub.open(MINE, PLACE, start)

    async def heard(self, reader: Reader, until: int) -> list[int]:
        """What it hands out, up to the record at `until`."""
        heard = list[int]()
        async with asyncio.timeout(5):
            while until not in heard:
                heard += [offset for offset, _ in await reader.read()]
        return heard

    async def is_told_that_it_is_gone(self, reader: Reader) -> None:
        """Whatever it hands out before."""
        with pytest.raises(LogMoved):
            await self.heard(reader, -1)


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    told = Told()
    yield told
    await told.hub.close()


async def test_an_end_whose_opening_the_log_has_lost_says_so(told: Told) -> None:
    await told.tell(StreamAttempt, attempt=1, mode="restart")
    first = await told.say(0)
    await told.tell(StreamEnd, attempt=1, seq=1, status="completed")
    told.log.truncate_before(PLACE, first)
    await told.is_told_that_it_is_gone(await told.read(first))


async def test_an_end_that_comes_while_it_is_waited_for_says_so_too(told: Told) -> None:
    await told.tell(StreamAttempt, attempt=1, mode="restart")
    first = await told.say(0)
    told.log.truncate_before(PLACE, first)
    reader = await told.read(first)
    assert await told.heard(reader, first) == [first]
    waiting = asyncio.create_task(told.is_told_that_it_is_gone(reader))
    await told.tell(StreamEnd, attempt=1, seq=1, status="completed")
    await waiting


async def test_an_attempt_that_continues_what_the_log_has_lost_is_not_taken_for_the_whole(told: Told) -> None:
    await told.tell(StreamAttempt, attempt=1, mode="restart")
    await told.say(0)
    first = await told.tell(StreamAttempt, attempt=2, mode="continue")
    await told.tell(StreamEnd, attempt=2, status="completed")
    told.log.truncate_before(PLACE, first)
    reader = await told.read(first)
    assert await reader.find() == "c", "it is there, and can be cancelled"
    await told.is_told_that_it_is_gone(reader)


async def test_an_attempt_that_began_anew_is_whole_without_those_before_it(told: Told) -> None:
    await told.tell(StreamAttempt, attempt=1, mode="restart")
    first = await told.tell(StreamAttempt, attempt=2, mode="restart")
    end = await told.tell(StreamEnd, attempt=2, status="completed")
    told.log.truncate_before(PLACE, first)
    assert await told.heard(await told.read(first), end) == [first, end]


@pytest.mark.parametrize("mode", ["restart", "continue"])
@pytest.mark.parametrize("live", [False, True])
async def test_who_was_sent_to_too_late_a_place_reads_from_the_beginning_of_the_log(
    told: Told, mode: str, live: bool
) -> None:
    await told.log.append([_delta("other", 0)])
    opening = await told.tell(StreamAttempt, attempt=1, mode="restart")
    await told.say(0)
    late = await told.say(1)
    reader = await told.read(late)
    heard = await told.heard(reader, late) if live else []
    last = await told.tell(StreamAttempt, attempt=2, mode=mode)
    end = await told.tell(StreamEnd, attempt=2, status="completed")
    heard += await told.heard(reader, end)
    assert heard[-1] == end
    # An attempt that begins anew is whole, and nobody looks for what was before it.
    assert (opening in heard) == (mode == "continue")
    assert last in heard


async def test_an_id_that_is_used_again_after_its_first_stream_is_gone_is_read_from_its_own_beginning(
    told: Told,
) -> None:
    await told.tell(StreamAttempt, attempt=1, mode="restart")
    first = await told.tell(StreamEnd, attempt=1, status="completed")
    again = await told.tell(StreamAttempt, attempt=1, mode="restart")
    end = await told.tell(StreamEnd, attempt=1, status="completed")
    told.log.truncate_before(PLACE, first)
    assert await told.heard(await told.read(first), end) == [again, end]


async def test_a_cancel_of_what_the_log_has_lost_the_beginning_of_says_so(told: Told) -> None:
    await told.tell(StreamAttempt, attempt=1, mode="restart")
    first = await told.say(0)
    await told.tell(StreamCancel, by="test")
    await told.tell(StreamEnd, attempt=1, seq=1, status="cancelled")
    told.log.truncate_before(PLACE, first)
    await told.is_told_that_it_is_gone(await told.read(first))


async def test_a_cancel_before_anything_was_said_is_the_whole_stream(told: Told) -> None:
    cancel = await told.tell(StreamCancel, by="test")
    end = await told.tell(StreamEnd, attempt=0, status="cancelled")
    assert await told.heard(await told.read(0), end) == [cancel, end]


@pytest.mark.parametrize("lost", [False, True])
async def test_an_opening_that_came_too_late_for_a_cancel_is_no_beginning(told: Told, lost: bool) -> None:
    opening = await told.tell(StreamAttempt, attempt=1, mode="restart")
    await told.say(0)
    late = await told.tell(StreamAttempt, attempt=2, mode="continue")
    await told.tell(StreamCancel, by="test")
    await told.tell(StreamAttempt, attempt=3, mode="restart")
    end = await told.tell(StreamEnd, attempt=2, seq=1, status="cancelled")
    if lost:
        told.log.truncate_before(PLACE, late)
        await told.is_told_that_it_is_gone(await told.read(late))
    else:
        assert (await told.heard(await told.read(late), end))[0] == opening


async def test_who_resumes_is_never_sent_behind_what_it_has(told: Told) -> None:
    opening = await told.tell(StreamAttempt, attempt=1, mode="restart")
    has = await told.say(0)
    await told.tell(StreamAttempt, attempt=2, mode="restart")
    end = await told.tell(StreamEnd, attempt=2, status="completed")
    reader = await told.read(has + 1)
    await reader.begin_by(has)
    assert (await told.heard(reader, end))[0] == opening


async def test_what_has_no_opening_or_is_anothers_proves_nothing(told: Told) -> None:
    await told.say(0)
    told.log.truncate_before(PLACE, 1)
    reader = await told.read(1)
    await told.tell(StreamEnd, tenant="globex", attempt=3, status="completed")
    await told.tell(StreamRetract, from_seq=0)
    await told.log.append([_delta("other", 0)])
    end = await told.tell(StreamEnd, attempt=0, status="rejected")
    assert (await told.heard(reader, end))[-1] == end


async def test_a_stream_that_was_waited_for_from_its_beginning_on_has_one(told: Told) -> None:
    reader = await told.hub.open(MINE, PLACE)
    stray = await told.tell(StreamEnd, attempt=7, status="completed")
    opening = await told.tell(StreamAttempt, attempt=1, mode="restart")
    assert await told.heard(reader, opening) == [stray, opening]


async def test_who_looks_for_a_stream_goes_on_behind_what_retention_took_meanwhile(told: Told) -> None:
    await told.log.append([_delta("other", 0)])
    opening = await told.tell(StreamAttempt, attempt=1, mode="restart")
    there, nowhere = await told.read(0), await told.hub.open(Stream(MINE.tenant, RequestId("none")), PLACE, 0)
    told.log.truncate_before(PLACE, opening)
    assert await there.find() == "c"
    assert await told.heard(there, opening) == [opening]
    assert await nowhere.find() is None
