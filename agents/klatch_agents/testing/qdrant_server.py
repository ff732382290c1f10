"""A small double of Qdrant's REST server: its endpoints that klatch uses, in front of Qdrant's own engine.

Answers in the shapes of Qdrant 1.16, with its statuses for what is missing, wrong or there already. Filters are
`must` with exact matches; anything else is refused, never ignored. The engine is called in the event loop: for tests.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import qdrant_edge as qdrant
from aiohttp import web

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Collection:
    def __init__(self, folder: Path, vectors: dict[str, Any]) -> None:
        self.vectors = vectors
        self.shard = qdrant.EdgeShard.create(
            str(folder),
            qdrant.EdgeConfig(
                vectors={
                    name: qdrant.EdgeVectorParams(size=vector["size"], distance=qdrant.Distance.Cosine)
                    for name, vector in vectors.items()
                }
            ),
        )

    def info(self) -> dict[str, Any]:
        """`CollectionInfo`, with the server's default configuration."""
        shard = self.shard.info()
        return {
            "status": "green",
            "optimizer_status": "ok",
            "indexed_vectors_count": shard.indexed_vectors_count,
            "points_count": shard.points_count,
            "segments_count": shard.segments_count,
            "config": {
                "params": {"vectors": self.vectors, "shard_number": 1, "replication_factor": 1},
                "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
                "optimizer_config": {
                    "deleted_threshold": 0.2,
                    "vacuum_min_vector_number": 1000,
                    "default_segment_number": 0,
                    "flush_interval_sec": 5,
                },
                "wal_config": {"wal_capacity_mb": 32, "wal_segments_ahead": 0},
            },
            "payload_schema": {
                name: {"data_type": "keyword", "points": index.points} for name, index in shard.payload_schema.items()
            },
        }


class QdrantDouble:
    """The server's state; `app()` serves it. Collections live in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._collections: dict[str, _Collection] = {}

    def app(self) -> web.Application:
        """The routes, as an application for `aiohttp.web.AppRunner`."""
        app = web.Application(middlewares=[_answered])
        one = "/collections/{name}"
        app.router.add_get(one + "/exists", self._exists)
        app.router.add_get(one, self._info)
        app.router.add_put(one, self._create)
        app.router.add_put(one + "/index", self._index)
        app.router.add_put(one + "/points", self._upsert)
        app.router.add_post(one + "/points/query", self._query)
        app.router.add_post(one + "/points/delete", self._delete)
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, _: web.Application) -> None:
        for collection in self._collections.values():
            collection.shard.close()

    async def _exists(self, request: web.Request) -> web.Response:
        return _result({"exists": request.match_info["name"] in self._collections})

    async def _info(self, request: web.Request) -> web.Response:
        return _result(self._collection(request).info())

    async def _create(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name in self._collections:
            raise _Refused(409, f"Wrong input: Collection `{name}` already exists!")
        folder = self._folder / name
        folder.mkdir(parents=True)
        self._collections[name] = _Collection(folder, (await request.json())["vectors"])
        return _result(True)

    async def _index(self, request: web.Request) -> web.Response:
        body = await request.json()
        schema = body["field_schema"]
        if (schema["type"] if isinstance(schema, dict) else schema) != "keyword":
            raise _Refused(400, "this double has keyword indexes only")
        keyword = qdrant.PayloadSchemaType.Keyword
        return self._updated(request, qdrant.UpdateOperation.create_field_index(body["field_name"], keyword))

    async def _upsert(self, request: web.Request) -> web.Response:
        points = [
            qdrant.Point(point["id"], point["vector"], point.get("payload"))
            for point in (await request.json())["points"]
        ]
        return self._updated(request, qdrant.UpdateOperation.upsert_points(points))

    async def _delete(self, request: web.Request) -> web.Response:
        chosen = _filter((await request.json())["filter"])
        return self._updated(request, qdrant.UpdateOperation.delete_points_by_filter(chosen))

    async def _query(self, request: web.Request) -> web.Response:
        body = await request.json()
        query = qdrant.QueryRequest(
            query=qdrant.Query.Nearest(body["query"]["nearest"], body["using"]),
            filter=_filter(body["filter"]) if body.get("filter") else None,
            limit=body["limit"],
            with_payload=body.get("with_payload", False),
        )
        found = _engine(lambda: self._collection(request).shard.query(query))
        points = [
            {"id": str(point.id), "version": point.version, "score": point.score, "payload": point.payload}
            for point in found
        ]
        return _result({"points": points})

    def _updated(self, request: web.Request, operation: qdrant.UpdateOperation) -> web.Response:
        _engine(lambda: self._collection(request).shard.update(operation))
        return _result({"operation_id": 0, "status": "completed"})

    def _collection(self, request: web.Request) -> _Collection:
        name = request.match_info["name"]
        if name not in self._collections:
            raise _Refused(404, f"Not found: Collection `{name}` doesn't exist!")
        return self._collections[name]


def _filter(body: dict[str, Any]) -> qdrant.Filter:
    if set(body) != {"must"}:
        raise _Refused(400, "this double knows filters of `must` only")
    conditions: list[Any] = []
    for condition in body["must"]:
        if set(condition) != {"key", "match"} or set(condition["match"]) != {"value"}:
            raise _Refused(400, "this double knows matches of one value only")
        match = qdrant.MatchValue(condition["match"]["value"])
        conditions.append(qdrant.FieldCondition(condition["key"], match=match))
    return qdrant.Filter(must=conditions)


def _engine(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(400, f"Wrong input: {error}") from error


@web.middleware
async def _answered(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _Refused as refused:
        return web.json_response({"status": {"error": str(refused)}, "time": 0.0}, status=refused.status)


def _result(result: object) -> web.Response:
    return web.json_response({"result": result, "status": "ok", "time": 0.0})
