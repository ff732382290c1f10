"""One behaviour suite that every vector index passes, the walls between people first."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klatch_agents.embeddings.port import Vector
from klatch_agents.memory.edge import EdgeIndex
from klatch_agents.memory.port import (
    Hit,
    Memory,
    MemoryFailed,
    MemoryUnavailable,
    Point,
    Scope,
    VectorIndex,
    WholeTenant,
    hit_of,
    vector_name,
)
from klatch_agents.memory.server import ServerIndex
from klatch_agents.testing.embedder import HashingEmbedder
from klatch_agents.testing.qdrant_server import QdrantDouble
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant

EMBEDDER = HashingEmbedder(64)
MODEL = EMBEDDER.model_id


@asynccontextmanager
async def qdrant_double(folder: Path) -> AsyncGenerator[str]:
    runner = web.AppRunner(QdrantDouble(folder).app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module", params=["edge", "server"])
async def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VectorIndex]:
    folder = tmp_path_factory.mktemp("vectors")
    opened: VectorIndex
    if request.param == "edge":
        opened = await EdgeIndex.open(folder / "memory", MODEL, 64)
        yield opened
        await opened.close()
        return
    async with qdrant_double(folder) as url:
        opened = await ServerIndex.open(url, "memory", MODEL, 64)
        yield opened
        await opened.close()


def memory(
    tenant: str, person: str | None, conversation: str = "c", request: str = "r", text: str = "tea", part: int = 0
) -> Memory:
    return Memory(
        tenant=Tenant(tenant),
        person=Person(person) if person is not None else None,
        conversation=Conversation(conversation),
        request=RequestId(request),
        role="user",
        part=part,
        text=text,
        at_ms=1_700_000_000_000,
    )


def scope(tenant: str, person: str | None, conversation: str | None = None) -> Scope:
    return Scope(
        Tenant(tenant),
        Person(person) if person is not None else None,
        Conversation(conversation) if conversation is not None else None,
    )


async def vector(text: str) -> Vector:
    (made,) = await EMBEDDER.embed([text])
    return made


async def store(index: VectorIndex, *memories: Memory) -> None:
    vectors = await EMBEDDER.embed([each.text for each in memories])
    await index.upsert([Point(*pair) for pair in zip(memories, vectors, strict=True)])


async def found(index: VectorIndex, where: Scope, text: str = "tea", limit: int = 100) -> list[Hit]:
    return await index.search(await vector(text), where, limit)


async def test_what_was_stored_is_found_whole_nearest_first(index: VectorIndex) -> None:
    near = memory("whole", "ann", request="r1", text="green tea with milk")
    far = memory("whole", "ann", request="r2", text="the train to Basel")
    await store(index, far, near)
    hits = await found(index, scope("whole", "ann"), "tea with milk")
    assert [hit.memory for hit in hits] == [near, far]
    assert hits[0].score > 0.7 > hits[1].score
    assert await found(index, scope("whole", "ann"), "tea with milk", limit=1) == hits[:1]


async def test_a_point_told_twice_is_kept_once_and_the_later_text_stands(index: VectorIndex) -> None:
    first = memory("twice", "ann", text="tea")
    later = memory("twice", "ann", text="coffee")
    await store(index, first)
    await store(index, first, later)
    assert [hit.memory.text for hit in await found(index, scope("twice", "ann"))] == ["coffee"]


async def test_a_conversation_narrows_a_person_and_nobody_is_kept_to_one(index: VectorIndex) -> None:
    mine, other = memory("narrow", "ann", "c1", "r1"), memory("narrow", "ann", "c2", "r2")
    nobody = memory("narrow", None, "c1", "r3")
    await store(index, mine, other, nobody)
    assert [hit.memory for hit in await found(index, scope("narrow", "ann", "c1"))] == [mine]
    assert [hit.memory for hit in await found(index, scope("narrow", None, "c1"))] == [nobody]
    assert await found(index, scope("narrow", None, "c2")) == []
    assert len(await found(index, scope("narrow", "ann"))) == 2


async def test_forgetting_a_person_leaves_everybody_else(index: VectorIndex) -> None:
    ann, bob, namesake = memory("f1", "ann"), memory("f1", "bob", request="r2"), memory("f2", "ann")
    await store(index, ann, bob, namesake)
    await index.forget(scope("f1", "ann"))
    assert await found(index, scope("f1", "ann")) == []
    assert [hit.memory for hit in await found(index, scope("f1", "bob"))] == [bob]
    assert [hit.memory for hit in await found(index, scope("f2", "ann"))] == [namesake]
    await index.forget(WholeTenant(Tenant("f1")))
    assert await found(index, scope("f1", "bob")) == []
    assert [hit.memory for hit in await found(index, scope("f2", "ann"))] == [namesake]


async def test_no_points_are_no_work(index: VectorIndex) -> None:
    await index.upsert([])


async def test_a_vector_of_another_length_is_an_error(index: VectorIndex) -> None:
    with pytest.raises(MemoryFailed, match="dim"):
        await index.upsert([Point(memory("bad", "ann"), np.ones(3, dtype=np.float32))])


async def test_calls_may_overlap(index: VectorIndex) -> None:
    memories = [memory("many", "ann", request=f"r{i}", text=f"tea {i}") for i in range(20)]
    await asyncio.gather(*(store(index, each) for each in memories))
    results = await asyncio.gather(*(found(index, scope("many", "ann")) for _ in range(5)))
    assert [len(hits) for hits in results] == [20] * 5


# Ids that might pass for one another: equal but for case, space, wildcards, separators, or Unicode form.
HOSTILE = st.sampled_from(
    ["a", "A", "a ", " a", "*", "%", "?", "a*", "null", "None", "0", "a.b", "a/b", 'a"', "\u00e9", "e\u0301", ".*"]
) | st.text(
    alphabet=st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=4
)  # fmt: skip
OWNER = st.tuples(HOSTILE, st.none() | HOSTILE, HOSTILE)
RUNS = count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(owners=st.lists(OWNER, min_size=2, max_size=6, unique=True), asking=st.data())
async def test_nobody_ever_recalls_what_is_anothers(
    index: VectorIndex, owners: list[tuple[str, str | None, str]], asking: st.DataObject
) -> None:
    run = f"run-{next(RUNS)}-"  # examples share the index: each has requests of its own
    memories = [
        memory(tenant, person, conversation, request=f"{run}{i}", text="the same words")
        for i, (tenant, person, conversation) in enumerate(owners)
    ]
    await store(index, *memories)
    tenant, person, conversation = asking.draw(st.sampled_from(owners) | OWNER)
    hits = await found(index, scope(tenant, person, conversation), "the same words", limit=10_000)
    recalled = {hit.memory for hit in hits if hit.memory.request.startswith(run)}
    assert recalled == {
        each for each in memories if (each.tenant, each.person, each.conversation) == (tenant, person, conversation)
    }
    if person is not None:
        of_person = await found(index, scope(tenant, person), "the same words", limit=10_000)
        assert {(hit.memory.tenant, hit.memory.person) for hit in of_person} <= {(tenant, person)}


@pytest.mark.parametrize(
    ("tenant", "person", "conversation"),
    [("", "ann", None), ("t", "", None), ("t", None, None), ("t", None, ""), ("t", "ann", "")],
)
def test_a_scope_that_would_be_wider_than_a_person_cannot_be_made(
    tenant: str, person: str | None, conversation: str | None
) -> None:
    with pytest.raises(ValueError, match="scope"):
        scope(tenant, person, conversation)


def test_an_answer_from_outside_the_scope_is_an_error_and_no_hit() -> None:
    payload = memory("t", "ann").payload(MODEL)
    assert hit_of(payload, 0.5, scope("t", "ann")).memory == memory("t", "ann")
    for other in (scope("t", "bob"), scope("u", "ann"), scope("t", "ann", "d"), scope("t", None, "c")):
        with pytest.raises(MemoryFailed, match="outside the scope"):
            hit_of(payload, 0.5, other)


def test_every_part_of_every_message_has_an_id_of_its_own() -> None:
    one = memory("t", "ann")
    others = [memory("u", "ann"), memory("t", "ann", request="s"), memory("t", "ann", part=1)]
    assert len({each.id for each in (one, *others)}) == 4
    assert memory("t", "ann", text="else", conversation="d").id == one.id


def test_models_with_like_names_have_vectors_of_their_own() -> None:
    assert len({vector_name(model) for model in ("a/b", "a-b", "a_b", "A/b")}) == 4


# --- the edge engine ---


async def test_an_edge_index_of_another_model_or_dimension_is_refused(tmp_path: Path) -> None:
    await (await EdgeIndex.open(tmp_path, MODEL, 64)).close()
    for model, dimension in (("another", 64), (MODEL, 32)):
        with pytest.raises(MemoryFailed, match="made by another embedding model than"):
            await EdgeIndex.open(tmp_path, model, dimension)


async def test_an_edge_index_that_is_open_already_is_refused(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path, MODEL, 64)
    with pytest.raises(MemoryFailed, match="another process has the vector index"):
        await EdgeIndex.open(tmp_path, MODEL, 64)
    await index.close()


async def test_an_edge_index_keeps_what_it_was_told_when_it_is_closed_and_opened(tmp_path: Path) -> None:
    for number in range(3):
        index = await EdgeIndex.open(tmp_path, MODEL, 64)
        assert len(await found(index, scope("t", "ann"))) == number
        await store(index, memory("t", "ann", request=f"r{number}"))
        await index.close()


CHILD = """
import asyncio, sys
from pathlib import Path
from klatch_agents.memory.edge import EdgeIndex
from klatch_agents.memory.port import Memory, Point, Scope
from klatch_agents.testing.embedder import HashingEmbedder

