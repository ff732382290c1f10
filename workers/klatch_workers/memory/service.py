"""The memory worker over HTTP, for klatch's own processes: recall, and embeddings for the door.

Every answer but `/healthz` needs `Authorization: Bearer` with the internal key; tenants never come here. Bound to
loopback by default.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from klatch_agents.embeddings.port import Embedder
from klatch_agents.memory.port import Scope
from klatch_agents.memory.recall import Recall
from klatch_schemas.codec import dumps, explain, loads
from klatch_schemas.errors import InvalidRequest, KlatchError, Unauthorized
from klatch_workers.memory.words import EmbedAsked, RecallAsked

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(recall: Recall, embedder: Embedder, internal_key: str | None) -> web.Application:
    """The web application. Without a key it answers nobody."""

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "model": embedder.model_id})

    async def recalled(request: web.Request) -> web.Response:
        _authorize(request, internal_key)
        asked = _asked(RecallAsked, await request.read())
        scope = Scope(asked.tenant, asked.person, asked.conversation)
        found = await recall.recall(scope, asked.text, asked.most)
        return _json([{"id": one.id, "text": one.text, "score": one.score} for one in found])

    async def embedded(request: web.Request) -> web.Response:
        _authorize(request, internal_key)
        asked = _asked(EmbedAsked, await request.read())
        vectors = await embedder.embed(asked.texts)
        return _json({"model": embedder.model_id, "vectors": [vector.tolist() for vector in vectors]})

    served = web.Application(middlewares=[_errors], client_max_size=8 * 1024 * 1024)
    served.router.add_get("/healthz", health)
    served.router.add_post("/recall", recalled)
    served.router.add_post("/embed", embedded)
    return served


def _asked(form: type[Any], body: bytes) -> Any:
    try:
        return form.model_validate(loads(body))
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from error


def _authorize(request: web.Request, internal_key: str | None) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if not internal_key or scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), internal_key.encode()):
        raise Unauthorized("this is for klatch's own processes: set KLATCH_INTERNAL_KEY to the same in all of them")


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=dumps(value), content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except KlatchError as error:
        return _json({"error": {"code": error.code, "message": error.message}}, error.status)
