"""How long streams stood still after a fault: from the fault, or from their turn to speak, to their next token.

A stream that the fault did not touch spoke again at once, so the longest wait is that of one that it did. Waits for
the conversation's previous turn, and streams that anything but klatch held up, are left out by the judge. Faults that
overlap are not told apart: each is charged with the wait.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from klatch_workers.torture.evidence import Struck

_NOTICED_MS: Final = 10_000
"""A group's session time-out: whoever asks within it after a fault may meet its effects."""


def recoveries_s(struck: Sequence[Struck], streams: Iterable[tuple[int, int, Sequence[int]]]) -> dict[str, float]:
    """The longest recovery by sort of fault, in seconds.

    A stream is: when it was its turn, when it ended, and when each of its tokens came; milliseconds since the epoch.
    """
    longest = defaultdict[str, float](float)
    under_way = list(streams)
    for fault in struck:
        for began, ended, spoken in under_way:
            if began <= fault.until_ms + _NOTICED_MS and fault.at_ms < ended:
                since = max(float(began), fault.at_ms)
                following = bisect.bisect_right(spoken, since)
                if following < len(spoken):
                    longest[fault.what] = max(longest[fault.what], (spoken[following] - since) / 1000)
    return dict(longest)
