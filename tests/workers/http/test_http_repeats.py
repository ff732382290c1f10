"""A key that has named a request before, at doors that do not remember it: nobody waits for what does not come."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from tests.workers.generation.mortal import in_virtual_time

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, StreamAttempt, StreamCancel, Usage, UsageSettled
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Partition
from klatch_schemas.topics import HOUR_MS
from klatch_streams.memory_log import MemoryLog
from klatch_streams.seen import LONGEST_MS, MEMORY_MS
from klatch_workers.http.call import Call
from klatch_workers.http.door import Door, Terms
from klatch_workers.http.reader import Stream
from klatch_workers.http.recent import Place, Recent
from klatch_workers.http.repeats import doubt, turn
from klatch_workers.http.replies import Watch
from klatch_workers.http.runtime import Runtime

if TYPE_CHECKING:
    from tests.workers.http.conftest import Answer, Kit, Kits, Teller

KEY = {"Idempotency-Key": "k"}
SOON = Terms(doubt_s=0.05, hold_s=0.5)
LOOKS = Terms(doubt_s=0.05, hold_s=60)
"""Of a door that looks soon, and is given the time to find what there is."""


class Halves:
    """A script that says half of its reply, and the rest when it may."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, teller: "Teller") -> None:
        await teller.open()
        await teller.say("one ")
        await self.go.wait()
        await teller.say("two")
        await teller.end()


def later(go: asyncio.Event, text: str) -> Callable[["Teller"], Awaitable[None]]:
    """A script that says all of its reply, once it may."""

    async def script(teller: "Teller") -> None:
        await go.wait()
        await teller.open()
        await teller.say(text)
        await teller.end()

    return script


async def refused(answer: "Answer") -> tuple[int, str, str, str]:
    error = (await answer.json())["error"]
    return answer.status, error["code"], error["param"], error["klatch"]["resume"]


@pytest.mark.parametrize("partitions", [1, 4])
async def test_a_key_of_another_conversation_is_refused_by_name_at_every_door_and_misleads_nobody(
    kits: "Kits", partitions: int
) -> None:
    async with asyncio.timeout(60), kits.serving(partitions=partitions) as kit:
        kit.stages.script = Halves()
        first = await kit.chat(headers=KEY, klatch={"conversation": "c1"})
        said = await first.part()
        request = first.headers["x-request-id"]
        last = said.decode().split("id: ")[-1].split("\n")[0]
        async with kits.serving(beside=kit, terms=LOOKS) as other, kits.serving(beside=kit, terms=SOON) as soon:
            for door in (kit, other, other):
                again = await door.chat(headers=KEY, klatch={"conversation": "c2"})
                link = f"/v1/streams/{request}?conversation=c1"
                assert await refused(again) == (400, "invalid_request", "klatch.conversation", link)
                assert again.headers["x-should-retry"] == "false"
            ways = [
                await other.chat(headers=KEY, klatch={"conversation": "c1"}),
                await other.call("GET", f"/v1/streams/{request}?conversation=c2"),
                # There is nothing to tell yet: its status line leaves without.
                await soon.call("GET", f"/v1/streams/{request}", headers={"last-event-id": last}),
            ]
            assert (await other.call("DELETE", f"/v1/streams/{request}?conversation=c2")).status == 202
            [cancel] = kit.said(StreamCancel)
            assert cancel.conversation == "c1"
            texts = [await way.body() for way in ways]
            assert [b"one " in text for text in texts] == [True, True, False]


async def test_a_repeat_of_what_waits_for_its_turn_waits_with_it(kits: "Kits") -> None:
    go = asyncio.Event()
    async with asyncio.timeout(60), kits.serving(terms=SOON) as kit, kits.serving(beside=kit, terms=SOON) as other:
        kit.stages.script = later(go, "hi")
        asking = [asyncio.create_task(door.chat(headers=KEY)) for door in (kit, kit, other)]
        # Their status lines come once it was looked what their key has named before.
        answers = await asyncio.gather(*asking)
        go.set()
        assert [kit.text_of(await answer.events()) for answer in answers] == ["hi"] * 3
        # What was read is remembered, and not published again.
        assert kit.text_of(await (await kit.chat(headers=KEY)).events()) == "hi"
        assert len(kit.said(ChatRequested, "chat.requests")) == 3


