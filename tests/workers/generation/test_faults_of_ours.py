"""A fault of klatch's own in bringing a request to its end: its readers are told, it is settled, and it is buried."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from tests.workers.generation.conftest import Generation
from tests.workers.generation.test_generation import text_of

from klatch_agents.gateway.port import Chunk, Finished, Gateway, ModelCall, ModelReply
from klatch_schemas.events import ChatRequested, StreamEnd, UsageSettled
from klatch_schemas.records import Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS, DEAD_LETTERS
from klatch_streams.memory_log import MemoryLog
from klatch_streams.redriving import redriven

Spoil = Callable[[Chunk], Chunk]
SPOILT = "fake?text=spoilt"


@dataclass
class Spoiled:
    """The reply of a model, with chunks that no server sent."""

    reply: ModelReply
    spoil: Spoil

    @property
    def deployment(self) -> str:
        return self.reply.deployment

    @property
    def upstream_request_id(self) -> str | None:
        return self.reply.upstream_request_id

    @property
    def finished(self) -> Finished | None:
        return self.reply.finished

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        async for chunks in self.reply:
            yield [self.spoil(chunk) for chunk in chunks]


@dataclass
class Spoiling:
    """A gateway that spoils the replies to `SPOILT`: what a bug of its own might do."""

    gateway: Gateway
    spoil: Spoil

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[Any]:
        async with self.gateway.stream(call) as reply:
            yield Spoiled(reply, self.spoil) if call.body["model"] == SPOILT else reply

    def continues(self, call: ModelCall) -> bool:
        return self.gateway.continues(call)

    async def close(self) -> None:
        await self.gateway.close()


def miscounted(chunk: Chunk) -> Chunk:
    """A count that `stream.end` cannot hold."""
    if chunk.usage is None:
        return chunk
    return msgspec.structs.replace(chunk, usage=msgspec.structs.replace(chunk.usage, completion_tokens=-1))


def too_wide(chunk: Chunk) -> Chunk:
    """A trailer that makes `stream.end` too large for the log."""
    return msgspec.structs.replace(chunk, raw=b'{"x":"%s"}' % (b"x" * 2_000_000)) if chunk.usage_only else chunk


def too_deep(chunk: Chunk) -> Chunk:
    """A delta of which no turn can be made."""
    said = b'{"choices":[{"index":0,"delta":%s7%s}]}' % (b'{"a":' * 400, b"}" * 400)
    return msgspec.structs.replace(chunk, raw=said) if chunk.speaks else chunk


async def told(generation: Generation, request: ChatRequested) -> tuple[list[str], int, int]:
    """How the request ended, as often as it did, and how many settlements and turns it has."""
    ends = [said for said in await generation.held(CHAT_STREAM) if isinstance(said, StreamEnd)]
    settled = [said for said in await generation.held(CHAT_REQUESTS) if isinstance(said, UsageSettled)]
    turns = await generation.held(CHAT_TURNS)
    return (
        [said.status for said in ends if said.request == request.request],
        sum(said.request == request.request for said in settled),
        sum(said.request == request.request for said in turns),
    )


def buried(generation: Generation) -> list[Record]:
    assert isinstance(generation.log, MemoryLog)
    return generation.log.records(DEAD_LETTERS.name)


def letters(generation: Generation) -> list[tuple[bytes | None, bytes | None]]:
    return [(letter.header("dead-stage"), letter.header("dead-reason")) for letter in buried(generation)]


@pytest.mark.parametrize(("spoil", "reason"), [(miscounted, b"failed"), (too_wide, b"too-large")])
async def test_a_request_whose_end_cannot_be_made_ends_plainly_is_settled_and_is_a_dead_letter(
    generation: Generation, spoil: Spoil, reason: bytes
) -> None:
    generation.between = lambda router: Spoiling(router, spoil)
    async with generation.worker():
        request = await generation.admit(SPOILT)
        ended = await generation.ended(request)
        settled = await generation.settled(request)
        # Its conversation goes on.
        after = await generation.admit("fake?text=fine")
        await generation.turn(after)
    assert ended.end
    assert ended.end.error
    assert (ended.state.status, ended.end.error.code) == ("failed", "internal")
    assert text_of(ended) == "spoilt"
    assert settled.status == "failed"
    assert settled.usage.estimated
    assert settled.usage.completion_tokens > 0
    assert letters(generation) == [(b"generation", reason)]
    assert await told(generation, request) == (["failed"], 1, 1)


async def test_a_reply_that_cannot_be_remembered_stands_and_is_settled(generation: Generation) -> None:
    generation.between = lambda router: Spoiling(router, too_deep)
    async with generation.worker():
        request = await generation.admit(SPOILT)
        assert (await generation.ended(request)).state.status == "completed"
        await generation.settled(request)
        await generation.turn(await generation.admit("fake?text=fine"))
    assert letters(generation) == [(b"generation", b"failed")]
    assert await told(generation, request) == (["completed"], 1, 0)


@pytest.mark.parametrize("spoil", [miscounted, too_deep])
async def test_a_redrive_gives_no_second_answer(generation: Generation, spoil: Spoil) -> None:
    generation.between = lambda router: Spoiling(router, spoil)
    async with generation.worker():
        request = await generation.admit(SPOILT)
        await generation.settled(request)
        await generation.turn(await generation.admit("fake?text=fine"))
    before = await told(generation, request)
    generation.between = lambda router: router
    [letter] = buried(generation)
    calls = len(generation.upstream.calls)
    async with generation.worker():
        await generation.log.append([redriven(letter, letter.value)])
        await generation.turn(await generation.admit("fake?text=fine"))
    assert len(generation.upstream.calls) == calls + 1
    assert (await told(generation, request))[0] == before[0]
