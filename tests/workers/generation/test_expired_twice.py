"""Two owners see one deadline pass: they do not take the request over from each other, each in order to end it.

Found by the small model (`tests/model`), where it went on for ever.
"""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import time
from typing import Any

from klatch_schemas.events import StreamAttempt, StreamEnd
from klatch_schemas.topics import CHAT_STREAM

DEADLINE_S = 6.0


async def test_who_was_taken_over_from_leaves_an_expired_request_to_who_took_over(generation: Any) -> None:
    async with generation.worker():
        deadline = time.time() + DEADLINE_S
        request = await generation.admit("fake?reply=unique&rate=4&tokens=200", deadline_ms=int(deadline * 1000))
        await generation.assembled(request, lambda stream: stream.standing)
        said = {"request": request.request, "tenant": "acme", "conversation": "c1", "attempt": 2, "writer": "other"}
        await generation.write(CHAT_STREAM, "c1", StreamAttempt(**said))
        await asyncio.sleep(deadline - time.time() + 0.5)  # a deadline is a time
        await generation.write(CHAT_STREAM, "c1", StreamEnd(**said, status="expired"))
        assert (await generation.ended(request)).state.status == "expired"
        assert (await generation.settled(request)).status == "expired"
    openings = [one.attempt for one in await generation.held(CHAT_STREAM) if isinstance(one, StreamAttempt)]
    assert openings == [1, 2]
