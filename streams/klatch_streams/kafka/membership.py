# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types; this module is the typed face of its group coordinator.
"""`Membership` on Kafka: aiokafka's group coordinator for who owns what, our fetcher for the records.

A partition is followed only after `listener.assigned` has returned, so a record cannot come out before its state is
there. Offsets that are gone are an error, never a silent jump. A member that the group expelled stays expelled: it
would be somebody else if it joined again, and its owners must know.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import ConsumerRebalanceListener
from aiokafka import errors as kafka
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from klatch_schemas.records import Partition, Record
from klatch_streams.kafka.fetching import Fetcher, Silent
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka.wire import EARLIEST, Wire
from klatch_streams.log import Listener, LogError, MembershipLost

_NOBODY = ""
_LEAVING: Any = "leaving"
_LEAVING_S = 2.0


class KafkaMembership(ConsumerRebalanceListener):  # type: ignore[misc, unused-ignore]
    """See `Membership`."""

    def __init__(self, wire: Wire, options: KafkaOptions, group: str, topic: str, listener: Listener) -> None:
        self._wire = wire
        self._options = options
        self._group = group
        self._topic = topic
        self._listener = listener
        self._fetcher = Fetcher(wire, options)
        self._owned = frozenset[Partition]()
        self._paused = set[Partition]()
        self._ready = False
        self._lost: LogError | None = None
        self._closing = False
        self._telling: asyncio.Task[None] | None = None
        self._told = asyncio.Lock()
        self._unassigned_since: float | None = time.monotonic()
        self._subscription = SubscriptionState()
        self._coordinator = GroupCoordinator(
            wire.client,
            self._subscription,
            group_id=group,
            group_instance_id=options.instance_id,
            session_timeout_ms=options.session_ms,
            heartbeat_interval_ms=options.heartbeat_ms,
            rebalance_timeout_ms=options.rebalance_ms,
            enable_auto_commit=False,
            assignors=(RangePartitionAssignor,),
        )
        self._subscription.subscribe(topics={topic}, listener=self)

    # The port.

    async def read(self, wait_ms: int) -> Mapping[Partition, Sequence[Record]]:
        """See `Membership.read`. A read that is cancelled has taken nothing."""
        self._check()
        # aiokafka leaves the group when nobody reads for five minutes.
        self._subscription._last_fetch_ended = time.monotonic()  # noqa: SLF001
        try:
            taken = await self._fetcher.read(wait_ms, until=lambda: self._lost is not None)
        except Silent as error:
            raise self._lose(MembershipLost(f"member of {self._group} is stuck: {error}")) from error
        self._check()
        return taken

    def pause(self, partition: Partition) -> None:
        """See `Membership.pause`. What was fetched is kept."""
        self._paused.add(partition)
        self._fetcher.pause(partition)

    def resume(self, partition: Partition) -> None:
        """See `Membership.resume`."""
        self._paused.discard(partition)
        if self._ready:
            self._fetcher.resume(partition)

    def seek(self, partition: Partition, offset: int) -> None:
        """See `Membership.seek`."""
        if partition not in self._owned:
            raise LogError(f"{partition.topic}/{partition.number} is not assigned to this member: it cannot seek in it")
        self._fetcher.follow(partition, offset, paused=not self._ready or partition in self._paused)

    async def committed(self, partition: Partition) -> int | None:
        """See `Membership.committed`."""
        return (await self._committed([partition])).get(partition)

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """See `Membership.commit`. A commit that is cancelled may have been done."""
        self._check()
        if strange := [f"{topic}/{number}" for topic, number in offsets if Partition(topic, number) not in self._owned]:
            raise MembershipLost(f"not this member's any more: {', '.join(strange)}")
        wanted = {TopicPartition(*partition): OffsetAndMetadata(at, "") for partition, at in offsets.items()}
        try:
            async with asyncio.timeout(self._options.patience_s):
                await self._coordinator.commit_offsets(self._subscription.subscription.assignment, wanted)
        except kafka.CommitFailedError as error:
            raise self._lose(
                MembershipLost(f"the group {self._group} went on without this member of {self._topic}")
            ) from error
        except TimeoutError as error:
            raise LogError(f"no broker took the offsets of {self._group} in {self._options.patience_s:g} s") from error
        except kafka.KafkaError as error:
            raise LogError(f"the offsets of {self._group} could not be committed: {error!r}") from error

    @property
    def closed(self) -> bool:
        """Whether it has left."""
        return self._fetcher.closed

    async def close(self) -> None:
        """See `Membership.close`. Not to be called by the listener."""
        if self._closing:
            return
        self._closing = True
        self._fetcher.clear()
        if self._telling and self._unassigned_since is not None:
            # Whoever leaves need not finish getting ready.
            self._telling.cancel()
        await self._revoke()
        self._lose(LogError("this membership was closed"))
        await self._stop_joining()
        await self._coordinator.close()
        if (ended := self._coordinator._coordination_task).done() and not ended.cancelled():  # noqa: SLF001
            ended.exception()  # retrieved: it was told by `read`, or is of no interest any more
        await self._fetcher.close()
        await self._wire.close()

    async def _stop_joining(self) -> None:
        """Leave in the middle of joining.

        Brokers answer a join once all others have joined; until then aiokafka would wait, and a member that waits for
        nothing would be given a share, be it the leader's, and hold the others up for a session.
        """
        coordinator, joining = self._coordinator, self._coordinator._coordination_task  # noqa: SLF001
        if self._unassigned_since is None:
            return
        while not joining.done():
            # Again: the end of a heartbeat swallows it.
            joining.cancel()
            await asyncio.wait({joining}, timeout=0.1)
        node, member, group = coordinator.coordinator_id, coordinator.member_id, self._group
        if node is not None and member != _NOBODY and self._options.instance_id is None:
            # On a connection of its own: on the coordinator's it would wait behind the join.
            with suppress(kafka.KafkaError, TimeoutError):
                async with asyncio.timeout(_LEAVING_S):
                    await self._wire.client.send(node, LeaveGroupRequest(group, member), group=_LEAVING)
        coordinator.reset_generation()

    # What aiokafka's coordinator calls, one at a time.

    async def on_partitions_revoked(self, revoked: object) -> None:
        """Let go, unless the group has let us go before."""
        del revoked
        self._notice_expulsion()
        if self._lost and not self._closing:
            await _end_this_task()
        await self._revoke()
        self._unassigned_since = time.monotonic()

    async def on_partitions_assigned(self, assigned: "set[TopicPartition]") -> None:
        """Get ready, then read."""
        # aiokafka starts heartbeats after this call only; getting ready may take longer than a session.
        self._coordinator._start_heartbeat_task()  # noqa: SLF001
        partitions = sorted(Partition(topic, number) for topic, number in assigned)
        async with self._told:
            try:
                starts = await self._starts(partitions)
            except LogError as error:
                self._lose(error)
            if self._closing or self._lost:
                return
            self._owned = frozenset(partitions)
            for partition in partitions:
                self._fetcher.follow(partition, starts[partition], paused=True)
            if not await self._tell(self._listener.assigned(partitions)):
                return
            self._notice_expulsion()
            self._unassigned_since, self._ready = None, True
            for partition in self._owned - self._paused:
                self._fetcher.resume(partition)

    # Inside.

    async def _revoke(self) -> None:
        self._fetcher.clear()
        async with self._told:
            if self._owned and not self._lost:
                await self._tell(self._listener.revoked(sorted(self._owned)))
            self._forget()

    async def _tell(self, call: Coroutine[object, object, None]) -> bool:
        """Run a call of the listener; False if it was ended or failed."""
        self._telling = asyncio.create_task(call)
        try:
            await asyncio.wait([self._telling])
            if self._telling.cancelled():
                return False
            if error := self._telling.exception():
                broken = LogError(f"the listener of {self._topic} failed: {error!r}")
                broken.__cause__ = error
                self._lose(broken)
            return not self._lost
        finally:
            self._telling.cancel()
            self._telling = None

    async def _starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Where to begin: at what was committed, else at the first record there is."""
        starts = await self._committed(partitions)
        for partition in partitions:
            if partition not in starts:
                starts[partition] = await self._wire.offset_at(partition, EARLIEST)
        return starts

    async def _committed(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        try:
            async with asyncio.timeout(self._options.patience_s):
                found = await self._coordinator.fetch_committed_offsets([TopicPartition(*one) for one in partitions])
        except (kafka.KafkaError, TimeoutError) as error:
            raise LogError(f"the offsets of {self._group} cannot be read: {error!r}") from error
        return {Partition(*partition): at.offset for partition, at in found.items() if at.offset >= 0}

    def _notice_expulsion(self) -> None:
        # aiokafka forgets its name when a broker does not know it, and would join again as somebody new.
        if self._owned and self._coordinator.member_id == _NOBODY:
            self._lose(MembershipLost(f"the group {self._group} has expelled this member of {self._topic}"))

    def _lose(self, error: LogError) -> LogError:
        self._lost = self._lost or error
        self._forget()
        self._fetcher.wake()
        return self._lost

    def _forget(self) -> None:
        self._owned, self._ready = frozenset(), False
        self._paused.clear()
        self._fetcher.clear()

    def _check(self) -> None:
        """Raise what ended this membership, or what aiokafka has to say."""
        if self._lost:
            raise self._lost
        try:
            self._coordinator.check_errors()
        except kafka.KafkaError as error:
            raise self._lose(
                MembershipLost(f"the group {self._group} has no place for this member: {error!r}")
            ) from error
        # Twice: a rebalance may wait for one that hangs, and have another one follow it for a leader that has died.
        since, patience = self._unassigned_since, 2 * (self._options.session_ms + self._options.rebalance_ms)
        if since is not None and self._telling is None and (time.monotonic() - since) * 1000 > patience:
            raise self._lose(
                MembershipLost(f"the group {self._group} has not given this member a share for {patience} ms")
            )


async def _end_this_task() -> None:
    """End aiokafka's coordinating task, which calls this.

    Joining again under another name would take partitions that nobody here works on. The cancellation must arrive
    here: aiokafka's next await is on its heartbeat, which would swallow it.
    """
    if task := asyncio.current_task():
        task.cancel()
    await asyncio.sleep(0)
