"""Streams read again: at every offset, by any door, by nobody else, and once for an `Idempotency-Key`."""

import asyncio
import itertools
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote
from uuid import UUID

import pytest

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, StreamCancel, StreamEnd
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft, Partition
from klatch_streams.memory_log import MemoryLog
from klatch_workers.http.door import Terms
from klatch_workers.http.hub import Hub
from klatch_workers.http.reader import Stream
from klatch_workers.http.request_ids import OWN_CONVERSATION, birth_of

if TYPE_CHECKING:
    from tests.workers.http.conftest import Answer, Kit, Kits, Teller


async def _resume(kit: "Kit", request: str, after: str | None, tenant: str = "acme") -> "Answer":
    headers = {"last-event-id": after} if after else {}
    return await kit.call("GET", f"/v1/streams/{request}", tenant=tenant, headers=headers)


def birth(request: str) -> int:
    born = birth_of(request)
    assert born
    return born.milliseconds


def cancels(kit: "Kit") -> list[StreamCancel]:
    said = [codec.decode(one.value) for one in kit.log.records("chat.stream")]
    return [one for one in said if isinstance(one, StreamCancel)]


async def _fifty_words(teller: "Teller") -> None:
    await teller.open(1, "zombie")
    await teller.say("void ", "void ")
    await teller.open(2)
    # Another conversation of the same partition speaks in between.
    for number in range(50):
        await teller.say(f"{number} ")
        await teller.log.append([_noise(teller)])
    await teller.end()


def _noise(teller: "Teller") -> Draft:
    value = codec.encode_delta(codec.delta_prefix("somebody-else", 1, "w"), 0, b'{"choices":[]}')
    return codec.delta_draft("chat.stream", b"k", teller.partition, value)


WHOLE = "".join(f"{number} " for number in range(50))


async def test_a_reader_that_resumes_at_any_event_assembles_the_same_text(kit: "Kit") -> None:
    kit.stages.script = _fifty_words
    await (await kit.chat(stream=False)).json()
    request = kit.stages.tellers[0].asked.request
    whole = await (await _resume(kit, request, None)).events()
    assert kit.text_of(whole) == WHOLE
    ids = [event.id for event in whole if event.id]
    assert len(set(ids)) == 50
    for at, after in enumerate(ids, 1):
        rest = await (await _resume(kit, request, after)).events()
        assert kit.text_of(whole[:at]) + kit.text_of(rest) == WHOLE
        assert [event.data for event in rest].count("[DONE]") == 1


async def test_a_reader_that_has_void_text_is_told_so_and_never_gets_spliced_text(kit: "Kit") -> None:
    kit.stages.script = _fifty_words
    await (await kit.chat(stream=False)).json()
    teller = kit.stages.tellers[0]
    for void in (1, 2):
        answer = await _resume(kit, teller.asked.request, f"{teller.partition}-{void}")
        assert answer.status == 409
        assert (await answer.json())["error"]["code"] == "superseded"


