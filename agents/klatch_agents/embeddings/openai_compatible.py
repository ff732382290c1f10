"""Embeddings of any server that speaks OpenAI's `/v1/embeddings`: vLLM, Ollama, OpenAI and many more.

One try a call and typed failures; retrying is the caller's, who knows how long it may wait. Texts longer than the
model takes are the server's business, which may refuse or cut them.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Literal

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from klatch_agents.embeddings.port import EmbeddingFailed, EmbeddingUnavailable, Vector, clean, normalised

# OpenAI takes 2048 texts a request, others far fewer.
_BATCH = 64


Encoding = Literal["base64", "float"]


class _Item(msgspec.Struct, frozen=True):
    index: int
    embedding: str | list[float]


class _Answer(msgspec.Struct, frozen=True):
    data: list[_Item]


_DECODER = msgspec.json.Decoder(_Answer)


class OpenAICompatibleEmbedder:
    """Asks `base_url` (ending in `/v1`) for vectors of `model`, which must have `dimension` elements."""

    def __init__(
        self,
        base_url: str,
        model: str,
        dimension: int,
        *,
        api_key: str | None = None,
        encoding: Encoding = "base64",
        timeout_s: float = 30.0,
    ) -> None:
        self.model_id = model
        self.dimension = dimension
        self._url = base_url.rstrip("/") + "/embeddings"
        self._encoding = encoding
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """One vector a text; see `Embedder`."""
        vectors: list[Vector] = []
        for start in range(0, len(texts), _BATCH):
            vectors += self._vectors(await self._ask(texts[start : start + _BATCH]), start, texts)
        return vectors

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, texts: Sequence[str]) -> bytes:
        # A space stands for the empty text, which OpenAI refuses.
        body = {
            "model": self.model_id,
            "input": [clean(text) or " " for text in texts],
            "encoding_format": self._encoding,
        }
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout)
        try:
            async with self._session.post(self._url, json=body) as answer:
                content = await answer.read()
                if answer.status != 200:
                    raise _refused(self._url, answer.status, content)
                return content
        except (TimeoutError, aiohttp.ClientError) as error:
            raise EmbeddingUnavailable(
                f"{self._url} does not answer ({type(error).__name__}): is the server up?"
            ) from error

    def _vectors(self, content: bytes, start: int, texts: Sequence[str]) -> list[Vector]:
        try:
            items = sorted(_DECODER.decode(content).data, key=lambda item: item.index)
            rows = [_row(item.embedding) for item in items]
        except (msgspec.DecodeError, binascii.Error, ValueError) as error:
            raise EmbeddingFailed(f"{self._url} does not answer as OpenAI does: {error}") from error
        expected = min(_BATCH, len(texts) - start)
        if [item.index for item in items] != list(range(expected)):
            raise EmbeddingFailed(f"{self._url} answered {len(items)} vectors for {expected} texts")
        if any(row.shape != (self.dimension,) for row in rows):
            raise EmbeddingFailed(
                f"{self.model_id} at {self._url} makes vectors of {rows[0].size} elements, "
                f"not {self.dimension}: set the embedding dimension to that"
            )
        return normalised(np.stack(rows))


def _row(embedding: str | list[float]) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    return np.asarray(embedding, dtype=np.float32)


def _refused(url: str, status: int, content: bytes) -> EmbeddingFailed:
    said = content[:300].decode("utf-8", "replace")
    later = status in {408, 409, 429} or status >= 500
    return (EmbeddingUnavailable if later else EmbeddingFailed)(f"{url} answered {status}: {said}")
