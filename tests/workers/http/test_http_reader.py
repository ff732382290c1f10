"""Laws of the reader: whatever its pace, its start and the size of its buffer, it hears every record once, in order."""

import asyncio
import random

import pytest

from klatch_schemas import codec
from klatch_schemas.errors import LogMoved, Unavailable
from klatch_schemas.ids import RequestId, Tenant
from klatch_schemas.records import Draft, Partition, Record
from klatch_streams.memory_log import MemoryLog
from klatch_workers.http.door import Terms
from klatch_workers.http.hub import Hub
from klatch_workers.http.reader import Stream

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
