"""Large requests and replies: threads work on them, and the door's loop goes on with everybody else's stream."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from klatch_schemas.events import ChatRequested

if TYPE_CHECKING:
    from tests.workers.http.conftest import Answer, Kit, Teller

T = TypeVar("T")

TEXT = "ü" * 100_000
LARGE: Any = [{"role": "user", "content": TEXT}]
LONG = 3_000
"""Chunks of a reply that is long."""


class HeldThreads(ThreadPoolExecutor):
    """The event loop's threads: they take work, and begin a piece of it when they are let."""

    def __init__(self) -> None:
        super().__init__(max_workers=4)
        self._given = asyncio.Event()
        self._leave = threading.Semaphore(0)

    def submit(self, work: Callable[..., T], /, *args: Any, **more: Any) -> "Future[T]":
        """Take work, from the loop."""

        def when_let() -> T:
            self._leave.acquire()
            return work(*args, **more)

        self._given.set()
        return super().submit(when_let)

    async def were_given(self, task: "asyncio.Task[Any]") -> bool:
        """Whether a task gives them a piece of work, rather than come to its end without."""
        given = asyncio.create_task(self._given.wait())
        await asyncio.wait([given, task], return_when=asyncio.FIRST_COMPLETED)
        given.cancel()
        return self._given.is_set()

    def let(self, pieces: int = 1) -> None:
        """Let work be done."""
        self._given.clear()
        self._leave.release(pieces)


@pytest.fixture
async def threads() -> AsyncGenerator[HeldThreads]:
    held, loop = HeldThreads(), asyncio.get_running_loop()
    loop.set_default_executor(held)
    yield held
    held.let(1_000)
    loop.set_default_executor(ThreadPoolExecutor())
    held.shutdown()


class Beside:
    """Another's stream at the same door, which says a word whenever it is asked to."""

    def __init__(self, teller: "Teller", answer: "Answer") -> None:
        self._teller, self._answer = teller, answer

    async def passes(self, word: str) -> None:
        """A word passes, from the log to the client."""
        await self._teller.say(word)
        assert f'"{word}"'.encode() in await self._answer.part()


async def beside(kit: "Kit") -> Beside:
    """Open such a stream."""

    async def opens(teller: "Teller") -> None:
        await teller.open()
        await teller.say("first")

    usual, kit.stages.script = kit.stages.script, opens
    answer = await kit.chat(tenant="globex")
    assert b"first" in await answer.part()
    kit.stages.script = usual
    return Beside(kit.stages.tellers[-1], answer)


async def test_while_a_large_request_is_read_and_written_others_get_their_chunks_trap_48(
    kit: "Kit", threads: HeldThreads
) -> None:
    other = await beside(kit)
    asking = asyncio.create_task(kit.chat(messages=LARGE))
    for step in ("reading", "writing"):
        assert await threads.were_given(asking), "a step was given to no thread: it held up the loop"
        await other.passes(step)
        assert len(kit.said(ChatRequested, "chat.requests")) == 1, "it waits for its thread"
        threads.let()
    answer = await asking
    assert kit.text_of(await answer.events()) == "Hello wörld"
    [asked] = [said for said in kit.said(ChatRequested, "chat.requests") if said.tenant == "acme"]
    assert asked.body["messages"] == LARGE


async def test_while_a_long_reply_is_put_together_others_get_their_chunks(kit: "Kit", threads: HeldThreads) -> None:
    async def long(teller: "Teller") -> None:
        await teller.open()
        await teller.raw(*[teller.chunk(content="word ")] * LONG)
        await teller.end()

    other = await beside(kit)
    kit.stages.script = long
    asking = asyncio.create_task(kit.chat(stream=False))
    assert await threads.were_given(asking), "putting it together held up the loop"
    await other.passes("meanwhile")
    threads.let()
    reply = await (await asking).json()
    assert reply["choices"][0]["message"]["content"] == "word " * LONG
