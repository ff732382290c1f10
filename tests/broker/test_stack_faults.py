"""SIGKILL of every process of a running stack, requests in flight: each is answered once, by one lineage of attempts.

`reply=unique` writes another text at each model call, so that text of two attempts in one reply is seen. What is
asserted is read back from the log and from readers of every kind.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import aiohttp
import psutil
import pytest

from klatch_schemas.client import Client, Stream
from klatch_schemas.errors import Superseded
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import partition_of
from klatch_schemas.topics import CHAT_STREAM

if TYPE_CHECKING:
    from tests.broker.conftest import Stack
    from tests.broker.story import Story

pytestmark = pytest.mark.broker

SLOW = "fake?reply=unique&tokens=40&rate=20"
"""Two seconds of text."""
SLOWER = "fake?reply=unique&tokens=40&rate=8"
"""Five."""
CUT = f"{SLOW}&fault=stall&fault_after=20&fails=1"
"""The same, but for the first call of a `user`: that one falls silent half way, and never ends by itself."""
HI: Any = [{"role": "user", "content": "hi"}]


async def data_of(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str]]:
    """Id and data of each event."""
    named = ""
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "id":
            named = value
        elif name == "data":
            yield named, value


def spoken(data: str) -> str:
    """What choice 0 says in an event."""
    if data == "[DONE]":
        return ""
    choices: list[Any] = json.loads(data).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


def told_once(story: "Story", status: str = "completed") -> str:
    """Check that the request ended once, was settled once, and is one turn; returns the text that counts."""
    [end] = story.ends
    assert end.status == status
    assert len(story.settlements) == 1
    text = story.said_by(end.attempt)
    assert [turn.reply[0]["content"] for turn in story.told] == [text]
    assert text.count("<<") == 40
    assert len({token.partition(":")[0] for token in text.split("<<")[1:]}) == 1
    return text


async def stream_of(stack: "Stack", request: str) -> Stream:
    """Where a request of HTTP, a conversation of its own, stands in the log."""
    count = await stack.log.partitions(stack.namespace.of(CHAT_STREAM))
    return Stream(
        Tenant("acme"), RequestId(request), Conversation(request), partition_of(request.encode(), count), start=0
    )


def pids_in_run_file(data: Path) -> dict[str, int]:
    """What commands beside `up` are told."""
    return dict(json.loads((data / "run.json").read_text())["pids"])


async def text_of(client: Client, stream: Stream) -> str:
    return "".join([shown.text async for shown in client.read(stream)])


async def test_generation_killed_in_mid_stream_leaves_every_reader_the_text_of_one_attempt(stack: "Stack") -> None:
    conversation = f"whole-{uuid4().hex}"
    whole = asyncio.create_task(stack.text(SLOW, conversation=conversation))
    async with stack.client() as client, stack.ask(CUT, user=uuid4().hex) as answer:
        reading = data_of(answer)
        await anext(reading)
        request = answer.headers["x-request-id"]
        over_kafka = client.read(await stream_of(stack, request))
        await anext(over_kafka)

        await stack.up.kill("generation")

        *_, last = [data async for _, data in reading]
        error = json.loads(last)["error"]
        assert error["code"] == "superseded"
        with pytest.raises(Superseded):
            _ = [shown async for shown in over_kafka]
        async with stack.session() as session, session.get(error["klatch"]["resume"]) as again:
            resumed = [data async for _, data in data_of(again)]
        late = await text_of(client, await stream_of(stack, request))
    text = told_once(await stack.story(request))
    assert resumed[-1] == "[DONE]"
    assert "".join(map(spoken, resumed)) == late == text
    assert (await whole).count("<<") == 40
    assert len([call for call in stack.upstream.calls if call.headers.get("x-request-id") == request]) == 2


async def test_generation_killed_again_while_it_restores_loses_nothing(stack: "Stack") -> None:
    async with stack.ask(CUT, user=uuid4().hex, on_disconnect="continue") as answer:
        request = answer.headers["x-request-id"]
        await anext(data_of(answer))
        log = stack.up.data / "logs" / "generation.log"
        at, before = log.stat().st_size, stack.up.pids["generation"]
        os.kill(before, signal.SIGKILL)
        await _until_said(log, at, '"runner.assigned"')
        killed = _generation(stack.up.process.pid)
        os.kill(killed, signal.SIGKILL)
    text = told_once(await stack.story(request))
    # It may have told of the one that was killed next, too, before it knew.
    await stack.up.until(lambda: stack.up.pids["generation"] not in {before, killed})
    async with stack.client() as client:
        assert await text_of(client, await stream_of(stack, request)) == text


def _generation(up: int) -> int:
    """The process that `up` started last for this stage: it has not told of it yet."""
    [pid] = [child.pid for child in psutil.Process(up).children() if "generation" in child.cmdline()]
    return pid


async def _until_said(log: Path, at: int, what: str) -> None:
    async with asyncio.timeout(60):
        while what not in log.read_text()[at:]:  # noqa: ASYNC110, ASYNC240 - a small file, which tells nobody
            await asyncio.sleep(0.002)  # the time between being assigned and being restored is short


async def test_every_other_stage_killed_with_requests_in_flight_loses_and_doubles_nothing(stack: "Stack") -> None:
    streams = list[Stream]()
    async with stack.client() as client:

        async def publish() -> None:
            for _ in range(3):
                asked = client.request({"model": SLOW, "messages": HI}, memory={"store": True}, person="petra")
                streams.append(await client.publish(asked))

        async with asyncio.TaskGroup() as killing:
            for stage in ("admission", "screening", "memory", "views"):
                await publish()
                killing.create_task(stack.up.kill(stage))
        await publish()
    for story in await stack.stories([stream.request for stream in streams]):
        told_once(story)
    assert pids_in_run_file(stack.up.data) == stack.up.pids


async def test_a_reader_of_a_killed_door_reads_on_at_the_next_with_exactly_the_rest(stack: "Stack") -> None:
    heard = list[tuple[str, str]]()
    async with stack.ask("fake?reply=unique&tokens=40&rate=4", on_disconnect="continue") as answer:
        request = answer.headers["x-request-id"]
        reading = data_of(answer)
        heard.append(await anext(reading))
        killing = asyncio.create_task(stack.up.kill("http"))
        with pytest.raises(aiohttp.ClientError):
            await _hear(reading, heard)
    await killing
    async with (
        stack.session() as session,
        session.get(f"/v1/streams/{request}", headers={"last-event-id": heard[-1][0]}) as again,
    ):
        rest = [data async for _, data in data_of(again)]
    assert rest[-1] == "[DONE]"
    text = told_once(await stack.story(request))
    assert "".join(spoken(data) for data in [*(data for _, data in heard), *rest]) == text


async def _hear(reading: AsyncIterator[tuple[str, str]], heard: list[tuple[str, str]]) -> None:
    async for event in reading:
        heard.append(event)  # noqa: PERF401 - what came before the error counts


async def test_the_broker_killed_is_started_again_and_nothing_acknowledged_is_lost(stack: "Stack") -> None:
    async with stack.client() as client:
        user = uuid4().hex
        asked = [client.request({"model": SLOWER, "messages": HI, "user": user}) for _ in range(4)]
        streams = await asyncio.gather(*map(client.publish, asked))
        # Started, not open: the first may have ended before the last begins.
        calls = stack.upstream.calls
        await stack.upstream.changed(lambda: sum(call.body.get("user") == user for call in calls) >= 4, 60)
        await stack.up.kill("broker")
        assert pids_in_run_file(stack.up.data) == stack.up.pids
    async with stack.client() as client:
        streams += [await client.publish(client.request({"model": SLOW, "messages": HI})) for _ in range(4)]
        for story in await stack.stories([stream.request for stream in streams]):
            told_once(story)
    assert (await stack.text(SLOW)).count("<<") == 40
