# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types: this module is where they end.
"""What Kafka itself says of offsets: what a group has committed, and whether the log holds a record between two."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped, unused-ignore]
from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped, unused-ignore]
from aiokafka.errors import KafkaError  # type: ignore[import-untyped, unused-ignore]

_ATTEMPTS: Final = 150
_PAUSE_S: Final = 0.2
"""Between attempts: half a minute in all."""


class Offsets:
    """Asked beside Faust, whose own account of them was seen to be wrong. Methods raise KafkaError."""

    def __init__(self, kafka: str, group: str) -> None:
        self._kafka, self._group = kafka, group
        self._reader: AIOKafkaConsumer | None = None
        self._one_at_a_time = asyncio.Lock()

    async def committed(self) -> Mapping[tuple[str, int], int]:
        """The next offset to read, by topic and partition; what is absent has none."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self._kafka)
        try:
            await admin.start()
            held = await self._ask(admin)
        finally:
            await admin.close()
        return {(tp.topic, tp.partition): at.offset for tp, at in held.items() if at.offset >= 0}

    async def holds(self, topic: str, partition: int, start: int, end: int) -> bool:
        """Whether the log has a record from `start` up to, not with, `end`, where it does have one."""
        async with self._one_at_a_time:
            reader = await self._started()
            tp = TopicPartition(topic, partition)
            reader.assign([tp])
            # An offset that retention has passed is out of range: reading goes on where the log begins.
            reader.seek(tp, start)
            return bool((await reader.getone()).offset < end)

    async def close(self) -> None:
        """Let go of the connections."""
        if self._reader is not None:
            await self._reader.stop()

    async def _ask(self, admin: AIOKafkaAdminClient) -> Mapping[TopicPartition, Any]:
        for attempt in range(_ATTEMPTS):
            try:
                return dict(await admin.list_consumer_group_offsets(self._group))
            except KafkaError as error:
                # A fresh Kafka has no coordinator yet, and one that lost a broker appoints another.
                if not error.retriable or attempt == _ATTEMPTS - 1:
                    raise
                await asyncio.sleep(_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    async def _started(self) -> AIOKafkaConsumer:
        if self._reader is None:
            reader = AIOKafkaConsumer(
                bootstrap_servers=self._kafka,
                auto_offset_reset="earliest",
                max_poll_records=1,
                max_partition_fetch_bytes=1,
            )
            try:
                await reader.start()
            except BaseException:
                await reader.stop()
                raise
            self._reader = reader
        return self._reader
