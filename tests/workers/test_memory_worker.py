"""The memory worker: turns in, recall out, to klatch's own processes and to the right tenant and person only."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from klatch_agents.memory.edge import EdgeIndex
from klatch_agents.memory.recall import Recall
from klatch_agents.testing.embedder import HashingEmbedder
from klatch_schemas import codec
from klatch_schemas.errors import InvalidRequest, Unavailable
from klatch_schemas.events import TurnFinished, Usage
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_TURNS, DEAD_LETTERS, TOPICS, Namespace
from klatch_streams.memory_log import MemoryLog
from klatch_streams.runner import Runner, RunnerSettings
from klatch_workers.generation.prepare import RecallFailed
from klatch_workers.memory.client import MemoryClient
from klatch_workers.memory.service import application
from klatch_workers.memory.stage import MemoryStage


@dataclass
class Served:
    """A memory worker's two sides, and the log between."""

    log: MemoryLog
    url: str
    runner: Runner

    async def tell(self, turn: TurnFinished) -> None:
        await self.log.append([codec.draft(CHAT_TURNS.name, turn.conversation, turn)])

    async def taken(self, records: int) -> None:
        """Wait until the group has committed `records`."""
        while sum(p.committed or 0 for p in (await self.runner.health()).partitions) < records:
            await self.log.changed.wait(lambda: False, 20)


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[Served]:
    log = MemoryLog({topic.name: 1 for topic in TOPICS})
    embedder = HashingEmbedder()
    index = await EdgeIndex.open(tmp_path / "index", embedder.model_id, embedder.dimension)
    recall = Recall(embedder, index, threshold=0.1)
    serving = web.AppRunner(application(recall, embedder, "secret"))
    await serving.setup()
    site = web.TCPSite(serving, "127.0.0.1", 0)
    await site.start()
    stage = MemoryStage(log, Namespace(), recall)
    runner = Runner(log, stage, "klatch.memory", RunnerSettings(commit_s=0.02))
    running = asyncio.create_task(runner.run())
    await runner.ready.wait()
    yield Served(log, f"http://127.0.0.1:{serving.addresses[0][1]}", runner)
    runner.stop()
    with suppress(asyncio.CancelledError):
        await running
    await serving.cleanup()
    await index.close()


def turn(request: str, tenant: str, person: str, text: str, *, store: bool = True) -> TurnFinished:
    return TurnFinished(
        request=RequestId(request),
        tenant=Tenant(tenant),
        conversation=Conversation("c1"),
        person=Person(person),
        status="completed",
        messages=({"role": "user", "content": text},),
        reply=({"role": "assistant", "content": "noted"},),
        usage=Usage(),
        store=store,
        attempt=1,
        started_ms=1,
        finished_ms=2,
    )


async def test_a_person_is_reminded_of_what_they_said_and_of_nothing_that_others_said(memory: Served) -> None:
    await memory.tell(turn("r1", "acme", "ada", "my cat is called Turing"))
    await memory.tell(turn("r2", "acme", "bob", "my cat is called Lovelace"))
    await memory.tell(turn("r3", "other", "ada", "my cat is called Hopper"))
    await memory.tell(turn("r4", "acme", "ada", "my cat is called Secret", store=False))
    await memory.taken(4)
    client = MemoryClient(memory.url, "secret")
    recalled = await client.recall("acme", "ada", "what is my cat called", 5)
    await client.close()
    assert [one.text for one in recalled] == ["my cat is called Turing"]


async def test_a_turn_that_cannot_be_read_is_a_dead_letter_and_the_next_is_remembered(memory: Served) -> None:
    await memory.log.append([Draft(CHAT_TURNS.name, b"c1", b"\xff{", [])])
    await memory.tell(turn("r1", "acme", "ada", "I live in a lighthouse"))
    await memory.taken(2)
    client = MemoryClient(memory.url, "secret")
    assert await client.recall("acme", "ada", "I live in a lighthouse", 5)
    await client.close()
    assert [record.value for record in memory.log.records(DEAD_LETTERS.name)] == [b"\xff{"]


async def test_embeddings_are_answered_in_order(memory: Served) -> None:
    client = MemoryClient(memory.url, "secret")
    one, two = await client.embed(["lighthouse", "stamp"])
    assert one != two
    assert [one] == await client.embed(["lighthouse"])
    await client.close()


async def test_more_texts_than_one_request_may_have_are_the_callers_mistake(memory: Served) -> None:
    client = MemoryClient(memory.url, "secret")
    assert len(await client.embed(["stamp"] * 2_048)) == 2_048
    with pytest.raises(InvalidRequest, match=r"input: .* 2,048 .* 2,049") as refused:
        await client.embed(["stamp"] * 2_049)
    assert (refused.value.status, refused.value.param, refused.value.retriable) == (400, "input", False)
    await client.close()


async def test_nobody_without_the_internal_key_is_answered(memory: Served) -> None:
    client = MemoryClient(memory.url, "wrong")
    with pytest.raises(RecallFailed, match="KLATCH_INTERNAL_KEY"):
        await client.recall("acme", "ada", "cat", 1)
    await client.close()


async def test_a_memory_worker_that_is_away_is_said_to_be_away() -> None:
    client = MemoryClient("http://127.0.0.1:9", "secret")
    with pytest.raises(RecallFailed, match="does not answer"):
        await client.recall("acme", "ada", "cat", 1)
    with pytest.raises(Unavailable, match="does not answer"):
        await client.embed(["cat"])
    await client.close()
