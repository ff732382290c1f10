"""What a stage does with a partition that is its own: the port between the runner and the stages.

The runner owns membership, hold-back, back-pressure, commits and shutdown; an `Owner` owns the work on one
partition. The order of writes is the runner's: effects (inside `take`), snapshot (`checkpoint`), offset.
"""

from collections.abc import Sequence
from typing import Protocol

from klatch_schemas.records import Partition, Record


class Owner(Protocol):
    """Works on one partition, from restored to released."""

    async def take(self, records: Sequence[Record]) -> None:
        """Accept records in offset order; returns when more may come, which is the back-pressure."""
        ...

    async def checkpoint(self) -> int | None:
        """Make the state durable; returns the offset that may be committed (all before it is done), if any."""
        ...

    async def release(self, drain_s: float) -> None:
        """Finish what is in flight within `drain_s`, then stop; nothing is taken afterwards."""
        ...


class Stage(Protocol):
    """Makes owners."""

    name: str
    """Names the consumer group."""

    topic: str
    """The input topic's full name."""

    async def own(self, partition: Partition, committed: int) -> Owner:
        """Restore what is needed for `partition` from `committed` on. Nothing is fed before this returns."""
        ...
