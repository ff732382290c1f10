# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types; this module is the typed face of its producer.
"""Appends: batches of whole calls, one in flight a partition, in the order of the calls.

While a batch is on its way, later calls for its partition gather and go together in the next one, so many small
concurrent appends cost few requests. What one call writes to one partition is one batch, unless it is larger than
`max_record_bytes`. A call that fails says so after everything else it wrote has settled.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from klatch_schemas.records import Draft, Headers, Partition, partition_of
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka.wire import Wire
from klatch_streams.log import AppendFailed, RecordTooLarge, UnknownTopic

_size_of = DefaultRecordBatchBuilder.estimate_size_in_bytes
_BATCH_HEADER_BYTES = 61


@dataclass(eq=False, slots=True)
class Call:
    """What one `append` writes to one partition."""

    drafts: list[Draft]
    size: int
    done: "asyncio.Future[list[int]]"


class Producer:
    """Appends to one cluster."""

    def __init__(self, wire: Wire, options: KafkaOptions) -> None:
        self._wire = wire
        self._options = options
        self._keyless = count()
        self._placing = 0
        self._place_order = asyncio.Lock()
        self._queues = dict[Partition, deque[Call]]()
        self._senders = dict[Partition, asyncio.Task[None]]()
        self._start_lock = asyncio.Lock()
        self._producer: AIOKafkaProducer | None = None
        self._closed = False

    async def append(self, drafts: Sequence[Draft]) -> list[tuple[Partition, int]]:
        """See `Log.append`. A cancelled append may or may not have been sent."""
        places = await self._place(drafts)
        indexes = dict[Partition, list[int]]()
        for index, (partition, _) in enumerate(places):
            indexes.setdefault(partition, []).append(index)
        calls = {partition: self._enqueue(partition, drafts, places, at) for partition, at in indexes.items()}
        if len(calls) > 1:
            # All must have settled before one failure is told, lest the rest is still on its way when we are stopped.
            await asyncio.wait([call.done for call in calls.values()])
        offsets = [0] * len(drafts)
        for partition, call in calls.items():
            for index, offset in zip(indexes[partition], await call.done, strict=True):
                offsets[index] = offset
        return [(partition, offset) for (partition, _), offset in zip(places, offsets, strict=True)]

    async def close(self) -> None:
        """Wait for what is on its way, then give back connections."""
        self._closed = True
        if self._senders:
            await asyncio.wait(list(self._senders.values()))
        if self._producer:
            await _abandon(self._producer)
            self._producer = None

    # Where records go.

    async def _place(self, drafts: Sequence[Draft]) -> list[tuple[Partition, int]]:
        """Partition and size of each record. Raises UnknownTopic, RecordTooLarge."""
        if self._closed:
            raise AppendFailed("this log was closed")
        topics = {draft.topic for draft in drafts}
        # A call that waits for metadata must not be overtaken by one that comes later and need not wait.
        if self._placing or any(self._wire.count(topic) is None for topic in topics):
            self._placing += 1
            try:
                async with self._place_order:
                    for topic in topics:
                        await self._wire.partitions(topic)
                    return self._placed(drafts)
            finally:
                self._placing -= 1
        return self._placed(drafts)

    def _placed(self, drafts: Sequence[Draft]) -> list[tuple[Partition, int]]:
        # Most calls are many small records for one partition: what is the same for all is looked up once.
        places, known = list[tuple[Partition, int]](), dict[tuple[str, int], Partition]()
        limit = self._options.max_record_bytes
        for topic, key, value, headers, asked in drafts:
            number = self._number(topic, key) if asked is None else asked
            partition = known.get((topic, number))
            if partition is None:
                partition = known[topic, number] = self._partition(topic, number)
            size = _size_of(key, value, _listed(headers))
            if size > limit:
                raise RecordTooLarge(topic, size, limit)
            places.append((partition, size))
        return places

    def _number(self, topic: str, key: bytes | None) -> int:
        partitions = self._wire.count(topic) or 0
        return next(self._keyless) % partitions if key is None else partition_of(key, partitions)

    def _partition(self, topic: str, number: int) -> Partition:
        partitions = self._wire.count(topic) or 0
        if not 0 <= number < partitions:
            raise UnknownTopic(f"topic {topic} has no partition {number}; it has {partitions}")
        return Partition(topic, number)

    def _enqueue(
        self, partition: Partition, drafts: Sequence[Draft], places: Sequence[tuple[Partition, int]], at: list[int]
    ) -> Call:
        size = sum(places[index][1] for index in at)
        call = Call([drafts[index] for index in at], size, asyncio.get_running_loop().create_future())
        self._queues.setdefault(partition, deque()).append(call)
        if partition not in self._senders:
            self._senders[partition] = asyncio.create_task(self._send_queue(partition))
        return call

    # Sending.

    async def _send_queue(self, partition: Partition) -> None:
        """Send what is queued for `partition`, batch after batch, until nothing is."""
        queue, calls = self._queues[partition], list[Call]()
        try:
            while queue:
                calls = self._next_calls(queue)
                try:
                    offsets = await self._send([draft for call in calls for draft in call.drafts], partition)
                except AppendFailed as error:
                    _fail(calls, error)
                else:
                    _settle(calls, offsets)
        finally:
            # Nothing is left here but when this task was ended, or met what it does not know.
            _fail([*calls, *queue], AppendFailed(f"sending to {partition.topic}/{partition.number} ended"))
            del self._senders[partition], self._queues[partition]

    def _next_calls(self, queue: deque[Call]) -> list[Call]:
        """Whole calls that fit into one batch together; those cancelled before they were sent are dropped."""
        calls, size = list[Call](), 0
        while queue and (not calls or size + queue[0].size <= self._options.max_record_bytes):
            call = queue.popleft()
            if not call.done.done():
                calls.append(call)
                size += call.size
        return calls

    async def _send(self, drafts: list[Draft], partition: Partition) -> list[int]:
        """Append batches one after the other; returns the offset of each record. Raises AppendFailed."""
        offsets, rest = list[int](), drafts
        while rest:
            producer = await self._started()
            batch, taken = producer.create_batch(), 0
            for _, key, value, headers, _ in rest:
                if batch.append(timestamp=None, key=key, value=value, headers=_listed(headers)) is None:
                    break
                taken += 1
            base = await self._deliver(producer, batch, partition)
            offsets += range(base, base + taken)
            rest = rest[taken:]
        return offsets

    async def _deliver(self, producer: AIOKafkaProducer, batch: object, partition: Partition) -> int:
        where, patience = f"{partition.topic}/{partition.number}", self._options.delivery_s
        # Who leads it is asked for as long as we write to it: once told of one topic, aiokafka forgets all it was not
        # told of, and a batch that waits for one of these waits for ever.
        producer.client.add_topic(partition.topic)
        try:
            # Who waits for metadata of a producer that is given up meanwhile would wait for ever.
            async with asyncio.timeout(patience):
                delivery = await producer.send_batch(batch, partition.topic, partition=partition.number)
        except (kafka.KafkaError, TimeoutError) as error:
            await self._drop_if_dead(producer)
            raise AppendFailed(f"{where} refused an append: {error!r}") from error
        await asyncio.wait([delivery], timeout=patience)
        if not delivery.done():
            delivery.cancel()
            raise AppendFailed(f"{where} did not acknowledge within {patience:g} s: are its brokers up?")
        try:
            base = delivery.result().offset
        except kafka.KafkaError as error:
            await self._drop(producer)
            raise AppendFailed(f"{where} refused an append: {error!r}") from error
        if base < 0:
            raise AppendFailed(f"{where} took a repeated batch and no longer knows where it stands")
        return int(base)

    async def _started(self) -> AIOKafkaProducer:
        if self._producer:
            return self._producer
        async with self._start_lock:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    bootstrap_servers=self._options.bootstrap,
                    client_id=self._options.client_id,
                    acks="all",
                    enable_idempotence=self._options.idempotent,
                    compression_type=self._options.compression,
                    max_batch_size=self._options.max_record_bytes + _BATCH_HEADER_BYTES,
                    max_request_size=self._options.max_record_bytes,
                    request_timeout_ms=int(self._options.delivery_s * 1000),
                    linger_ms=0,
                    **self._options.security(),
                )
                try:
                    async with asyncio.timeout(self._options.delivery_s):
                        await producer.start()
                except BaseException as error:
                    # Cancelled as well: what is left behind would hold its connections.
                    await _abandon(producer)
                    if isinstance(error, kafka.KafkaError | TimeoutError):
                        raise AppendFailed(f"no Kafka answers at {self._options.bootstrap}: {error!r}") from error
                    raise
                self._producer = producer
            return self._producer

    async def _drop_if_dead(self, producer: AIOKafkaProducer) -> None:
        """A producer whose sender met a fatal error sends no more; the next append starts a new one.

        A live one is kept even when an append timed out: what it goes on retrying then stands before, never behind,
        whatever this process appends to the partition later.
        """
        sender = producer._sender.sender_task  # noqa: SLF001
        if sender is None or sender.done():
            await self._drop(producer)

    async def _drop(self, producer: AIOKafkaProducer) -> None:
        """Give up a producer; the next append starts a new one.

        An idempotent one whose batch failed is of no more use for that partition: the batch had a sequence number, and
        brokers refuse every later one as out of order, for ever. (So they do after a batch that nobody waits for any
        more, and that aiokafka drops once its partition has had no leader for `delivery_s`.)
        """
        if self._producer is producer:
            self._producer = None
            await _abandon(producer)


def _settle(calls: Sequence[Call], offsets: Sequence[int]) -> None:
    rest = iter(offsets)
    for call in calls:
        theirs = list(islice(rest, len(call.drafts)))
        if not call.done.done():
            call.done.set_result(theirs)


def _fail(calls: Sequence[Call], error: AppendFailed) -> None:
    for call in calls:
        if not call.done.done():
            # One each: an exception that is raised in several places collects their tracebacks.
            call.done.set_exception(AppendFailed(*error.args))


def _listed(headers: Headers) -> list[Any]:
    # aiokafka's compiled encoder takes nothing else.
    return headers if isinstance(headers, list) else list(headers)


async def _abandon(producer: AIOKafkaProducer) -> None:
    """Stop now. aiokafka's own `stop` waits for deliveries, which an idempotent producer never gives up."""
    producer._closed = True  # noqa: SLF001
    client, sender = producer.client, producer._sender.sender_task  # noqa: SLF001
    if sender:
        sender.cancel()
    await client.close()
    while sender and not sender.done():
        # A retry on its way may wait for metadata, which nobody fetches any more.
        if (update := client._md_update_fut) and not update.done():  # noqa: SLF001
            update.set_result(False)
        await asyncio.wait([sender], timeout=0.05)
    producer._message_accumulator.fail_all(kafka.ProducerClosed())  # noqa: SLF001
