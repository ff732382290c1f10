"""How long streams stood still after a fault: from the fault, or from their turn to speak, to their next token.

A stream that the fault did not touch spoke again at once, so the longest wait is that of one that it did. Waits for
the conversation's previous turn, and streams that anything but klatch held up, are left out by the judge. Faults that
overlap are not told apart: each is charged with the wait.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from klatch_workers.torture.evidence import Struck

_NOTICED_MS: Final = 10_000
"""A group's session time-out: whoever asks within it after a fault may meet its effects."""


class Speaking(NamedTuple):
    """A stream that nothing but faults of klatch can hold up; milliseconds since the epoch."""

    request: str
    began: int
    """When it was its turn."""
    ended: int
    spoken: Sequence[int]
    """When each of its tokens came."""


class Recovery(NamedTuple):
    """How long a stream stood still."""

    seconds: float
    request: str


def recoveries(struck: Sequence[Struck], streams: Iterable[Speaking]) -> dict[str, Recovery]:
    """The longest recovery by sort of fault."""
    longest = dict[str, Recovery]()
    under_way = list(streams)
    for fault in struck:
        waits = [found for stream in under_way if (found := _wait(fault, stream))]
        longest[fault.what] = max([longest.get(fault.what, Recovery(0.0, "")), *waits])
    return longest


def _wait(fault: Struck, stream: Speaking) -> Recovery | None:
    if stream.began > fault.until_ms + _NOTICED_MS or stream.ended <= fault.at_ms:
        return None
    since = max(float(stream.began), fault.at_ms)
    following = bisect.bisect_right(stream.spoken, since)
    if following == len(stream.spoken):
        return None
    return Recovery((stream.spoken[following] - since) / 1000, stream.request)
