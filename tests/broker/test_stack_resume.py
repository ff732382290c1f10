"""Resume over HTTP from every place of a stream, and the walls between two tenants."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import aiohttp
import pytest

from klatch_schemas.errors import KlatchError
from klatch_schemas.events import ChatBody, StreamCancel
from klatch_schemas.ids import Conversation, RequestId
from klatch_schemas.topics import CHAT_STREAM

if TYPE_CHECKING:
    from tests.broker.conftest import Stack

pytestmark = pytest.mark.broker

DONE = "[DONE]"


class Said(NamedTuple):
    """A server-sent event."""

    id: str
    data: str


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[Said]:
    named = ""
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "id":
            named = value
        elif name == "data":
            yield Said(named, value)
            named = ""


async def resumed(session: aiohttp.ClientSession, request: str, after: str | None) -> list[Said]:
    headers = {} if after is None else {"last-event-id": after}
    async with session.get(f"/v1/streams/{request}", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return [said async for said in events(answer)]


async def test_a_finished_stream_is_resumed_at_every_place_with_exactly_the_rest(stack: "Stack") -> None:
    async with stack.ask("fake?reply=unique&tokens=20&rate=400") as answer:
        whole = [said async for said in events(answer)]
        request = answer.headers["x-request-id"]
    assert whole[-1].data == DONE
    places = [said.id for said in whole if said.id]
    assert len(set(places)) == len(places) == 22
    async with stack.session() as session:
        assert await resumed(session, request, None) == whole
        rests = await asyncio.gather(*(resumed(session, request, place) for place in places))
    assert rests == [whole[whole.index(said) + 1 :] for said in whole if said.id]


async def test_a_live_stream_is_resumed_at_every_place_while_it_goes_on(stack: "Stack") -> None:
    whole, resuming = list[Said](), list[asyncio.Task[list[Said]]]()
    async with (
        stack.session() as session,
        stack.ask("fake?reply=unique&tokens=20&rate=20") as answer,
    ):
        request = answer.headers["x-request-id"]
        async for said in events(answer):
            whole.append(said)
            if said.id:
                resuming.append(asyncio.create_task(resumed(session, request, said.id)))
        rests = await asyncio.gather(*resuming)
    assert whole[-1].data == DONE
    assert rests == [whole[at + 1 :] for at in range(len(rests))]
    assert len(rests) == 22


async def test_a_stream_is_cancelled_by_its_own_tenant_for_every_reader(stack: "Stack") -> None:
    async with stack.session() as session, stack.ask("fake?tokens=2000&rate=20") as answer:
        reading = events(answer)
        await anext(reading)
        request = answer.headers["x-request-id"]
        async with session.delete(f"/v1/streams/{request}") as cancelled:
            assert cancelled.status == 202
        rest = [said async for said in reading]
    assert json.loads(rest[-1].data)["error"]["code"] == "cancelled"
    story = await stack.story(request)
    assert {end.status for end in story.ends} == {"cancelled"}
    assert len(story.settlements) == 1
    await stack.upstream.changed(lambda: all(call.outcome != "open" for call in stack.upstream.calls))


# --- two tenants


async def test_a_tenant_neither_reads_nor_cancels_anothers_stream(stack: "Stack") -> None:
    conversation = f"private-{uuid4().hex}"
    async with (
        stack.session("zeta") as zeta,
        stack.ask("fake?reply=unique&tokens=40&rate=20", conversation=conversation) as answer,
    ):
        reading = events(answer)
        first = await anext(reading)
        request = answer.headers["x-request-id"]
        path, named = f"/v1/streams/{request}", {"conversation": conversation}
        for headers in ({}, {"last-event-id": first.id}):
            async with zeta.get(path, params=named, headers=headers) as refused:
                assert refused.status == 404
                assert "<<" not in await refused.text()
        async with zeta.delete(path, params=named) as refused:
            assert refused.status == 404
        assert [said async for said in reading][-1].data == DONE


@pytest.mark.parametrize("when", ["before a word was said", "while it speaks"])
async def test_a_cancel_in_another_tenants_name_over_kafka_changes_nothing(stack: "Stack", when: str) -> None:
    async with stack.client("acme") as acme, stack.client("zeta") as zeta:
        body: ChatBody = {
            "model": "fake?reply=unique&tokens=20&rate=20",
            "messages": [{"role": "user", "content": "hi"}],
        }
        stream = await acme.publish(acme.request(body))
        cancel = stream._replace(tenant=zeta.request(body).tenant)
        if when == "before a word was said":
            await zeta.cancel(cancel)
        reading = acme.read(stream)
        texts = [(await anext(reading)).text]
        if when == "while it speaks":
            await zeta.cancel(cancel)
        texts += [shown.text async for shown in reading]
        assert len(list(filter(None, texts))) == 20
        async with asyncio.timeout(30):
            with pytest.raises(KlatchError, match="cancel"):
                _ = [shown async for shown in zeta.read(cancel)]
    await stack.until(CHAT_STREAM, lambda said: isinstance(said, StreamCancel) and said.tenant == "zeta")
    assert [end.status for end in (await stack.story(stream.request)).ends] == ["completed"]


async def test_the_same_conversation_and_person_of_two_tenants_have_two_pasts(stack: "Stack") -> None:
    shared = {"conversation": f"shared-{uuid4().hex}", "person": "petra", "memory": {"recent": 5, "recall": 5}}
    kept = {**shared, "memory": {"recent": 5, "store": True}}
    story = await _told(stack, "acme", "My secret is a blue elephant.", kept)
    mine = ""
    while "blue elephant" not in mine:  # the turn may be on its way into the index still
        asked = {**shared, "conversation": f"other-{uuid4().hex}"}
        mine = await stack.text("fake?reply=echo-messages", "What is my secret?", **asked)
    for conversation in (shared["conversation"], f"other-{uuid4().hex}"):
        asked = {**shared, "conversation": conversation}
        theirs = await stack.text("fake?reply=echo-messages", "What is my secret?", tenant="zeta", **asked)
        assert "elephant" not in theirs
    assert story


async def _told(stack: "Stack", tenant: str, text: str, klatch: Mapping[str, Any]) -> RequestId:
    async with stack.ask("fake?text=Noted.", text, tenant=tenant, stream=False, **klatch) as answer:
        assert answer.status == 200
        assert answer.headers["x-klatch-conversation"] == Conversation(str(klatch["conversation"]))
        return RequestId(answer.headers["x-request-id"])
