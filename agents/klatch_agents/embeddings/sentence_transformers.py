"""Any model of sentence-transformers, for those who have torch: the extra `klatch[sentence-transformers]`.

Loading takes ten seconds and a gigabyte; nothing is imported before. Texts past the model's length are cut by it.
"""
# pyright: basic
# sentence-transformers is an extra: where it is not installed, its types are not known.

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from klatch_agents.embeddings.port import EmbeddingFailed, Vector, clean, normalised


class SentenceTransformersEmbedder:
    """Embeds with a `SentenceTransformer`; calls are served one after the other by one thread of its own."""

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embed")
        self.model_id = name
        self.dimension: int = model.get_embedding_dimension()

    @classmethod
    async def load(cls, name: str, device: str | None = None) -> "SentenceTransformersEmbedder":
        """Loads the model `name` (a folder or a name on the hub); raises `EmbeddingFailed`."""
        return await asyncio.to_thread(cls._load, name, device)

    @classmethod
    def _load(cls, name: str, device: str | None) -> "SentenceTransformersEmbedder":
        try:
            from safetensors import SafetensorError  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - see above
            from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - see above
        except ImportError as error:
            raise EmbeddingFailed(
                "sentence-transformers is not installed: pip install 'klatch[sentence-transformers]'"
            ) from error
        try:
            return cls(SentenceTransformer(name, device=device), name)
        # Without a way to the hub it is a RuntimeError of the hub's closed client, or an OSError if told to be offline;
        # of a folder that holds no model it is a ValueError.
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EmbeddingFailed(f"sentence-transformers cannot load {name!r}: {error}") from error

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """One vector a text; see `Embedder`."""
        if not texts:
            return []
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, texts)

    def _embed(self, texts: Sequence[str]) -> list[Vector]:
        rows = self._model.encode(
            [clean(text) for text in texts],
            batch_size=8,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return normalised(np.asarray(rows, dtype=np.float32))

    async def close(self) -> None:
        """Waits for the call that runs, drops those that wait."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