async def answered_before(kits: "Kits", kit: "Kit", ago_ms: int) -> str:
    """A request under the key that was answered, and settled, so long ago."""
    kits.ago_ms = ago_ms
    first = await kit.chat(headers=KEY)
    await first.events()
    kits.ago_ms = 0
    request = first.headers["x-request-id"]
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    settled = UsageSettled(request=RequestId(request), tenant=Tenant("acme"), status="completed", usage=usage)
    await kit.log.append([codec.draft("chat.requests", "acme", settled)])
    return request


async def test_a_key_whose_stream_is_older_than_the_window_is_answered_from_the_log(kits: "Kits") -> None:
    async with asyncio.timeout(60), kits.serving(partitions=1) as kit:
        request = await answered_before(kits, kit, 3 * HOUR_MS)
        async with kits.serving(beside=kit, terms=Terms(doubt_s=0.05, idempotency_window_ms=HOUR_MS)) as other:
            again = await other.chat(headers=KEY)
            assert kit.text_of(await again.events()) == "Hello wörld"
            assert kit.text_of(await (await other.call("GET", f"/v1/streams/{request}")).events()) == "Hello wörld"


async def test_a_key_whose_stream_the_log_has_lost_is_told_so(kits: "Kits") -> None:
    async with asyncio.timeout(60), kits.serving(partitions=1) as kit:
        await answered_before(kits, kit, 3 * HOUR_MS)
        place = kit.log.records_of("chat.stream")[0]
        kit.log.truncate_before(place, (await kit.log.bounds(place))[1])
        async with kits.serving(beside=kit, terms=LOOKS) as other:
            again = await other.chat(headers=KEY)
            assert (again.status, again.headers["x-should-retry"]) == (410, "false")
            assert "another key" in (await again.json())["error"]["message"]


def a_call() -> Call:
    scope: dict[str, Any] = {"headers": [], "method": "POST"}
    call = Call(scope, asyncio.Queue[Any]().get, asyncio.Queue[Any]().put)
    call.place(Conversation("c"))
    return call


async def asked_twice_and_answered(log: MemoryLog, stream: Stream) -> None:
    """What stands in the log of a request that was sent again while it was answered."""
    named: dict[str, Any] = {
        "request": stream.request,
        "tenant": stream.tenant,
        "conversation": Conversation("c"),
    }
    asked = codec.draft("chat.requests", "acme", ChatRequested(**named, body={}))
    settled = UsageSettled(
        request=stream.request, tenant=stream.tenant, status="completed", usage=Usage(prompt_tokens=1)
    )
    opening = codec.draft("chat.stream", "c", StreamAttempt(**named, attempt=1, writer=Writer("w")))
    await log.append([asked, asked, opening, codec.draft("chat.requests", "acme", settled)])


async def test_what_the_hub_has_not_read_yet_is_not_told_as_lost() -> None:
    """Whoever obeyed paid for the reply a second time."""
    log = MemoryLog({"chat.requests": 1, "chat.stream": 1})
    runtime = Runtime(Door(log=log, keys={}, terms=Terms(doubt_s=0)))
    await runtime.start()
    stream = Stream(Tenant("acme"), RequestId("r"))
    reader = await runtime.open(stream, Partition("chat.stream", 0))
    await runtime.hub.close()  # as while a broker is away
    await asked_twice_and_answered(log, stream)
    doubting = asyncio.create_task(doubt(runtime, a_call(), stream, reader))
    # Nothing is to happen: it has looked by then, and twice at the hub.
    await asyncio.wait({doubting}, timeout=1.2)
    assert not doubting.done()
    runtime.hub.start()
    async with asyncio.timeout(30):
        await doubting
        assert [type(said) for _, said in await reader.read()] == [StreamAttempt]
    await reader.close()
    await runtime.close()


