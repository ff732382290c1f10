"""A small real embedder and an OpenAI-compatible server in front of one, for tests that need meaning but no model.

`HashingEmbedder` is a hashed bag of words: every word of a text, lower-cased, adds 1 or -1 to one of the vector's
elements (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009). Texts that share words are
near each other, equal texts are equal; synonyms are strangers. Deterministic on every machine.
"""

import base64
import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from aiohttp import web

from klatch_agents.embeddings.port import Embedder, Vector, clean, normalised

_WORD = re.compile(r"\w+")


class HashingEmbedder:
    """Hashed bag of words, `dimension` elements."""

    def __init__(self, dimension: int = 256) -> None:
        self.dimension = dimension
        self.model_id = f"hashing-{dimension}"

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """One vector a text; see `Embedder`. A text without words is a vector of its own."""
        rows = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in _WORD.findall(clean(text).lower()) or [""]:
                code = crc32(word.encode())
                row[(code >> 1) % self.dimension] += 1 if code & 1 else -1
        return normalised(rows)

    async def close(self) -> None:
        """Nothing is held."""


def embeddings_app(embedder: Embedder, api_key: str | None = None) -> web.Application:
    """`POST /v1/embeddings` as OpenAI answers it, for the embedder's own model name."""

    async def embeddings(request: web.Request) -> web.Response:
        if api_key and request.headers.get("Authorization") != f"Bearer {api_key}":
            return _error(401, "Incorrect API key provided", "invalid_api_key")
        body: dict[str, Any] = await request.json()
        if body["model"] != embedder.model_id:
            return _error(404, f"The model {body['model']} does not exist", "model_not_found")
        texts: list[str] = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if not all(texts):
            return _error(400, "input cannot be an empty string", "invalid_request_error")
        encode = _base64 if body.get("encoding_format") == "base64" else _floats
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(await embedder.embed(texts))
        ]
        usage = {"prompt_tokens": sum(map(len, texts)), "total_tokens": sum(map(len, texts))}
        return web.json_response({"object": "list", "data": data, "model": embedder.model_id, "usage": usage})

    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    return app


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _floats(vector: Vector) -> list[float]:
    return [float(element) for element in vector]


def _error(status: int, message: str, code: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": code, "code": code}}, status=status)
