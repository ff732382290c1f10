"""Asks the memory worker: recall for generation, embeddings for the door.

Both fail fast and plainly; what a request does without them is its caller's affair.
"""

from collections.abc import Sequence
from typing import Any

import aiohttp

from klatch_schemas.codec import dumps, loads
from klatch_schemas.errors import InvalidRequest, Unavailable
from klatch_workers.generation.prepare import Memory, RecallFailed
from klatch_workers.memory.words import MOST_TEXTS


class MemoryClient:
    """A client of one memory worker; use it as `async with`."""

    def __init__(self, url: str, internal_key: str, patience_s: float = 30.0) -> None:
        self._url = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            headers={"authorization": f"Bearer {internal_key}"}, timeout=aiohttp.ClientTimeout(total=patience_s)
        )

    async def recall(self, tenant: str, person: str, text: str, most: int) -> Sequence[Memory]:
        """See `Recaller.recall`."""
        asked = {"tenant": tenant, "person": person, "text": text[:100_000], "most": most}
        try:
            found = await self._ask("/recall", asked)
        except Unavailable as error:
            raise RecallFailed(error.message) from error
        return [Memory(one["id"], one["text"]) for one in found]

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """One vector a text, in order. Raises Unavailable; InvalidRequest for more than MOST_TEXTS."""
        if len(texts) > MOST_TEXTS:
            # To a door's client, whose field has this name, and who would ask the same again if it were unavailable.
            raise InvalidRequest(f"input: at most {MOST_TEXTS:,} texts a request, not {len(texts):,}", param="input")
        vectors: list[list[float]] = (await self._ask("/embed", {"texts": texts}))["vectors"]
        return vectors

    async def close(self) -> None:
        """Give back connections."""
        await self._session.close()

    async def _ask(self, path: str, asked: object) -> Any:
        try:
            async with self._session.post(self._url + path, data=dumps(asked)) as response:
                answer = loads(await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"the memory worker at {self._url} does not answer: {error or type(error).__name__}"
            raise Unavailable(reason, retry_after_ms=1000) from error
        if response.status != 200:
            raise Unavailable(f"the memory worker says: {answer['error']['message']}", retry_after_ms=1000)
        return answer
