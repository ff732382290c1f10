"""The port behind which embedding models stand.

A vector is a float32 array of length 1, so that the dot product of two is their cosine. Vectors of different models
must never be compared: `model_id` tells them apart, and is stored with every vector.
"""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from klatch_schemas.errors import KlatchError

Vector: TypeAlias = NDArray[np.float32]
"""Shape `(dimension,)`, L2 norm 1."""


class EmbeddingFailed(KlatchError):
    """Texts could not be embedded, and will not be until somebody mends the set-up."""


class EmbeddingUnavailable(EmbeddingFailed):
    """Texts could not be embedded just now; the same may work later."""

    code, status, retriable = "unavailable", 503, True


class Embedder(Protocol):
    """Turns texts into vectors."""

    @property
    def model_id(self) -> str:
        """Names model and weights: the same id means comparable vectors."""
        ...

    @property
    def dimension(self) -> int:
        """The length of every vector."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """One vector a text, in order; any text will do, the empty one too. Raises `EmbeddingFailed`."""
        ...

    async def close(self) -> None:
        """Releases model or connections; the embedder is not used afterwards."""
        ...


def normalised(rows: NDArray[np.float32]) -> list[Vector]:
    """The rows of a matrix, each scaled to length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return list((rows / np.maximum(lengths, np.float32(1e-12))).astype(np.float32))


def clean(text: str) -> str:
    """`text` without lone surrogates, which no tokenizer and no JSON in UTF-8 can take."""
    return text.encode("utf-8", "replace").decode()
