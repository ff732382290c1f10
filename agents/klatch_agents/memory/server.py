"""A vector index on a Qdrant server, by URL: for production, shared by any number of workers.

The collection is made when it is missing, with an index on every field that searches filter by; whoever comes second
finds it made. A collection for another embedding model or dimension is refused at the start, by a clear error.
"""

from collections.abc import Awaitable, Sequence
from typing import TypeVar, cast

import httpx
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from klatch_agents.embeddings.port import Vector
from klatch_agents.memory.port import (
    INDEXED,
    Forgotten,
    Hit,
    MemoryFailed,
    MemoryUnavailable,
    Point,
    Scope,
    hit_of,
    vector_name,
)

_Result = TypeVar("_Result")


class ServerIndex:
    """`VectorIndex` on one collection of a Qdrant server."""

    def __init__(self, client: AsyncQdrantClient, collection: str, model_id: str) -> None:
        self._client = client
        self._collection = collection
        self._model_id = model_id
        self._vector = vector_name(model_id)

    @classmethod
    async def open(
        cls,
        url: str,
        collection: str,
        model_id: str,
        dimension: int,
        *,
        api_key: str | None = None,
        timeout_s: int = 10,
    ) -> "ServerIndex":
        """Connects, makes the collection when it is missing; raises `MemoryFailed` when it is another model's."""
        # The client's own check of the server's version only warns, and asks in the constructor.
        client = AsyncQdrantClient(url=url, api_key=api_key, timeout=timeout_s, check_compatibility=False)
        try:
            await _named(url, _prepare(client, collection, model_id, dimension))
        except BaseException:
            await client.close()
            raise
        return cls(client, collection, model_id)

    async def upsert(self, points: Sequence[Point]) -> None:
        """Adds the points, applied when it returns; see `VectorIndex`."""
        if not points:
            return
        made = [
            models.PointStruct(
                id=str(point.memory.id),
                vector={self._vector: point.vector.tolist()},
                payload=point.memory.payload(self._model_id),
            )
            for point in points
        ]
        await self._call(self._client.upsert(self._collection, made, wait=True))

    async def search(self, vector: Vector, scope: Scope, limit: int) -> list[Hit]:
        """The nearest memories of the scope; see `VectorIndex`."""
        answer = await self._call(
            self._client.query_points(
                self._collection,
                query=vector.tolist(),
                using=self._vector,
                query_filter=_filter(scope),
                limit=limit,
                with_payload=True,
            )
        )
        return [hit_of(point.payload, point.score, scope) for point in answer.points]

    async def forget(self, what: Forgotten) -> None:
        """Deletes the memories of the scope or tenant; see `VectorIndex`."""
        selector = models.FilterSelector(filter=_filter(what))
        await self._call(self._client.delete(self._collection, selector, wait=True))

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _call(self, call: Awaitable[_Result]) -> _Result:
        return await _named(self._collection, call)


async def _named(where: str, call: Awaitable[_Result]) -> _Result:
    """What `call` answers; its failures under our names."""
    try:
        return await call
    except UnexpectedResponse as error:
        status = error.status_code or 0
        kind = MemoryUnavailable if status in {408, 429} or status >= 500 else MemoryFailed
        said = error.content[:300].decode("utf-8", "replace")
        raise kind(f"Qdrant ({where}) answered {status}: {said}") from error
    except (ResponseHandlingException, ApiException, httpx.HTTPError) as error:
        raise MemoryUnavailable(f"Qdrant ({where}) does not answer as it should: {error}: is it up?") from error


def _filter(what: Forgotten) -> models.Filter:
    return models.Filter(
        must=[
            models.FieldCondition(key=name, match=models.MatchValue(value=value))
            for name, value in what.fields().items()
        ]
    )


async def _prepare(client: AsyncQdrantClient, collection: str, model_id: str, dimension: int) -> None:
    if not await client.collection_exists(collection):
        await _create(client, collection, model_id, dimension)
    info = await client.get_collection(collection)
    vectors = info.config.params.vectors
    size = _size(vectors, vector_name(model_id))
    if size != dimension:
        raise MemoryFailed(
            f"the collection {collection!r} was made by another embedding model than {model_id} ({dimension} "
            "elements): use that model, or name another collection and let memory be rebuilt"
        )
    for name in INDEXED:
        if name not in info.payload_schema:
            await client.create_payload_index(collection, name, _keyword(name), wait=True)


async def _create(client: AsyncQdrantClient, collection: str, model_id: str, dimension: int) -> None:
    vector = models.VectorParams(size=dimension, distance=models.Distance.COSINE)
    try:
        await client.create_collection(collection, {vector_name(model_id): vector})
    except UnexpectedResponse as error:
        # Another worker was quicker: what it made is looked at next.
        if error.status_code not in {400, 409} or b"already exists" not in error.content:
            raise


def _size(vectors: object, name: str) -> int | None:
    """The dimension of the vector called `name`, if the collection has one."""
    if not isinstance(vectors, dict):
        return None
    found = cast("dict[str, object]", vectors).get(name)
    return found.size if isinstance(found, models.VectorParams) else None


def _keyword(name: str) -> models.KeywordIndexParams:
    # Qdrant stores a tenant's points side by side when it knows what a tenant is.
    return models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=name == "tenant")
