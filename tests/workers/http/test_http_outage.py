"""A log that does not answer: the door refuses and says when to come again, keeps what it accepted, and goes on."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
from tests.workers.http.steady import steady

from klatch_schemas.errors import Unavailable
from klatch_schemas.events import ChatRequested, StreamCancel
from klatch_schemas.records import Draft, Partition
from klatch_streams.log import AppendFailed, RecordTooLarge, UnknownTopic
from klatch_streams.memory_log import MemoryLog
from klatch_workers.http.app import serve
from klatch_workers.http.door import Door, Terms
from klatch_workers.http.intake import Intake
from klatch_workers.http.runtime import TooManyPartitions

if TYPE_CHECKING:
    from tests.workers.http.conftest import Answer, Kit, Kits, Teller

BRIEF = Terms(append_timeout_s=0.3, hold_s=0.2, keepalive_s=0.2)


async def refused(answer: "Answer") -> None:
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["x-should-retry"] == "true"
    assert (await answer.json())["error"]["code"] == "unavailable"


async def text(kit: "Kit", answer: "Answer") -> str:
    assert answer.status == 200
    events = await answer.events()
    assert events[-1].data == "[DONE]"
    return kit.text_of(events)


@pytest.mark.parametrize(
    ("topics", "why"),
    [({}, UnknownTopic), ({"chat.stream": 4096, "chat.requests": 1}, TooManyPartitions)],
    ids=["no topics", "more partitions than a door can name"],
)
async def test_a_door_that_cannot_begin_says_why_to_who_may_try_again(
    topics: dict[str, int], why: type[Exception]
) -> None:
    with pytest.raises(why):
        await serve(Door(log=MemoryLog(topics), keys={}), asyncio.Event())


@pytest.mark.parametrize("followed", [True, False], ids=["a partition that is read", "one that must be asked for"])
@pytest.mark.parametrize("keyed", [True, False])
@steady
async def test_while_the_log_is_silent_requests_are_refused_and_none_stands(
    kits: "Kits", followed: bool, keyed: bool
) -> None:
    named: dict[str, Any] = {"klatch": {"conversation": "c"}}
    key = {"Idempotency-Key": "k"} if keyed else {}
    async with kits.serving(BRIEF) as kit:
        if followed:
            await text(kit, await kit.chat(**named))
        before = len(kit.said(ChatRequested, "chat.requests"))
        kit.log.fall_silent()
        for _ in range(2):
            await refused(await kit.chat(headers=key, **named))
        assert len(kit.said(ChatRequested, "chat.requests")) == before
        kit.log.answer()
        assert await text(kit, await kit.chat(headers=key, **named)) == "Hello wörld"


async def test_whoever_comes_while_somebody_tries_the_log_is_refused_at_once(kits: "Kits") -> None:
    entered, answers = asyncio.Event(), asyncio.Event()
    answers.set()

    async def held(drafts: Sequence[Draft]) -> None:
        if drafts[0].topic == "chat.requests":
            entered.set()
            await answers.wait()

    async with kits.serving(Terms(append_timeout_s=3600), appending=held) as kit:
        kit.log.fail_next_append(topic="chat.requests")
        await refused(await kit.chat())
        answers.clear()
        entered.clear()
        trying = asyncio.create_task(kit.chat())
        await entered.wait()
        # They would wait an hour as well.
        for _ in range(3):
            await refused(await kit.chat())
        answers.set()
        assert await text(kit, await trying) == "Hello wörld"
        assert await text(kit, await kit.chat()) == "Hello wörld"


async def test_a_door_that_ends_while_the_log_is_silent_refuses_whoever_waits_for_it(kits: "Kits") -> None:
    entered = asyncio.Event()

    async def silent(drafts: Sequence[Draft]) -> None:
        if drafts[0].topic == "chat.requests":
            entered.set()
            await asyncio.Event().wait()

    async with kits.serving(Terms(append_timeout_s=3600), appending=silent, drain_s=0.2) as kit:
        trying = asyncio.create_task(kit.chat())
        await entered.wait()
        kit.stop.set()
        await refused(await trying)


@steady
async def test_a_partition_that_is_silent_holds_up_nobody_in_another(kits: "Kits") -> None:
    down = asyncio.Event()

    async def without_leader(drafts: Sequence[Draft]) -> None:
        if drafts[0].topic == "chat.requests" and drafts[0].key == b"acme" and down.is_set():
            await asyncio.Event().wait()

    async with kits.serving(BRIEF, appending=without_leader) as kit:
        down.set()
        for _ in range(2):
            await refused(await kit.chat())
            assert await text(kit, await kit.chat(tenant="globex")) == "Hello wörld"
        down.clear()
        assert await text(kit, await kit.chat()) == "Hello wörld"


@steady
async def test_a_stream_whose_log_falls_silent_goes_on_when_it_answers_again(kits: "Kits") -> None:
    again = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("one ", "two ")
        await again.wait()
        await teller.say("three")
        await teller.end()

    async with kits.serving(BRIEF) as kit:
        kit.stages.script = script
        answer = await kit.chat()
        parts = aiter(answer.parts())
        body = b""
        while b"two" not in body:
            body += await anext(parts)
        kit.log.fall_silent()
        # A client hears that the line is alive, whatever the log does.
        while b"keep-alive" not in body:
            body += await anext(parts)
        kit.log.lose_patience()
        again.set()
        await refused(await kit.chat())
        kit.log.answer()
        async for part in parts:
            body += part
        assert body.count(b"two") == body.count(b"three") == body.count(b"[DONE]") == 1
        assert b'"error"' not in body


@steady
async def test_what_may_stand_is_no_success_and_is_found_under_its_key(kits: "Kits") -> None:
    async with kits.serving(BRIEF) as kit:
        kit.log.fail_next_append(stands=True, topic="chat.requests")
        key = {"Idempotency-Key": "k"}
        await refused(await kit.chat(headers=key))
        assert await text(kit, await kit.chat(headers=key)) == "Hello wörld"
        assert len({asked.request for asked in kit.said(ChatRequested, "chat.requests")}) == 1


@steady
async def test_a_client_that_leaves_while_the_log_is_silent_is_cancelled_or_given_up(kits: "Kits") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("on and on")

    async with kits.serving(BRIEF) as kit:
        kit.stages.script = script
        answer = await kit.chat()
        await answer.part()
        kit.log.fall_silent()
        await answer.close()
        kit.log.answer()
        assert (await kit.until_said(StreamCancel)).reason == "the client disconnected"


# --- the intake by itself

HERE, THERE = Partition("t", 0), Partition("t", 1)


def record(size: int, place: Partition = HERE) -> Draft:
    return Draft("t", b"k", b"x" * size, partition=place.number)


async def test_more_than_the_room_is_refused_while_the_log_is_silent_and_taken_afterwards() -> None:
    log = MemoryLog({"t": 2})
    intake = Intake(log, Terms(append_timeout_s=3600, intake_bytes=100))
    log.fall_silent()
    waiting = [asyncio.create_task(intake.append(record(45), HERE)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="too much"):
        await intake.append(record(20), HERE)
    log.answer()
    await asyncio.gather(*waiting)
    await intake.append(record(500), HERE)
    assert [len(one.value or b"") for one in log.records("t")] == [45, 45, 500]


@pytest.mark.parametrize("keyed", [True, False])
async def test_what_has_not_been_asked_of_the_log_yet_takes_room_too(kits: "Kits", keyed: bool) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 600}]}
    async with kits.serving(Terms(append_timeout_s=3600, intake_bytes=1_000)) as kit:
        kit.log.fall_silent()
        asking = [
            asyncio.create_task(
                kit.call(
                    "POST", "/v1/chat/completions", body, headers={"idempotency-key": f"k{number}"} if keyed else {}
                )
            )
            for number in range(4)
        ]
        async with asyncio.timeout(10):
            for done in itertools.islice(asyncio.as_completed(asking), 3):
                assert (await done).status == 503
            kit.log.answer()
            answers = await asyncio.gather(*asking)
        assert sorted(answer.status for answer in answers) == [200, 503, 503, 503]


async def test_one_place_at_a_time_is_tried_and_others_are_free() -> None:
    log = MemoryLog({"t": 2})
    intake = Intake(log, Terms(append_timeout_s=3600))
    log.fail_next_append()
    with pytest.raises(AppendFailed):
        await intake.append(record(1), HERE)
    log.fall_silent()
    trying = asyncio.create_task(intake.append(record(1), HERE))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await intake.append(record(1), HERE)
    other = asyncio.create_task(intake.append(record(1, THERE), THERE))
    await asyncio.sleep(0)
    assert not other.done()
    trying.cancel()
    await asyncio.wait([trying])
    # Whoever tried has left: the next one tries.
    again = asyncio.create_task(intake.append(record(1), HERE))
    await asyncio.sleep(0)
    assert not again.done()
    log.answer()
    await asyncio.gather(other, again)
    await intake.append(record(1), HERE)


async def test_a_request_that_is_too_large_says_nothing_about_the_log() -> None:
    log = MemoryLog({"t": 2}, max_record_bytes=100)
    intake = Intake(log, Terms())
    with pytest.raises(RecordTooLarge):
        await intake.append(record(200), HERE)
    log.fall_silent()
    waiting = [asyncio.create_task(intake.append(record(1), HERE)) for _ in range(2)]
    await asyncio.sleep(0)
    log.answer()
    await asyncio.gather(*waiting)
