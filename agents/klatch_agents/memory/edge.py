"""A vector index in this process: Qdrant's engine with its data in a folder, for one worker, without a server.

Every call runs in one thread of its own, for the engine is synchronous. Points survive SIGKILL once `upsert` has
returned. Searches are exact over what the scope leaves, a fraction of a millisecond; the engine's `optimize` (a graph
for searches across all points, which are not to be had here) holds the GIL for seconds and is never called.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import qdrant_edge as qdrant

from klatch_agents.embeddings.port import Vector
from klatch_agents.memory.port import (
    INDEXED,
    Forgotten,
    Hit,
    MemoryFailed,
    Point,
    Scope,
    hit_of,
    vector_name,
)

_Result = TypeVar("_Result")

# Points are in the engine's write-ahead log at once, which outlives the process; moving them to their segments costs a
# tenth of a second whatever their number, and keeps the log short and the next start quick.
_FLUSH_EVERY = 4_096


class EdgeIndex:
    """`VectorIndex` on a folder that one process at a time may open."""

    def __init__(self, shard: qdrant.EdgeShard, model_id: str, thread: ThreadPoolExecutor) -> None:
        self._shard = shard
        self._model_id = model_id
        self._vector = vector_name(model_id)
        self._thread = thread
        self._unflushed = 0

    @classmethod
    async def open(cls, folder: Path, model_id: str, dimension: int) -> "EdgeIndex":
        """Opens or makes the index in `folder`; raises `MemoryFailed` when it is another's or another model's."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vectors")
        try:
            shard = await _in(thread, lambda: _open(folder, model_id, dimension))
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(shard, model_id, thread)

    async def upsert(self, points: Sequence[Point]) -> None:
        """Adds the points; see `VectorIndex`."""
        if points:
            await _in(self._thread, lambda: self._upsert(points))

    async def search(self, vector: Vector, scope: Scope, limit: int) -> list[Hit]:
        """The nearest memories of the scope; see `VectorIndex`."""
        found = await _in(self._thread, lambda: self._search(vector, scope, limit))
        return [hit_of(point.payload, point.score, scope) for point in found]

    async def forget(self, what: Forgotten) -> None:
        """Deletes the memories of the scope or tenant; see `VectorIndex`."""
        await _in(self._thread, lambda: self._forget(what))

    async def close(self) -> None:
        """Writes what is left to disk and lets another process open the folder."""
        await _in(self._thread, self._shard.close)
        self._thread.shutdown(wait=False)

    def _upsert(self, points: Sequence[Point]) -> None:
        made = [
            qdrant.Point(
                str(point.memory.id),
                {self._vector: point.vector.tolist()},
                point.memory.payload(self._model_id),
            )
            for point in points
        ]
        self._shard.update(qdrant.UpdateOperation.upsert_points(made))
        self._unflushed += len(made)
        if self._unflushed >= _FLUSH_EVERY:
            self._flush()

    def _search(self, vector: Vector, scope: Scope, limit: int) -> list[qdrant.ScoredPoint]:
        nearest = qdrant.Query.Nearest(vector.tolist(), self._vector)
        return self._shard.query(
            qdrant.QueryRequest(query=nearest, filter=_filter(scope), limit=limit, with_payload=True)
        )

    def _forget(self, what: Forgotten) -> None:
        self._shard.update(qdrant.UpdateOperation.delete_points_by_filter(_filter(what)))
        self._flush()

    def _flush(self) -> None:
        self._shard.flush()
        self._unflushed = 0


async def _in(thread: ThreadPoolExecutor, call: Callable[[], _Result]) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(thread, _named, call)


def _named(call: Callable[[], _Result]) -> _Result:
    try:
        return call()
    except MemoryFailed:
        raise
    except Exception as error:
        # The engine raises nothing but plain `Exception`.
        raise MemoryFailed(f"the vector index failed: {error}") from error


def _filter(what: Forgotten) -> qdrant.Filter:
    return qdrant.Filter(
        must=[
            qdrant.FieldCondition(key=name, match=qdrant.MatchValue(value=value))
            for name, value in what.fields().items()
        ]
    )


def _open(folder: Path, model_id: str, dimension: int) -> qdrant.EdgeShard:
    # The configuration is written last, so a folder without it was never used: begin again there.
    if not (folder / "edge_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shard = qdrant.EdgeShard.create(str(folder), _configuration(model_id, dimension))
    else:
        shard = _load(folder, model_id, dimension)
    indexed = shard.info().payload_schema
    for name in INDEXED:
        if name not in indexed:
            keyword = qdrant.PayloadSchemaType.Keyword
            shard.update(qdrant.UpdateOperation.create_field_index(name, keyword))
    return shard


def _configuration(model_id: str, dimension: int) -> qdrant.EdgeConfig:
    vector = qdrant.EdgeVectorParams(size=dimension, distance=qdrant.Distance.Cosine)
    return qdrant.EdgeConfig(vectors={vector_name(model_id): vector})


def _load(folder: Path, model_id: str, dimension: int) -> qdrant.EdgeShard:
    try:
        return qdrant.EdgeShard.load(str(folder), _configuration(model_id, dimension))
    except Exception as error:
        said = str(error)
        if "WAL" in said and "WouldBlock" in said:
            raise MemoryFailed(
                f"another process has the vector index in {folder} open: stop it, use another folder, "
                "or a Qdrant server by URL"
            ) from error
        if "incompatible" in said.lower() or "vector" in said.lower():
            raise MemoryFailed(
                f"the vector index in {folder} was made by another embedding model than {model_id} "
                f"({dimension} elements): use that model, or name an empty folder and let memory be rebuilt"
            ) from error
        raise
