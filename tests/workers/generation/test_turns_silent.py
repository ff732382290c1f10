"""A log that does not give a conversation's turns: a reply waits for them, and never forgets what was said."""
# pyright: basic

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from tests.workers.generation.conftest import Generation
from tests.workers.generation.readings import text_of

from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_TURNS
from klatch_streams.log import LogError
from klatch_streams.memory_log import MemoryLog
from klatch_workers.generation.turns import TurnReader

MEMORY = {"recent": 5}


class TurnsAway:
    """A log in which some partitions of chat.turns have no leader: whoever reads them fails, or waits."""

    def __init__(self, log: Any, *numbers: int, fails: bool = True) -> None:
        self._log, self._fails = log, fails
        self.away = {Partition(CHAT_TURNS.name, number) for number in numbers}
        self.back = asyncio.Event()
        self.asked = asyncio.Semaphore(0)
        """Released by every read of what is away."""

    def answer(self) -> None:
        """They have leaders again."""
        self.away.clear()
        self.back.set()

    async def tail(self) -> Any:
        return _Tail(self, await self._log.tail())

    async def not_there(self) -> None:
        self.asked.release()
        if self._fails:
            raise LogError("the partition has no leader")
        await self.back.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


class _Tail:
    def __init__(self, log: TurnsAway, tail: Any) -> None:
        self._log, self._tail = log, tail
        self._followed = set[Partition]()

    def follow(self, partition: Partition, offset: int) -> None:
        self._followed.add(partition)
        self._tail.follow(partition, offset)

    def unfollow(self, partition: Partition) -> None:
        self._followed.discard(partition)
        self._tail.unfollow(partition)

    def position(self, partition: Partition) -> int | None:
        return cast("int | None", self._tail.position(partition))

    async def read(self, wait_ms: int) -> Sequence[Record]:
        if self._followed & self._log.away:
            await self._log.not_there()
        return cast("Sequence[Record]", await self._tail.read(wait_ms))

    async def close(self) -> None:
        await self._tail.close()


async def a_turn(generation: Generation, text: str, **envelope: Any) -> None:
    """A conversation's first turn, by a worker of which nothing is left at hand."""
    async with generation.worker():
        await generation.turn(await generation.admit(f"fake?text={text}", **envelope))


async def test_a_reply_waits_for_turns_that_the_log_does_not_give_and_has_them(generation: Generation) -> None:
    await a_turn(generation, "said before")
    away = TurnsAway(generation.log, 0, 1)
    generation.log = cast("Any", away)
    async with generation.worker(), asyncio.timeout(20):
        request = await generation.admit("fake?reply=echo-messages", memory=MEMORY)
        for _ in range(3):
            await away.asked.acquire()
        assert len(generation.upstream.calls) == 1, "nobody was asked without the conversation's turns"
        away.answer()
        ended = await generation.ended(request)
    assert ended.state.status == "completed"
    assert "said before" in text_of(ended.standing)


@pytest.mark.parametrize("fails", [True, False])
async def test_a_request_whose_turns_stay_away_fails_and_may_be_sent_again(generation: Generation, fails: bool) -> None:
    await a_turn(generation, "said before")
    generation.log = cast("Any", TurnsAway(generation.log, 0, 1, fails=fails))
    generation.verdict_patience_s = 0.3
    async with generation.worker():
        ended = await generation.ended(await generation.admit("fake?reply=echo-messages", memory=MEMORY))
    assert ended.end
    assert ended.end.error
    assert (ended.end.status, ended.end.error.code) == ("failed", "unavailable")
    assert ended.end.error.retry_after_ms
    assert len(generation.upstream.calls) == 1, "nobody was asked without the conversation's turns"


async def test_a_request_that_needs_no_turns_does_not_wait_for_them(generation: Generation) -> None:
    await a_turn(generation, "said before")
    generation.log = cast("Any", TurnsAway(generation.log, 0, 1))
    async with generation.worker():
        ended = await generation.ended(await generation.admit("fake?text=here"))
    assert ended.state.status == "completed"


async def test_a_partition_that_does_not_answer_keeps_nobody_from_the_turns_of_another(generation: Generation) -> None:
    # c1 and c4 are in different partitions.
    await a_turn(generation, "one", conversation="c1")
    await a_turn(generation, "four", conversation="c4")
    assert isinstance(generation.log, MemoryLog)
    turns = {record.key: record for record in generation.log.records(CHAT_TURNS.name)}
    one, four = turns[b"c1"], turns[b"c4"]
    away = TurnsAway(generation.log, one.partition.number, fails=False)
    reader = TurnReader(cast("Any", away))
    waiting = asyncio.create_task(reader.read(one.partition, one.offset))
    await away.asked.acquire()
    async with asyncio.timeout(10):
        assert (await reader.read(four.partition, four.offset)).conversation == "c4"
        assert not waiting.done()
        away.answer()
        assert (await waiting).conversation == "c1"
    await reader.close()
