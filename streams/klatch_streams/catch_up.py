"""Reads a partition to the end that it had when asked.

The end is reached whatever stands before it: others' transactions leave markers there, which are no records. A log
that falls silent before the end is an error: half a state is worse than none.
"""

from collections.abc import AsyncIterator, Sequence

from klatch_schemas.records import Partition, Record
from klatch_streams.log import LogError, Tail

_WAIT_MS = 1_000


async def catch_up(
    tail: Tail, partition: Partition, start: int, end: int, patience_s: int = 30
) -> AsyncIterator[Sequence[Record]]:
    """Follow `partition` from `start`; yields what is read until `end` is reached. Raises LogError."""
    tail.follow(partition, start)
    position, silent = start, 0
    while position < end:
        records = await tail.read(_WAIT_MS)
        before, position = position, tail.position(partition) or position
        silent = silent + 1 if position == before else 0
        if records:
            yield records
        elif silent >= patience_s:
            raise LogError(
                f"{partition.topic}/{partition.number} fell silent at {position}, before its end {end}: "
                "see whether its leader is reachable"
            )