async def main():
    embedder = HashingEmbedder(64)
    index = await EdgeIndex.open(Path(sys.argv[1]), embedder.model_id, 64)
    await index.forget(Scope("t", "gone"))
    for number in range(1_000_000):
        memory = Memory("t", "ann", "c", f"r{number}", "user", 0, f"tea {number}", 0)
        (vector,) = await embedder.embed([memory.text])
        await index.upsert([Point(memory, vector)])
        print(number, flush=True)

asyncio.run(main())
"""


async def test_points_outlive_a_process_that_is_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    index = await EdgeIndex.open(tmp_path, MODEL, 64)
    await store(index, memory("t", "gone"))
    await index.close()
    told = 0
    for _ in range(3):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, str(tmp_path), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        for _ in range(200):
            told = max(told, int(await child.stdout.readline()) + 1)
        os.kill(child.pid, signal.SIGKILL)
        said, _ = await child.communicate()
        told = max(told, *(int(line) + 1 for line in said.split(b"\n")[:-1])) if said else told
        await child.wait()
        index = await EdgeIndex.open(tmp_path, MODEL, 64)
        kept = {hit.memory.request for hit in await found(index, scope("t", "ann"), limit=100_000)}
        assert {f"r{number}" for number in range(told)} <= kept
        assert await found(index, scope("t", "gone")) == []
        await index.close()


# --- the server ---


async def test_a_collection_of_another_model_or_dimension_is_refused(tmp_path: Path) -> None:
    async with qdrant_double(tmp_path) as url:
        await (await ServerIndex.open(url, "memory", MODEL, 64)).close()
        for model, dimension in (("another", 64), (MODEL, 32)):
            with pytest.raises(MemoryFailed, match="'memory' was made by another embedding model than"):
                await ServerIndex.open(url, "memory", model, dimension)


async def test_workers_that_start_together_share_one_collection(tmp_path: Path) -> None:
    async with qdrant_double(tmp_path) as url:
        indexes = await asyncio.gather(*(ServerIndex.open(url, "memory", MODEL, 64) for _ in range(4)))
        await store(indexes[0], memory("t", "ann"))
        for index in indexes:
            assert [hit.memory for hit in await found(index, scope("t", "ann"))] == [memory("t", "ann")]
            await index.close()


async def test_a_server_that_is_not_there_is_retriable(tmp_path: Path) -> None:
    async with qdrant_double(tmp_path) as url:
        index = await ServerIndex.open(url, "memory", MODEL, 64)
    with pytest.raises(MemoryUnavailable, match="is it up"):
        await found(index, scope("t", "ann"))
    await index.close()
    with pytest.raises(MemoryUnavailable):
        await ServerIndex.open(url, "memory", MODEL, 64)
