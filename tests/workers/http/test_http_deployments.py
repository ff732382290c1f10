"""Every answer says which deployment served it, and a client that does not care sees nothing of it."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.workers.http.conftest import chunk

from klatch_schemas.events import StreamError
from klatch_workers.http.door import Terms

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit, Kits, Teller

HI: Any = [{"role": "user", "content": "hi"}]
ROLE, WORD, FINISH = chunk({"role": "assistant"}), chunk({"content": "hello"}), chunk({}, finish="stop")


async def _azure(teller: "Teller") -> None:
    teller.deployment = "azure-east"
    await teller.open()
    await teller.raw(ROLE, WORD, FINISH)
    await teller.end(deployment="azure-east")


async def test_a_stream_names_it_in_a_header_and_leaves_every_chunk_alone(kit: "Kit") -> None:
    kit.stages.script = _azure
    asked = kit.client().chat.completions.with_raw_response
    answer = await asked.create(model="tiny", messages=HI, stream=True)
    assert answer.headers["x-klatch-deployment"] == "azure-east"
    assert "".join([said.choices[0].delta.content or "" async for said in answer.parse()]) == "hello"
    events = await (await kit.chat()).events()
    assert [event.data.encode() for event in events] == [ROLE, WORD, FINISH, b"[DONE]"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_resumed_stream_and_a_whole_answer_name_it_too(kit: "Kit", streamed: bool) -> None:
    kit.stages.script = _azure
    first = await kit.chat(stream=streamed)
    assert first.headers["x-klatch-deployment"] == "azure-east"
    events = sse_ids(await first.events()) if streamed else [None]
    path = f"/v1/streams/{first.headers['x-request-id']}"
    for last in events:
        resumed = await kit.call("GET", path, headers={"last-event-id": last} if last else {})
        assert resumed.headers["x-klatch-deployment"] == "azure-east"
        assert not any("klatch" in event.data for event in await resumed.events())


def sse_ids(events: list[Any]) -> list[str]:
    """The ids of these events."""
    return [event.id for event in events if event.id]


async def test_where_the_status_line_left_before_it_was_known_the_first_chunk_names_it(kits: "Kits") -> None:
    go = asyncio.Event()

    async def slow(teller: "Teller") -> None:
        await go.wait()
        await _azure(teller)

    async with kits.serving(Terms(hold_s=0.1, keepalive_s=0.1)) as kit:
        kit.stages.script = slow
        raw = await kit.chat()
        assert "x-klatch-deployment" not in raw.headers
        reading = kit.client().chat.completions.create(model="tiny", messages=HI, stream=True)
        stream = await reading
        go.set()
        first, *rest = [event.data.encode() for event in await raw.events()]
        assert first == ROLE[:-1] + b',"klatch":{"deployment":"azure-east"}}', "behind the model server's own bytes"
        assert rest == [WORD, FINISH, b"[DONE]"]
        chunks = [said async for said in stream]
    assert "".join(said.choices[0].delta.content or "" for said in chunks) == "hello"
    assert [(said.model_extra or {}).get("klatch") for said in chunks] == [{"deployment": "azure-east"}, None, None]


async def test_another_deployment_that_goes_on_is_named_by_its_first_chunk(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        teller.deployment = "azure-east"
        await teller.open()
        await teller.raw(ROLE)
        teller.deployment = "own"
        await teller.open(2, mode="continue")
        await teller.raw(WORD, FINISH)
        await teller.end(deployment="own")

    kit.stages.script = script
    live = await kit.chat()
    events = await live.events()
    # Whoever reads again reads all of it at once.
    again = await kit.call("GET", f"/v1/streams/{live.headers['x-request-id']}")
    for answer, said in ((live, events), (again, await again.events())):
        assert answer.headers["x-klatch-deployment"] == "azure-east"
        assert [event.json.get("klatch") for event in said[:3]] == [None, {"deployment": "own"}, None]


async def test_a_model_server_that_is_a_klatch_and_says_so_itself_is_not_spoken_over(kits: "Kits") -> None:
    theirs = json.dumps({**json.loads(ROLE), "klatch": {"deployment": "theirs"}}).encode()
    go = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await go.wait()
        teller.deployment = "other-klatch"
        await teller.open()
        await teller.raw(theirs, WORD, FINISH)
        await teller.end()

    async with kits.serving(Terms(hold_s=0.1, keepalive_s=0.1)) as kit:
        kit.stages.script = script
        answer = await kit.chat()
        go.set()
        assert next(event.data.encode() for event in await answer.events()) == theirs


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_error_names_the_deployment_that_failed(kit: "Kit", streamed: bool) -> None:
    async def script(teller: "Teller") -> None:
        teller.deployment = "azure-east"
        await teller.open()
        await teller.end("failed", StreamError(code="model_error", message="cut off"), deployment="azure-east")

    kit.stages.script = script
    answer = await kit.chat(stream=streamed)
    assert answer.headers["x-klatch-deployment"] == "azure-east"
    assert (await answer.json())["error"]["klatch"]["deployment"] == "azure-east"


async def test_an_answer_without_a_route_names_none(kit: "Kit") -> None:
    answer = await kit.chat()
    assert "x-klatch-deployment" not in answer.headers
    assert not any("klatch" in event.data for event in await answer.events())
