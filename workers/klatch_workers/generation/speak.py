"""One attempt: opens it, streams the model's chunks into it as they come, and says how the model ended.

Chunks pass as the bytes they came in. The first that speaks leaves at once; the others share batches. Nothing is
retried here once a chunk is written: what follows then is a matter of the policy.
"""

import asyncio
import random

import structlog

from klatch_agents.gateway.errors import ModelError
from klatch_agents.gateway.port import Chunk, Finished, Gateway, ModelCall, Usage
from klatch_schemas import codec
from klatch_schemas.events import StreamAttempt
from klatch_schemas.records import Draft
from klatch_streams.batches import Batches, Written
from klatch_streams.log import RecordTooLarge

log = structlog.get_logger(__name__)

TRIES = 3
LONGEST_RETRY_AFTER_S = 10.0
WIDE_BYTES = 100_000
"""A chunk so wide may be too large for the log: nothing is written after it before it stands."""


class Attempt:
    """An attempt that this process opens; `opened` tells when the opening is durable."""

    def __init__(self, opening: StreamAttempt, batches: Batches, draft: Draft) -> None:
        self.opening = opening
        self._batches = batches
        self._draft = draft
        self.opened: Written = batches.write(draft, urgent=True)
        self.seq = 0
        """How many deltas were written."""
        self.trailer: list[bytes] = []
        self.finished: Finished | None = None
        self.counted: Usage | None = None
        """The model server's last count of tokens, of a reply that was cut off as well."""
        self.upstream_request: str | None = None
        self.first_token_at: float | None = None
        """Event loop time of the first chunk that spoke."""

    async def stream(self, gateway: Gateway, call: ModelCall) -> None:
        """Stream the model's answer. Raises ModelError, LogError; RecordTooLarge for a chunk, which is left out."""
        for left in reversed(range(TRIES)):
            try:
                await self._stream(gateway, call)
                break
            except ModelError as error:
                if not left or not error.retriable or self.seq:
                    raise
                wait = _wait(error, TRIES - left)
                log.info("model.retried", request=self.opening.request, code=error.code, wait_s=round(wait, 2))
                await asyncio.sleep(wait)

    async def _stream(self, gateway: Gateway, call: ModelCall) -> None:
        opening = self.opening
        prefix = codec.delta_prefix(opening.request, opening.attempt, opening.writer)
        async with gateway.stream(call) as reply:
            self.upstream_request = reply.upstream_request_id
            async for chunks in reply:
                for chunk in chunks:
                    if chunk.usage is not None:
                        self.counted = chunk.usage
                    if chunk.usage_only:
                        self.trailer.append(chunk.raw)
                    else:
                        written = self._write(prefix, chunk)
                        if len(chunk.raw) > WIDE_BYTES:
                            await self._stands(written)
            self.finished = reply.finished

    async def _stands(self, written: Written) -> None:
        try:
            await written.durable()
        except RecordTooLarge:
            self.seq -= 1
            raise

    def _write(self, prefix: bytes, chunk: Chunk) -> Written:
        first = chunk.speaks and self.first_token_at is None
        if first:
            self.first_token_at = asyncio.get_running_loop().time()
        topic, key, partition = self._draft.topic, self._draft.key, self._draft.partition
        value = codec.encode_delta(prefix, self.seq, chunk.raw)
        written = self._batches.write(codec.delta_draft(topic, key, partition, value), urgent=first)
        self.seq += 1
        return written


def _wait(error: ModelError, tries: int) -> float:
    if error.retry_after is not None:
        return min(error.retry_after, LONGEST_RETRY_AFTER_S)
    jitter = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
    return jitter * 0.2 * float(2**tries)
