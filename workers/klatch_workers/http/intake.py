"""Accepting requests: into the log within a bounded time, from a bounded room, or not at all, and said so at once.

While a partition does not answer, one call at a time tries it and the others are refused at once: a client that is
told 503 with Retry-After can go to another door, and one that waits for nothing costs memory here. Other partitions
are not held up.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import structlog

from klatch_schemas.errors import Unavailable
from klatch_schemas.records import Draft, Partition
from klatch_streams.log import Log, LogError, RecordTooLarge
from klatch_workers.http.door import Terms

log = structlog.get_logger("klatch.http.intake")

RETRY_AFTER_MS: Final = 1_000


class Intake:
    """The way of a door's calls to the log."""

    def __init__(self, into: Log, terms: Terms) -> None:
        self._log = into
        self._terms = terms
        self._waiting_bytes = 0
        self._asking = set[asyncio.Timeout]()
        self._silent = dict[Partition, bool]()
        """Partitions that have failed to answer, and whether somebody tries them just now."""

    async def append(self, draft: Draft, place: Partition) -> None:
        """Append to `place`; what it was is accepted when this returns. Raises Unavailable, LogError, TimeoutError.

        What raised TimeoutError or AppendFailed may stand all the same: ask again under the same Idempotency-Key.
        """
        with self.room_for(len(draft.value or b"")):
            async with self.turn(place):
                await self._log.append([draft])

    @asynccontextmanager
    async def turn(self, place: Partition) -> AsyncGenerator[None]:
        """Around a question to the log that a client waits for. Raises Unavailable at once, or what the log raises."""
        tries = place in self._silent
        if self._silent.get(place):
            raise Unavailable("the log does not answer; try again", retry_after_ms=RETRY_AFTER_MS)
        if tries:
            self._silent[place] = True
        try:
            async with asyncio.timeout(self._terms.append_timeout_s) as patience:
                self._asking.add(patience)
                try:
                    yield
                finally:
                    self._asking.discard(patience)
        except (LogError, TimeoutError) as error:
            if not isinstance(error, RecordTooLarge):
                self._note_silence(place, error)
            raise
        else:
            if self._silent.pop(place, None) is not None:
                log.info("log.answers_again", topic=place.topic, partition=place.number)
        finally:
            if tries and place in self._silent:
                self._silent[place] = False

    def give_up(self) -> None:
        """Let nobody wait for the log any longer: who does is refused as if his time were up."""
        for patience in self._asking:
            patience.reschedule(asyncio.get_running_loop().time())

    def _note_silence(self, place: Partition, error: Exception) -> None:
        if place not in self._silent:
            log.warning("log.silent", topic=place.topic, partition=place.number, error=type(error).__name__)
            self._silent[place] = False

    @contextmanager
    def room_for(self, size: int) -> Generator[None]:
        """Around all that is asked of the log for a request of so many bytes. Raises Unavailable."""
        if self._waiting_bytes and self._waiting_bytes + size > self._terms.intake_bytes:
            raise Unavailable("too much waits for the log already; try again", retry_after_ms=RETRY_AFTER_MS)
        self._waiting_bytes += size
        try:
            yield
        finally:
            self._waiting_bytes -= size
