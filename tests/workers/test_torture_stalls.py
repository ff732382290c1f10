"""The kit of `klatch torture` notices when it did not run itself, and from when on."""

import asyncio
import time

from klatch_workers.torture.evidence import Stall
from klatch_workers.torture.stalls import stalled_ms, watch

_ASLEEP_S = 0.2
_REST_S = 0.01


async def test_the_time_in_which_the_kit_did_not_run_is_a_stall_and_no_time_before() -> None:
    stalls = list[Stall]()
    before_ms = time.time() * 1000
    watching = asyncio.create_task(watch(stalls))
    await asyncio.sleep(0)  # it has begun to rest
    began_ms = time.time() * 1000
    time.sleep(_ASLEEP_S)  # noqa: ASYNC251 - what a process without a processor does
    await asyncio.sleep(_REST_S)  # due after it
    watching.cancel()
    # Until it was due it ran, as far as anybody knows.
    assert before_ms + _REST_S * 1000 <= stalls[0].from_ms <= began_ms + _REST_S * 1000
    assert stalls[0].until_ms >= began_ms + _ASLEEP_S * 1000


def test_a_stall_counts_as_far_as_it_lies_between_the_two_times() -> None:
    stalls = [Stall(0.0, 100.0), Stall(150.0, 200.0), Stall(300.0, 400.0)]
    assert stalled_ms(stalls, 50.0, 350.0) == 50.0 + 50.0 + 50.0
