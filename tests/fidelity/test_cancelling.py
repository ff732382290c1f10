"""Clients that go away, servers that close, and what is given back: [40] to [44]."""

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
from tests.fidelity.conftest import finishes, is_cut, text_of, until_left
from tests.fidelity.wire import Script, Talk, finish, role, sends, whole, words

from klatch_schemas import codec
from klatch_schemas.events import Limits, QuotaLimitSet, StreamEnd, UsageSettled
from klatch_schemas.ids import Tenant

if TYPE_CHECKING:
    from tests.fidelity.conftest import Stack
    from tests.workers.http.conftest import Answer


async def waiting(_: Talk) -> None:
    """A model server that does not even send a status line."""


async def thinking(talk: Talk) -> None:
    """One that has said nothing yet."""
    talk.begin().send(role())


async def speaking(talk: Talk) -> None:
    """One in the middle of its reply."""
    talk.begin().send(role(), words("a", "b"))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("script", [waiting, thinking, speaking])
async def test_a_client_that_hangs_up_hangs_up_the_model_server(stack: "Stack", script: Script, stream: bool) -> None:
    """[40] Before the status line, before the first token, in the middle, and for a reply that is no stream."""
    model = stack.model(script)
    asking = asyncio.create_task(stack.door.chat(model=model, stream=stream))
    talk = await stack.wire.talk(model)
    if script is speaking and stream:  # before a word came there is nothing to read: it would wait for `hold_s`
        await (await asking).part()
    await hung_up(stack, asking)
    await until_left(talk)


async def hung_up(stack: "Stack", asking: "asyncio.Task[Answer]") -> None:
    """Close the client's connection, wherever its call is."""
    asking.cancel()
    await asyncio.wait([asking])
    for call in stack.door.calls:
        await call.close()


async def test_a_client_that_hangs_up_ends_the_tries(stack: "Stack") -> None:
    """[40] While klatch waits before it asks a failing model server again, or another one."""

    async def script(talk: Talk) -> None:
        talk.refuse(503, {"error": {"message": "busy"}}, {"retry-after-ms": "9000"})

    model = stack.model(script)
    asking = asyncio.create_task(stack.door.chat(model=model))
    await stack.wire.talk(model)
    await hung_up(stack, asking)
    [settled] = await stack.all_about(stack.asking_for(model), UsageSettled, 1)
    assert (settled.status, len(stack.wire.talks[model])) == ("cancelled", 1)


async def test_a_cancelled_request_gives_back_its_place_once(stack: "Stack") -> None:
    """[41] Of a tenant that may have one request at a time; and what was delivered is settled."""
    limited = QuotaLimitSet(tenant=Tenant("globex"), limits=Limits(concurrent_requests=1))
    await stack.log.append([codec.draft("chat.requests", "globex", limited)])
    answer = await stack.chat(speaking, tenant="globex")
    await answer.part()
    refused = await stack.chat(whole("no"), tenant="globex")
    assert refused.status == 429
    await answer.close()
    settled = await stack.told(answer, UsageSettled)
    assert (settled.status, settled.usage.completion_tokens) == ("cancelled", 2)
    again = await stack.chat(speaking, tenant="globex")
    assert again.status == 200
    still_one = await stack.chat(whole("no"), tenant="globex")
    assert still_one.status == 429, "a place given back twice would let two in"
    await again.close()
    await stack.told(again, UsageSettled)
    assert len(await stack.all_told(answer, UsageSettled, 1)) == 1
    unlimited = QuotaLimitSet(tenant=Tenant("globex"), limits=Limits())
    await stack.log.append([codec.draft("chat.requests", "globex", unlimited)])


async def test_a_client_that_reads_nothing_is_found_dead_and_holds_nothing_up(stack: "Stack") -> None:
    """[42] An open socket that nobody empties: no FIN ever comes. Others' tokens do not wait for it."""
    flood = role() + words("x" * 200_000)

    async def flooding(talk: Talk) -> None:
        talk.begin()
        while not talk.left.is_set():
            talk.send(flood)
            await asyncio.sleep(0.01)  # the pace of this model

    model = stack.model(flooding)
    answer = await stack.impatient.chat(model=model)
    answer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    answer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    assert text_of(await stack.stream(whole("meanwhile"))) == "meanwhile"
    async with asyncio.timeout(15):
        await (await stack.wire.talk(model)).left.wait()
    assert (await stack.told(answer, UsageSettled)).status == "cancelled"


async def test_a_half_read_reply_is_never_somebody_elses(stack: "Stack") -> None:
    """[43] The connection of a cancelled call is closed; that of a whole reply is used again."""
    answer = await stack.chat(speaking)
    await answer.part()
    await answer.close()
    await stack.told(answer, UsageSettled)
    before = len(stack.wire.connections)
    texts = [text_of(await stack.stream(whole(f"reply {number}"))) for number in range(5)]
    assert texts == [f"reply {number}" for number in range(5)]
    assert len(stack.wire.connections) - before <= 1


async def test_a_door_that_closes_lets_streams_finish_and_ends_the_rest_with_where_to_read_on(stack: "Stack") -> None:
    """[44] The stream itself goes on: another door has all of it."""
    go = asyncio.Event()

    async def script(talk: Talk) -> None:
        talk.begin().send(role(), words("before "))
        await go.wait()
        talk.send(words("after"), finish()).end()

    async with stack.another_door(drain_s=0.1) as closing:
        quick = await stack.chat(sends(whole("quick")), closing)
        slow = await stack.chat(script, closing)
        await slow.part()
    assert text_of(await quick.events()) == "quick"
    error = is_cut(await slow.events())
    go.set()
    resumed = await stack.door.call("GET", error["klatch"]["resume"])
    events = await resumed.events()
    assert (text_of(events), finishes(events)) == ("before after", [(0, "stop")])
    assert (await stack.told(slow, StreamEnd)).status == "completed"
