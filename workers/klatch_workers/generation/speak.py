"""One attempt: opens it, streams the model's chunks into it as they come, and says how the model ended.

Chunks pass as the bytes they came in, but for those of an attempt that continues (`continuation.py`). The first that
speaks leaves at once; the others share batches. Nothing is retried here: before the first token that
is the gateway's affair, after it the policy's.
"""

import asyncio

from klatch_agents.gateway.errors import ModelError
from klatch_agents.gateway.port import Chunk, Finished, Gateway, ModelCall
from klatch_agents.gateway.port import Usage as Counted
from klatch_schemas import codec
from klatch_schemas.events import StreamAttempt, Usage
from klatch_schemas.records import Draft
from klatch_streams.batches import Batches, Written
from klatch_streams.continuing import Begun
from klatch_streams.log import RecordTooLarge
from klatch_workers.generation.continuation import fitted, rest_of, whole_usage
from klatch_workers.generation.credit import Credit

WIDE_BYTES = 100_000
"""A chunk so wide may be too large for the log: nothing is written after it before it stands."""
HOLD_OPENING_S = 0.004
"""One append less for a model that answers within it; nothing changes for any other."""


class Attempt:
    """An attempt that this process opens; `written` tells when its last record, the opening at first, is durable."""

    def __init__(self, opening: StreamAttempt, batches: Batches, draft: Draft, credit: Credit | None = None) -> None:
        self.opening = opening
        self._batches = batches
        self._draft = draft
        # A later attempt is read back before it speaks. A first one may leave with what a quick model says first.
        first = opening.attempt == 1
        self.written: Written = batches.write(draft, urgent=not first, hold_s=HOLD_OPENING_S if first else 0.0)
        self.opened = self.written
        self._credit = credit
        self.stopped_by: str | None = None
        """The budget that stopped the reply."""
        self.begun: Begun | None = None
        """What it continues."""
        self.seq = 0
        """How many deltas were written."""
        self.closings = 0
        """How many of them, the last, are no model's: they say that a budget was spent."""
        self.asked: str | None = None
        """Which deployment has got the call, and has not failed; None: none, and nobody has read the prompt."""
        self.deployment = ""
        """Which deployment answers."""
        self.trailer: list[bytes] = []
        """The usage chunk, if one came."""
        self.finished: Finished | None = None
        self.counted: Counted | None = None
        """The model server's last count of tokens, of a reply that was cut off as well."""
        self.counted_all = True
        """Whether it is of all that was said: no text came after it, and it is not one choice's of several."""
        self.upstream_request: str | None = None
        self.first_token_at: float | None = None
        """Event loop time of the first chunk that spoke."""

    async def stream(self, gateway: Gateway, call: ModelCall) -> None:
        """Stream the model's answer. Raises ModelError, LogError; RecordTooLarge for a chunk, which is left out."""
        opening = self.opening
        prefix = codec.delta_prefix(opening.request, opening.attempt, opening.writer)
        one_choice = call.body.get("n") in (None, 1)
        self.trailer.clear()
        if self._credit:
            self._credit.begin(self.begun.tokens if self.begun else 0)
        async with gateway.stream(rest_of(call, self.begun) if self.begun else call) as reply:
            self.deployment, self.upstream_request = reply.deployment, reply.upstream_request_id
            async for chunks in reply:
                for chunk in chunks:
                    raw = fitted(chunk.raw, self.begun) if self.begun else chunk.raw
                    if self._credit and not chunk.usage_only and not await self._credit.allows(chunk, raw):
                        # Leaving closes the model server's connection.
                        self._stop(prefix, self._credit)
                        return
                    if chunk.usage is not None:
                        self.counted, self.counted_all = chunk.usage, chunk.usage_only or one_choice
                    elif chunk.speaks:
                        self.counted_all = False
                    if chunk.usage_only:
                        self.trailer = [raw]  # clients add up what they see: only the last is told
                    else:
                        before, written = self.written, self._write(prefix, chunk, raw)
                        if len(raw) > WIDE_BYTES:
                            await self._stands(written, before)
                # While the log does not answer, the model's connection waits too: memory is bounded, nothing is lost.
                await self._batches.room(self._draft.partition or 0)
            self.finished = reply.finished

    def failed(self, error: ModelError) -> None:
        """Who was asked has failed, and is not paid; but for a filter, which has read what it refused."""
        if not error.filtered:
            self.asked = None

    def _stop(self, prefix: bytes, credit: Credit) -> None:
        for closing in credit.closing():
            self._write(prefix, closing, closing.raw)
            self.closings += 1
        self.stopped_by = credit.stopped_by
        self.finished = Finished(dict(credit.finishes), None, "cut")

    @property
    def deltas(self) -> int:
        """How many stand with it, as far as this process knows."""
        return self.seq + (self.begun.deltas if self.begun else 0)

    @property
    def usage(self) -> Usage | None:
        """What the whole reply used, if the model's server counted."""
        counted = self.counted
        if counted is None:
            return None
        usage = Usage(
            prompt_tokens=counted.prompt_tokens,
            completion_tokens=counted.completion_tokens,
            cached_tokens=counted.cached_tokens,
            reasoning_tokens=counted.reasoning_tokens,
        )
        return whole_usage(usage, self.begun) if self.begun else usage

    async def _stands(self, written: Written, before: Written) -> None:
        try:
            await written.durable()
        except RecordTooLarge:
            self.seq -= 1
            self.written = before
            raise

    def _write(self, prefix: bytes, chunk: Chunk, raw: bytes) -> Written:
        first = chunk.speaks and self.first_token_at is None
        if first:
            self.first_token_at = asyncio.get_running_loop().time()
        topic, key, partition = self._draft.topic, self._draft.key, self._draft.partition
        value = codec.encode_delta(prefix, self.seq, raw, "" if self.seq else self.deployment)
        self.written = self._batches.write(codec.delta_draft(topic, key, partition, value), urgent=first)
        self.seq += 1
        return self.written
