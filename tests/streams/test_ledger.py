"""A ledger is whole when it opens, follows its topic, and does not go stale in silence."""

import asyncio

import pytest

from klatch_schemas.events import PromptPublished, SkillRegistered
from klatch_schemas.records import Draft
from klatch_schemas.topics import PROMPTS, Namespace
from klatch_streams.ledger import Ledger, publish
from klatch_streams.log import LogError
from klatch_streams.memory_log import MemoryLog

HERE = Namespace.named("t")


def a_log() -> MemoryLog:
    return MemoryLog({HERE.of(PROMPTS): 1})


def prompt(version: int, name: str = "greet") -> PromptPublished:
    return PromptPublished(name=name, version=version, template="Hello {{ name }}")


async def opened(log: MemoryLog) -> Ledger[PromptPublished]:
    return await Ledger[PromptPublished].open(log, PROMPTS, HERE, of=PromptPublished)


async def test_it_holds_the_last_event_of_every_key_when_it_opens() -> None:
    log = a_log()
    for number in range(600):
        await publish(log, PROMPTS, f"k{number % 7}", prompt(number + 1), HERE)
    await publish(log, PROMPTS, "k3", None, HERE)
    async with await opened(log) as ledger:
        assert len(ledger) == 6
        assert ledger.get("k3") is None
        assert {one.version for one in ledger.values()} == {594, 595, 596, 597, 598, 600}


async def test_an_empty_ledger_opens() -> None:
    async with await opened(a_log()) as ledger:
        assert list(ledger.values()) == []


async def test_it_opens_after_compaction_left_gaps() -> None:
    log = a_log()
    for number in range(10):
        await publish(log, PROMPTS, "k", prompt(number + 1), HERE)
    log.compact(HERE.of(PROMPTS))
    async with await opened(log) as ledger:
        assert ledger.get("k") == prompt(10)


async def test_it_follows_changes_and_wakes_who_waits_for_them() -> None:
    log = a_log()
    async with await opened(log) as ledger:
        waiting = asyncio.create_task(ledger.changed())
        await publish(log, PROMPTS, "k", prompt(1), HERE)
        await asyncio.wait_for(waiting, 1)
        assert ledger.get("k") == prompt(1)
        waiting = asyncio.create_task(ledger.changed())
        await publish(log, PROMPTS, "k", None, HERE)
        await asyncio.wait_for(waiting, 1)
        assert ledger.get("k") is None


async def test_what_cannot_be_read_is_counted_and_skipped() -> None:
    log = a_log()
    topic = HERE.of(PROMPTS)
    skill = SkillRegistered(name="s", version=1, description="", parameters={})
    await log.append([Draft(topic, b"a", b"garbage"), Draft(topic, b"\xff", b"{}"), Draft(topic, None, b"[]")])
    await publish(log, PROMPTS, "b", skill, HERE)
    await publish(log, PROMPTS, "c", prompt(1), HERE)
    async with await opened(log) as ledger:
        assert ledger.unreadable == 4
        assert list(ledger.values()) == [prompt(1)]
        waiting = asyncio.create_task(ledger.changed())
        await log.append([Draft(topic, b"c", b"more garbage"), Draft(topic, b"d", None)])
        await asyncio.wait_for(waiting, 1)
        assert ledger.unreadable == 5
        assert ledger.get("c") == prompt(1)


async def test_a_reader_that_fails_is_told_by_failed() -> None:
    log = a_log()
    await publish(log, PROMPTS, "k", prompt(1), HERE)
    ledger = await opened(log)
    failing = asyncio.create_task(ledger.failed())
    await log.close()
    with pytest.raises(LogError, match="closed"):
        await asyncio.wait_for(failing, 1)
    assert ledger.get("k") == prompt(1)
    await ledger.close()


async def test_with_patience_it_outlasts_a_log_that_does_not_answer_and_misses_nothing() -> None:
    log = a_log()
    await publish(log, PROMPTS, "k", prompt(1), HERE)
    async with await Ledger[PromptPublished].open(log, PROMPTS, HERE, PromptPublished, patience_s=3600) as ledger:
        failing = asyncio.create_task(ledger.failed())
        log.fall_silent()
        await log.asked()
        log.lose_patience()
        assert ledger.get("k") == prompt(1)
        changed = asyncio.create_task(ledger.changed())
        log.answer()
        await publish(log, PROMPTS, "k", prompt(2), HERE)
        await asyncio.wait_for(changed, 10)
        assert ledger.get("k") == prompt(2)
        assert not failing.done()
    await asyncio.wait_for(failing, 10)


async def test_without_patience_it_has_failed() -> None:
    log = a_log()
    await publish(log, PROMPTS, "k", prompt(1), HERE)
    async with await opened(log) as ledger:
        log.fall_silent()
        await log.asked()
        log.lose_patience()
        with pytest.raises(LogError, match="no broker"):
            await asyncio.wait_for(ledger.failed(), 10)


async def test_failed_returns_when_the_ledger_is_closed() -> None:
    ledger = await opened(a_log())
    waiting = asyncio.create_task(ledger.failed())
    await asyncio.sleep(0)
    await ledger.close()
    await asyncio.wait_for(waiting, 1)


async def test_it_does_not_open_on_a_topic_that_is_not_there() -> None:
    with pytest.raises(LogError):
        await opened(MemoryLog({}))