async def test_what_admission_may_have_forgotten_says_nothing_of_a_request_that_waits(kits: "Kits") -> None:
    """A key of more than a day ago was let in anew, and its first word took a while: it was told as lost."""
    go = asyncio.Event()
    async with asyncio.timeout(60), kits.serving(partitions=1) as kit:
        await answered_before(kits, kit, MEMORY_MS + HOUR_MS // 2)
        place = kit.log.records_of("chat.stream")[0]
        kit.log.truncate_before(place, (await kit.log.bounds(place))[1])
        kit.stages.tellers.clear()  # it is let in anew
        kit.stages.script = later(go, "today's")
        async with kits.serving(beside=kit, terms=SOON) as other:
            # Its status line comes once it was looked.
            again = await other.chat(headers=KEY)
            go.set()
            assert kit.text_of(await again.events()) == "today's"


@pytest.mark.parametrize("speaks", [True, False])
async def test_who_has_no_turn_to_look_is_not_kept_from_the_first_words_and_waits_on(speaks: bool) -> None:
    log = MemoryLog({"chat.requests": 1, "chat.stream": 1})
    runtime = Runtime(Door(log=log, keys={}, terms=Terms(doubt_s=0, hold_s=3600 if speaks else 0)))
    await runtime.start()
    await runtime.looking.acquire()
    call = a_call()
    stream = Stream(Tenant("acme"), RequestId("r"))
    reader = await runtime.open(stream, Partition("chat.stream", 0))
    doubting = asyncio.create_task(doubt(runtime, call, stream, reader))
    if speaks:
        await log.append([runtime.cancel_draft(stream, Conversation("c"), "enough")])
    async with asyncio.timeout(30):
        await doubting
    # Its client has waited meanwhile: a sign of life is not due any later.
    assert call.waits_since
    call.waits_since -= runtime.door.terms.hold_s + 1
    assert Watch(call, reader, runtime.door.terms, runtime.pulse).comment_due
    if speaks:
        assert [type(said) for _, said in await reader.read()] == [StreamCancel]
    await reader.close()
    await runtime.close()


def test_looks_pause_for_nine_times_as_long_as_they_took() -> None:
    async def two_looks() -> None:
        looking, loop = asyncio.Lock(), asyncio.get_running_loop()
        async with turn(looking):
            began = loop.time()
            await asyncio.sleep(2)  # a look; the clock is virtual
            over = loop.time()
        async with asyncio.timeout(30), turn(looking):
            assert loop.time() - over == pytest.approx(9 * (over - began), rel=0.01)

    in_virtual_time(two_looks())


async def test_a_key_is_looked_for_as_long_as_admission_may_know_it(kits: "Kits") -> None:
    async with asyncio.timeout(60), kits.serving(partitions=1) as kit:
        await answered_before(kits, kit, LONGEST_MS - HOUR_MS // 2)
        async with kits.serving(beside=kit) as other:
            assert kit.text_of(await (await other.chat(headers=KEY)).events()) == "Hello wörld"
        assert len(kit.said(ChatRequested, "chat.requests")) == 1


def test_a_door_does_not_remember_a_stream_for_longer_than_admission_its_key() -> None:
    recent, stream = Recent(), Stream(Tenant("acme"), RequestId("r"))
    place = Place(0, 7, 1_000, Conversation("c"))
    recent.put(stream, place)
    assert recent.under_key(stream, 1_000 + LONGEST_MS) == recent.get(stream) == place
    assert recent.under_key(stream, 1_001 + LONGEST_MS) is None
    assert recent.get(stream) is None


async def test_what_is_read_of_the_past_is_as_old_as_it_says() -> None:
    log = MemoryLog({"chat.requests": 1, "chat.stream": 1}, now_ms=lambda: 5)
    runtime = Runtime(Door(log=log, keys={}))
    await runtime.start()
    stream = Stream(Tenant("acme"), RequestId("r"))
    opening = StreamAttempt(
        request=stream.request, tenant=stream.tenant, conversation=Conversation("c"), attempt=1, writer=Writer("w")
    )
    await log.append([codec.draft("chat.stream", "c", opening)])
    reader = await runtime.open(stream, Partition("chat.stream", 0), 0)
    assert await reader.find() == "c"
    assert runtime.recent.get(stream) == Place(0, 0, 5, Conversation("c"))
    await reader.close()
    await runtime.close()
