# pyright: reportMissingTypeStubs=false
# aiokafka has no types.
"""A reader by klatch's own Python client: a third way to the same stream, beside SSE and the kit's fold of the log.

It goes live before the request is asked, leaves in mid-stream as it means to and resumes after the last chunk that it
was shown, and reads again from the start when it is told that its text is void.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, cast

from aiokafka.errors import KafkaError

from klatch_schemas.client import Client, Shown, Stream
from klatch_schemas.errors import KlatchError, Superseded
from klatch_schemas.ids import RequestId
from klatch_workers.torture.evidence import Observation
from klatch_workers.torture.told import outcome_of

_AGAIN_S: Final = 0.5


@dataclass(slots=True)
class ClientReader:
    """One reader of one stream."""

    client: Client
    stream: Stream
    leaves_after: list[int]
    """After how many chunks it goes away, to come back."""
    troubles: Counter[str]
    _shown: list[Shown] = field(default_factory=list[Shown])
    _voided: list[str] = field(default_factory=list[str])
    _outcome: str | None = None

    async def read(self) -> None:
        """Read until told of an end."""
        while self._outcome is None:
            try:
                await self._once()
            except Superseded:
                self._voided.append(self._text())
                self._shown = []
            except KlatchError as error:
                self._outcome = outcome_of(error.code, error.ended) or f"error {error.code}"
            except KafkaError as error:
                self.troubles[f"python: {type(error).__name__}"] += 1
                await asyncio.sleep(_AGAIN_S)
            except Exception as error:  # noqa: BLE001 - none that the client documents: the judge tells of it by name
                self._outcome = f"error {type(error).__name__}"

    async def _once(self) -> None:
        after = self._shown[-1].offset if self._shown else None
        reading = cast("AsyncGenerator[Shown, None]", self.client.read(self.stream, after=after))
        async with aclosing(reading):
            async for shown in reading:
                self._shown.append(shown)
                if self.leaves_after and len(self._shown) >= self.leaves_after[0]:
                    self.leaves_after.pop(0)
                    return
        self._outcome = "completed"

    def observation(self) -> Observation:
        """What it was shown."""
        request = RequestId(self.stream.request)
        until_ms = time.time() * 1000
        return Observation("python", request, self._text(), self._outcome, tuple(self._voided), until_ms=until_ms)

    def _text(self) -> str:
        return "".join(shown.text for shown in self._shown)
