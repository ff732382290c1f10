"""The small endpoints: embeddings and models, as the ports answer them, and whether this door is alive and ready."""

import asyncio
import base64
import struct
from collections.abc import Mapping
from typing import Protocol

from klatch_schemas import codec
from klatch_schemas.errors import InvalidRequest, NotFound, Unavailable
from klatch_schemas.events import ModelRouted
from klatch_schemas.records import Partition
from klatch_workers.http.auth import tenant_of
from klatch_workers.http.call import Call
from klatch_workers.http.door import Embeddings, TextEmbedder
from klatch_workers.http.envelope import read_json
from klatch_workers.http.runtime import Runtime

_READY_WITHIN_S = 2.0


async def embeddings(runtime: Runtime, call: Call) -> None:
    """`POST /v1/embeddings`."""
    call.tenant = tenant_of(call.header(b"authorization"), runtime.door.keys)
    if runtime.door.embeddings is None:
        raise NotFound("this klatch serves no embeddings: start it with an embedding model")
    terms = runtime.door.terms
    body = await read_json(await call.body(terms.max_body_bytes), terms.off_loop_bytes)
    await call.answer(200, await runtime.door.embeddings.embed(body))


async def models(runtime: Runtime, call: Call) -> None:
    """`GET /v1/models`."""
    call.tenant = tenant_of(call.header(b"authorization"), runtime.door.keys)
    names = await runtime.door.models.models() if runtime.door.models else []
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "klatch"} for name in names]
    await call.answer(200, codec.dumps({"object": "list", "data": listed}))


async def healthy(_: Runtime, call: Call) -> None:
    """`GET /healthz`: the process answers."""
    await call.answer(200, b'{"status":"ok"}')


async def ready(runtime: Runtime, call: Call) -> None:
    """`GET /readyz`: the ledgers are complete and the log answers."""
    if not runtime.door.ready():
        raise Unavailable("the ledgers are still being read", retry_after_ms=1000)
    async with asyncio.timeout(_READY_WITHIN_S):
        # How many partitions there are may be remembered; where one ends must be asked.
        await runtime.door.log.bounds(Partition(runtime.request_topic, 0))
    await call.answer(200, b'{"status":"ready"}')


class TextEmbeddings:
    """`Embeddings` by a local model that turns texts into vectors."""

    def __init__(self, model: str, embed: TextEmbedder) -> None:
        self._model = model
        self._embed = embed

    async def embed(self, body: Mapping[str, object]) -> bytes:
        """See `Embeddings.embed`. Raises InvalidRequest."""
        texts = _texts(body.get("input"))
        # OpenAI's own client asks for base64 of little-endian floats unless told otherwise.
        encoded = body.get("encoding_format") == "base64"
        vectors = await self._embed(texts)
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if encoded else vector}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return codec.dumps({"object": "list", "model": self._model, "data": data, "usage": usage})


class Routes(Protocol):
    """The routes of model names."""

    def find(self, alias: str) -> ModelRouted | None:
        """The route of a model name."""
        ...


class RoutedEmbeddings:
    """`Embeddings` of the model that a request names, if it has a route; else of klatch's own, whatever it names."""

    def __init__(self, routes: Routes, routed: Embeddings, own: Embeddings | None) -> None:
        self._routes = routes
        self._routed = routed
        self._own = own

    async def embed(self, body: Mapping[str, object]) -> bytes:
        """See `Embeddings.embed`. Raises NotFound."""
        if self._routes.find(str(body.get("model") or "")):
            return await self._routed.embed(body)
        if self._own is None:
            raise NotFound("no route names this model, and this klatch has no embedding model of its own")
        return await self._own.embed(body)


def _texts(said: object) -> list[str]:
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):  # pyright: ignore[reportUnknownVariableType]
        raise InvalidRequest("input: a text, or a list of texts, none of them empty", param="input")
    return [str(text) for text in texts]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
