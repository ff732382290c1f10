"""A Kafka that stops answering for a while, on a running stack: what is refused, and what is kept."""

import asyncio
import json
import os
import re
import signal
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly

if TYPE_CHECKING:
    from tests.broker.conftest import Stack

pytestmark = pytest.mark.broker

TOKENS = 60


async def first_event(answer: aiohttp.ClientResponse) -> str:
    assert answer.status == 200
    async for line in answer.content:
        if line.startswith(b"data: "):
            return str(answer.headers["x-request-id"])
    raise AssertionError("the stream ended before it began")


async def refusal(stack: "Stack") -> tuple[int, str | None, str]:
    """What a client is told that asks while nothing can be accepted."""
    async with stack.ask("fake?text=refused") as answer:
        error = json.loads(await answer.text())["error"]
        return answer.status, answer.headers.get("retry-after"), error["code"]


def text_of(assembly: Assembly) -> str:
    chunks: list[Any] = [codec.loads(bytes(said.chunk)) for said in assembly.standing]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def test_while_kafka_is_silent_requests_are_refused_and_every_accepted_one_ends_once_and_whole(
    stack: "Stack",
) -> None:
    async with AsyncExitStack() as asking:
        answers = [
            await asking.enter_async_context(stack.ask(f"fake?reply=unique&tokens={TOKENS}&rate=10")) for _ in range(4)
        ]
        accepted = [await first_event(answer) for answer in answers]
        pid = stack.up.pids["broker"]
        os.kill(pid, signal.SIGSTOP)
        try:
            told = await asyncio.gather(*(refusal(stack) for _ in range(3)))
            began = time.monotonic()
            told += [await refusal(stack) for _ in range(2)]
        finally:
            os.kill(pid, signal.SIGCONT)
        assert told == [(503, "1", "unavailable")] * 5
        # The last two: the first of them tries the log, as long as a door has patience; nobody waits longer.
        assert time.monotonic() - began < 40
        said = [await answer.text() for answer in answers]
    for story in await stack.stories(accepted):
        assembly = Assembly()
        for record, event in story.stream:
            assembly.hear(record.offset, event)
        assert assembly.state.status == "completed"
        tokens = re.findall(r"<<(\w+):(\d+)>>", text_of(assembly))
        assert [int(number) for _, number in tokens] == list(range(TOKENS))
        assert len({call for call, _ in tokens}) == 1
        assert len(story.settlements) == len(story.told) == 1
    # A stream is told whole, or that a newer attempt took its text back; never anything else.
    for one in said:
        assert one.rstrip().endswith("data: [DONE]") or '"code":"superseded"' in one
    async with asyncio.timeout(60):
        assert await stack.text("fake?text=again") == "again"
