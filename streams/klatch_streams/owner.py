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
        """Make the state durable; returns the offset that may be committed (all before it is done), if any.

        Called one at a time, and again only when what it returned has been committed.
        """
        ...

    async def release(self, drain_s: float) -> None:
        """Finish what is in flight within `drain_s`, then stop; nothing is taken afterwards.

        A `take` that is waiting ends early, and one that outlasts `drain_s` is cancelled: what it has not finished
        does not count. With 0, drop everything at once. May be called twice.
        """
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