async def test_a_late_reader_of_a_long_stream_never_sees_text_that_was_taken_back_before_it_came(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open(1)
        await teller.raw(*(teller.chunk(content="void ") for _ in range(1_200)))
        await teller.open(2)
        await teller.say("whole")
        await teller.end()

    kit.stages.script = script
    request = (await kit.chat(stream=False)).headers["x-request-id"]
    assert kit.text_of(await (await _resume(kit, request, None)).events()) == "whole"


async def test_readers_that_resume_while_it_is_told_all_assemble_the_same_text(kit: "Kit") -> None:
    steps = [asyncio.Event() for _ in range(20)]

    async def script(teller: "Teller") -> None:
        await teller.open()
        for number, step in enumerate(steps):
            await teller.say(f"{number} ")
            await step.wait()
        await teller.end()

    kit.stages.script = script
    first = await kit.chat()
    request, readers = first.headers["x-request-id"], [first]
    for step in steps:
        readers.append(await _resume(kit, request, None))
        step.set()
    texts = {kit.text_of(await reader.events()) for reader in readers}
    assert texts == {"".join(f"{number} " for number in range(20))}


async def test_a_resumed_reader_gets_usage_when_it_asks(kit: "Kit") -> None:
    request = (await kit.chat(stream=False)).headers["x-request-id"]
    events = await (await kit.call("GET", f"/v1/streams/{request}?include_usage=true")).events()
    assert events[-2].json["usage"]["total_tokens"] == 10
    assert not any("usage" in event.data for event in await (await _resume(kit, request, None)).events())


@pytest.mark.parametrize("conversation", [None, "a conversation", "another"])
async def test_another_door_finds_a_stream_by_its_id_alone(kits: "Kits", kit: "Kit", conversation: str | None) -> None:
    klatch = {"conversation": conversation} if conversation else {}
    request = (await kit.chat(stream=False, klatch=klatch)).headers["x-request-id"]
    birth = birth_of(request)
    assert birth
    assert birth.partition == (kit.stages.tellers[0].partition if conversation else OWN_CONVERSATION)
    async with kits.serving(beside=kit) as other:
        answer = await _resume(other, request, None)
        assert answer.status == 200
        assert unquote(answer.headers["x-klatch-conversation"]) == (conversation or request)
        assert [event.data for event in await answer.events()][-1] == "[DONE]"


async def test_another_door_finds_a_stream_that_a_producer_named_and_one_that_has_not_begun(
    kits: "Kits", kit: "Kit"
) -> None:
    go = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await go.wait()
        await teller.open()
        await teller.say("x")
        await teller.end()

    kit.stages.script = script
    asking = asyncio.create_task(kit.chat(headers={"Idempotency-Key": "k"}, klatch={"conversation": "somewhere"}))
    request = (await kit.stages.first()).asked.request
    assert birth_of(request) is None
    async with kits.serving(beside=kit) as other:
        early = asyncio.create_task(_resume(other, request, None))
        cancelled = await other.call("DELETE", f"/v1/streams/{request}?conversation=nowhere")
        assert cancelled.status == 202
        assert kit.said(StreamCancel)[0].conversation == "somewhere"
        assert (await early).status == 409
    go.set()
    assert (await asking).status == 409


async def test_no_tenant_reads_or_cancels_anothers_stream(kits: "Kits", kit: "Kit") -> None:
    go = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("secret")
        await go.wait()
        await teller.end()

    kit.stages.script = script
    mine = await kit.chat(klatch={"conversation": "shared name"})
    assert b"secret" in await mine.part()
    request = mine.headers["x-request-id"]
    async with kits.serving(beside=kit) as other:
        for door, after in itertools.product((kit, other), (None, f"{kit.stages.tellers[0].partition}-0")):
            read = await _resume(door, request, after, tenant="globex")
            assert read.status == 404
            assert "secret" not in str(await read.json())
            path = f"/v1/streams/{request}?conversation=shared%20name"
            assert (await door.call("DELETE", path, tenant="globex")).status == 404
    assert kit.said(StreamCancel) == []
    go.set()
    assert [event.data for event in await mine.events()] == ["[DONE]"]


async def test_two_tenants_with_the_same_request_id_read_their_own_streams(kit: "Kit") -> None:

    for tenant in ("acme", "globex"):
        asked = ChatRequested(
            request=RequestId("same"),
            tenant=Tenant(tenant),
            conversation=Conversation("one"),
            body={"messages": []},
        )
        await kit.log.append([codec.draft("chat.requests", tenant, asked)])
        teller = kit.teller(asked)
        await teller.open(1, tenant)
        await teller.say(f"for {tenant}")
        await teller.end()
    for tenant in ("acme", "globex"):
        answer = await kit.call("GET", "/v1/streams/same?conversation=one", tenant=tenant)
        assert kit.text_of(await answer.events()) == f"for {tenant}"


@pytest.mark.parametrize("request_id", ["nobody", "0190a1b2-c3d4-7001-8000-000000000000", "%2e%2e", "a%20b"])
async def test_an_unknown_stream_is_not_found(kit: "Kit", request_id: str) -> None:
    for method in ("GET", "DELETE"):
        answer = await kit.call(method, f"/v1/streams/{request_id}")
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "not_found"


async def test_a_last_event_id_that_is_none_is_refused(kit: "Kit") -> None:
    answer = await _resume(kit, "x", "12")
    assert answer.status == 400
    assert (await answer.json())["error"]["param"] == "Last-Event-ID"


@pytest.mark.parametrize("last", ["another", "beyond", "9999-3"])
async def test_a_last_event_id_of_another_stream_is_refused(kit: "Kit", last: str) -> None:
    request = (await kit.chat(stream=False)).headers["x-request-id"]
    [number] = {teller.partition for teller in kit.stages.tellers}
    names = {"another": f"{(number + 1) % 4}-0", "beyond": f"{number}-999999"}
    answer = await _resume(kit, request, names.get(last, last))
    assert answer.status == 400
    assert (await answer.json())["error"]["param"] == "Last-Event-ID"


async def test_a_stream_that_runs_for_longer_than_keys_are_known_is_read_and_cancelled_at_any_door(
    kits: "Kits",
) -> None:
    terms, told, enough = Terms(idempotency_window_ms=1), asyncio.Event(), asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("one ")
        told.set()
        await enough.wait()
        await teller.end()

    async with kits.serving(terms=terms) as kit:
        kit.stages.script = script
        running = await kit.chat(klatch={"conversation": "c"})
        request = running.headers["x-request-id"]
        await told.wait()
        while time.time_ns() // 1_000_000 <= birth(request) + terms.idempotency_window_ms:  # noqa: ASYNC110 - a clock
            await asyncio.sleep(0)
        async with kits.serving(beside=kit, terms=terms) as other:
            cancelled = await other.call("DELETE", f"/v1/streams/{request}?reason=incident%207")
            assert cancelled.status == 202
            assert [said.reason for said in cancels(kit)] == ["incident 7"]
            enough.set()
            assert (await _resume(other, request, None)).status == 200


async def test_a_stream_named_by_a_clock_that_is_ahead_is_found(kit: "Kit") -> None:
    ahead = time.time_ns() // 1_000_000 + 120_000
    request = RequestId(str(UUID(int=ahead << 80 | 7 << 76 | 0x123 << 64 | 2 << 62 | 12_345)))
    asked = ChatRequested(request=request, tenant=Tenant("acme"), conversation=Conversation("c"), body={"messages": []})
    await kit.log.append([codec.draft("chat.requests", "acme", asked)])
    assert (await _resume(kit, request, None)).status == 200


@pytest.mark.parametrize("same_door", [True, False])
async def test_an_idempotency_key_asked_twice_gives_one_stream(kits: "Kits", kit: "Kit", same_door: bool) -> None:
    key = {"Idempotency-Key": "order 66"}
    first = await kit.chat(headers=key, klatch={"conversation": "c"})
    told = await first.events()
    async with kits.serving(beside=kit) as other:
        second = await (kit if same_door else other).chat(headers=key, klatch={"conversation": "c"})
        assert await second.events() == told
        assert second.headers["x-request-id"] == first.headers["x-request-id"]
        whole = await (kit if same_door else other).chat(headers=key, klatch={"conversation": "c"}, stream=False)
        assert (await whole.json())["choices"][0]["message"]["content"] == "Hello wörld"
    assert len(kit.said(ChatRequested, "chat.requests")) == 1
    assert len(kit.said(StreamEnd)) == 1


async def test_the_same_key_of_two_tenants_gives_two_streams(kit: "Kit") -> None:
    key = {"Idempotency-Key": "k"}
    ids = {(await kit.chat(tenant, headers=key)).headers["x-request-id"] for tenant in ("acme", "globex")}
    assert len(ids) == 2


async def test_a_client_that_lost_its_answer_asks_again_and_gets_the_same_stream(kit: "Kit") -> None:
    go = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("a")
        await go.wait()
        await teller.say("b")
        await teller.end()

    kit.stages.script = script
    first = await kit.chat(headers={"Idempotency-Key": "k"})
    await first.part()
    await first.close()
    second = await kit.chat(headers={"Idempotency-Key": "k"})
    go.set()
    assert kit.text_of(await second.events()) == "ab"
    assert kit.said(StreamCancel) == []


async def test_a_stream_that_retention_took_is_said_to_be_gone(kit: "Kit") -> None:
    request = (await kit.chat(stream=False)).headers["x-request-id"]
    teller = kit.stages.tellers[0]
    kit.log.truncate_before(kit.log.records_of("chat.stream")[teller.partition], 6)
    answer = await _resume(kit, request, None)
    assert answer.status == 410
    assert (await answer.json())["error"]["code"] == "log_moved"


async def test_a_door_that_knows_nothing_of_a_stream_says_that_its_beginning_is_gone(kits: "Kits", kit: "Kit") -> None:
    key = {"Idempotency-Key": "k"}
    request = (await kit.chat(stream=False, headers=key)).headers["x-request-id"]
    opening = kit.log.records_of("chat.stream")[kit.stages.tellers[0].partition]
    kit.log.truncate_before(opening, 2)
    async with asyncio.timeout(10), kits.serving(beside=kit) as other:
        again = await _resume(other, request, None)
        whole = await other.chat(stream=False, headers=key)
        for answer in (again, whole):
            assert (answer.status, (await answer.json())["error"]["code"]) == (410, "log_moved")


async def test_partitions_are_followed_while_somebody_waits_and_a_little_longer() -> None:

    loop = asyncio.get_running_loop()
    hub = Hub(MemoryLog({"s": 2}), Terms(linger_s=60))
    hub.start()
    reader = await hub.open(Stream(Tenant("t"), RequestId("r")), Partition("s", 1))
    hub.tick(loop.time() + 1000)
    assert hub.followed == [Partition("s", 1)]
    before = loop.time()
    await reader.close()
    hub.tick(before + 59)
    assert hub.followed == [Partition("s", 1)]
    hub.tick(loop.time() + 61)
    assert hub.followed == []
    await hub.close()
