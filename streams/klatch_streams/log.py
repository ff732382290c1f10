"""The log as stages see it: the port that Kafka and `MemoryLog` both fulfil, under one conformance suite.

Appends are acknowledged by all in-sync replicas or raise `AppendFailed`. A `Tail` reads partitions it chose itself,
a `Membership` reads those that its consumer group was given. Neither skips or repeats a record while it is open.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from klatch_schemas.records import Draft, Partition, Record


class LogError(Exception):
    """The log could not do what was asked.

    LogError
    ├── AppendFailed     records may or may not stand in the log; their writer must stop and start over
    │   └── RecordTooLarge   a record is larger than the log takes; nothing of this append stands
    ├── OffsetGone       the log no longer holds (or never held) the offset asked for
    ├── UnknownTopic     no such topic: `klatch topics create` makes it
    └── MembershipLost   the group went on without this member; its partitions belong to others now
    """


class AppendFailed(LogError):
    """Records may or may not stand in the log."""


class RecordTooLarge(AppendFailed):
    """A record is larger than the log takes; found before anything was sent."""

    def __init__(self, topic: str, size: int, limit: int) -> None:
        super().__init__(f"a record of {size} bytes is too large for {topic}, which takes up to {limit} bytes")
        self.topic, self.size, self.limit = topic, size, limit


class OffsetGone(LogError):
    """The log holds offsets `first` to `end` (exclusive) of the partition, and not the one asked for."""

    def __init__(self, partition: Partition, offset: int, first: int, end: int) -> None:
        super().__init__(f"{partition.topic}/{partition.number} holds offsets {first} to {end}, not {offset}")
        self.partition, self.offset, self.first, self.end = partition, offset, first, end


class UnknownTopic(LogError):
    """No such topic."""


class MembershipLost(LogError):
    """The group went on without this member."""


class Tail(Protocol):
    """Reads chosen partitions, each in order, from a chosen offset on."""

    def follow(self, partition: Partition, offset: int) -> None:
        """Read `partition` from `offset` on, from the next `read`; again: from there instead."""
        ...

    def unfollow(self, partition: Partition) -> None:
        """Read `partition` no longer; none of its records come out of a later `read`."""
        ...

    def position(self, partition: Partition) -> int | None:
        """The next offset to be read; None if `partition` is not followed, or no longer.

        Ahead of the last record by what is none: the markers of transactions, what was aborted, what compaction took.
        """
        ...

    async def read(self, wait_ms: int) -> Sequence[Record]:
        """What has arrived, as soon as anything has; empty after `wait_ms`. Raises OffsetGone, UnknownTopic, LogError.

        A partition that raised is followed no longer; the others go on. A cancelled `read` has taken nothing.
        """
        ...

    async def close(self) -> None:
        """Give back connections. A `read` in progress ends."""
        ...


class Listener(Protocol):
    """Is told of partitions coming and going; neither call may raise, and none comes before `join` has returned.

    A member that the group expelled is not told `revoked`: its partitions are somebody else's already.
    """

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        """These are this member's from now on, and maybe none. Records of them are read only after this returns."""
        ...

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        """These go to somebody else when this returns: finish, flush, commit, within the group's patience."""
        ...


class Membership(Protocol):
    """A member of a consumer group: reads the partitions of one topic that the group gave it."""

    async def read(self, wait_ms: int) -> Mapping[Partition, Sequence[Record]]:
        """What has arrived on assigned, unpaused partitions. Raises MembershipLost, OffsetGone, LogError.

        A partition that raised OffsetGone is read again after `seek`. A cancelled `read` has taken nothing.
        """
        ...

    def pause(self, partition: Partition) -> None:
        """Read no more of `partition` until `resume`; heartbeats go on."""
        ...

    def resume(self, partition: Partition) -> None:
        """Read `partition` again, from where it stopped."""
        ...

    def seek(self, partition: Partition, offset: int) -> None:
        """Read an assigned partition from `offset` on."""
        ...

    async def committed(self, partition: Partition) -> int | None:
        """The group's committed offset (the next one to read), if it has one."""
        ...

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit next offsets to read. Raises MembershipLost."""
        ...

    async def close(self) -> None:
        """Leave the group; `revoked` is told first."""
        ...


class Log(Protocol):
    """An append-only log of partitioned topics."""

    async def append(self, drafts: Sequence[Draft]) -> Sequence[tuple[Partition, int]]:
        """Append in order per partition; returns where each stands, once durable. Raises AppendFailed, UnknownTopic.

        Concurrent appends by one process to one partition keep the order of their calls.
        """
        ...

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has. Raises UnknownTopic."""
        ...

    async def bounds(self, partition: Partition) -> tuple[int, int]:
        """The first offset held and the next to be written, as readers see them."""
        ...

    async def offset_at(self, partition: Partition, timestamp_ms: int) -> int:
        """The offset of the first record not older than `timestamp_ms`; the end if there is none."""
        ...

    async def tail(self) -> Tail:
        """A new reader of chosen partitions."""
        ...

    async def join(self, group: str, topic: str, listener: Listener) -> Membership:
        """Become a member of a consumer group. Raises UnknownTopic."""
        ...

    async def close(self) -> None:
        """Flush and give back connections."""
        ...
