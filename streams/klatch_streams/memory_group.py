"""Consumer groups of `MemoryLog`: range assignment and eager rebalances, as Kafka's classic protocol has them.

A rebalance awaits `revoked` of every member, and only then tells anybody `assigned`. Listeners run in tasks of the
group, never in the reader's, so that a member whose task was killed is told nothing more once it is expelled.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING

from klatch_schemas.records import Partition, Record
from klatch_streams.log import Listener, LogError, MembershipLost

if TYPE_CHECKING:
    from klatch_streams.memory_log import MemoryLog


class MemoryGroup:
    """The coordinator of one group."""

    def __init__(self, log: "MemoryLog") -> None:
        self.log = log
        self.members = list[MemoryMembership]()
        self.committed = dict[Partition, int]()
        self._changed = False
        self._rebalancing: asyncio.Task[None] | None = None

    def join(self, topic: str, listener: Listener) -> "MemoryMembership":
        """A new member; its listener hears of partitions after this has returned."""
        self.members.append(member := MemoryMembership(self, topic, listener))
        self.rebalance()
        return member

    def rebalance(self) -> None:
        """Give the partitions out anew, after the rebalance in progress if there is one."""
        self._changed = True
        if self._rebalancing is None or self._rebalancing.done():
            self._rebalancing = asyncio.create_task(self._rebalance())

    async def close(self) -> None:
        """Every member leaves."""
        for member in tuple(self.members):
            await member.close()
        if self._rebalancing:
            await self._rebalancing

    async def _rebalance(self) -> None:
        while self._changed:
            self._changed = False
            await asyncio.gather(*[member.revoke() for member in self.members])
            for member in [one for one in self.members if one.leaving]:
                self.members.remove(member)
                member.left.set()
            # Who came or went meanwhile: nobody holds anything now, so start over rather than assign twice.
            if not self._changed:
                shares = self._shares()
                await asyncio.gather(*[member.assign(share) for member, share in shares.items()])

    def _shares(self) -> "dict[MemoryMembership, list[Partition]]":
        """Kafka's range assignor: partitions in order, members in order, the first ones get one more."""
        shares = {member: list[Partition]() for member in self.members}
        for topic in {member.topic for member in self.members}:
            members = [member for member in self.members if member.topic == topic]
            partitions = self.log.records_of(topic)
            each, more = divmod(len(partitions), len(members))
            start = 0
            for index, member in enumerate(members):
                end = start + each + (index < more)
                shares[member] = partitions[start:end]
                start = end
        return shares


class MemoryMembership:
    """A `Membership` of a `MemoryLog`."""

    def __init__(self, group: MemoryGroup, topic: str, listener: Listener) -> None:
        self.topic = topic
        self.leaving = False
        self.left = asyncio.Event()
        self._group = group
        self._listener = listener
        self._owned = tuple[Partition, ...]()
        self._positions = dict[Partition, int]()
        self._paused = set[Partition]()
        self._ready = False
        self._revoking = False
        self._lost: LogError | None = None
        self._telling: asyncio.Task[None] | None = None

    # The port.

    async def read(self, wait_ms: int) -> Mapping[Partition, Sequence[Record]]:
        """See `Membership.read`. A read that is cancelled has taken nothing."""
        self._check()
        await self._group.log.changed.wait(self._has_news, wait_ms)
        if self._group.log.silent:
            await self._group.log.answering()
        self._check()
        positions = self._readable()
        try:
            return self._group.log.take(positions)
        finally:
            for partition in self._readable():
                if partition in positions:
                    self._positions[partition] = positions[partition]
                else:
                    del self._positions[partition]

    def pause(self, partition: Partition) -> None:
        """See `Membership.pause`."""
        self._paused.add(partition)

    def resume(self, partition: Partition) -> None:
        """See `Membership.resume`."""
        self._paused.discard(partition)
        self._group.log.changed.fire()

    def seek(self, partition: Partition, offset: int) -> None:
        """See `Membership.seek`."""
        if partition not in self._owned:
            raise LogError(f"{partition.topic}/{partition.number} is not assigned to this member: it cannot seek in it")
        self._positions[partition] = offset
        self._group.log.changed.fire()

    async def committed(self, partition: Partition) -> int | None:
        """See `Membership.committed`."""
        await self._group.log.answering()
        return self._group.committed.get(partition)

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """See `Membership.commit`. A commit that is cancelled may have been done."""
        await self._group.log.answering()
        self._check()
        if strange := [partition for partition in offsets if partition not in self._owned]:
            raise MembershipLost(f"not this member's any more: {_names(strange)}")
        self._group.committed.update(offsets)
        await asyncio.sleep(0)

    async def close(self) -> None:
        """See `Membership.close`. Not to be called by the listener."""
        if self not in self._group.members:
            return
        self.leaving = True
        if self._telling and not self._ready and not self._revoking:
            # Whoever leaves need not finish getting ready.
            self._telling.cancel()
        self._group.rebalance()
        await self.left.wait()
        self._lose(LogError("this membership was closed"))

    # For the group.

    def expel(self) -> None:
        """The group goes on without this member, and tells it nothing."""
        if self not in self._group.members:
            return
        self._group.members.remove(self)
        self._lose(MembershipLost(f"the group has expelled this member of {self.topic}"))
        if self._telling:
            self._telling.cancel()
        self._group.rebalance()

    async def revoke(self) -> None:
        """Take everything from this member, once its listener has let go."""
        self._ready, self._revoking = False, True
        if self._owned:
            await self._tell(self._listener.revoked(self._owned))
        self._revoking = False
        self._owned = ()
        self._positions.clear()
        self._paused.clear()

    async def assign(self, partitions: Sequence[Partition]) -> None:
        """Give `partitions` to this member; it reads them when its listener is ready."""
        if self._lost:
            return
        self._owned = tuple(partitions)
        for partition in partitions:
            first = self._group.log.held(partition).first
            self._positions[partition] = self._group.committed.get(partition, first)
        await self._tell(self._listener.assigned(self._owned))
        self._ready = not self.leaving
        self._group.log.changed.fire()

    async def _tell(self, call: Coroutine[object, object, None]) -> None:
        # A task of its own, so that expelling this member ends its listener's call and not the rebalance.
        self._telling = asyncio.create_task(call)
        try:
            await asyncio.wait([self._telling])
            if not self._telling.cancelled() and (error := self._telling.exception()):
                self._broken(error)
        finally:
            self._telling.cancel()
            self._telling = None

    def _broken(self, error: BaseException) -> None:
        broken = LogError(f"the listener of {self.topic} failed: {error!r}")
        broken.__cause__ = error
        self._lose(broken)
        if self in self._group.members:
            self._group.members.remove(self)
        self._group.rebalance()

    def _lose(self, error: LogError) -> None:
        self._lost = self._lost or error
        self.left.set()
        self._owned, self._ready = (), False
        self._positions.clear()
        self._group.log.changed.fire()

    def _check(self) -> None:
        if self._lost:
            raise self._lost

    def _readable(self) -> dict[Partition, int]:
        if not self._ready:
            return {}
        return {partition: at for partition, at in self._positions.items() if partition not in self._paused}

    def _has_news(self) -> bool:
        log = self._group.log
        return self._lost is not None or log.silent or any(True for _ in log.ahead(self._readable()))


def _names(partitions: Sequence[Partition]) -> str:
    return ", ".join(f"{partition.topic}/{partition.number}" for partition in partitions)
