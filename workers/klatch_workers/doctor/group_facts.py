# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types; this module is the typed face of what the doctor asks a cluster beside its records.
"""Consumer groups with their members and lag, and the time that the cluster's controller has.

The time comes from DescribeQuorum (KIP-595, KIP-836): the leader of the metadata log reports itself as caught up at
its own "now". No other request of Kafka's protocol tells a broker's clock without writing a record.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

from klatch_schemas.records import Partition
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.log import LogError


class Group(NamedTuple):
    """A consumer group as it is."""

    name: str
    members: int
    committed: dict[Partition, int]


@asynccontextmanager
async def cluster_admin(options: KafkaOptions) -> AsyncGenerator[AIOKafkaAdminClient]:
    """An admin client. Raises LogError."""
    admin = AIOKafkaAdminClient(bootstrap_servers=options.bootstrap, client_id=options.client_id, **options.security())
    try:
        await admin.start()
        yield admin
    except kafka.KafkaError as error:
        raise LogError(f"{options.bootstrap} refuses to say: {error!r}") from error
    finally:
        await admin.close()


async def groups(admin: AIOKafkaAdminClient, names: Sequence[str]) -> list[Group]:
    """The groups called so; one that does not exist has no members and has committed nothing."""
    # Asking for the coordinator of a group that is none would have Kafka make its topic of offsets.
    there = {listed[0] for listed in await admin.list_consumer_groups()}
    found = list[Group]()
    for name in names:
        if name not in there:
            found.append(Group(name, 0, {}))
            continue
        response: Any = (await admin.describe_consumer_groups([name]))[0]
        # error, group, state, protocol type, protocol, members, …
        members = response.groups[0][5]
        offsets = await admin.list_consumer_group_offsets(name)
        committed = {Partition(place.topic, place.partition): held.offset for place, held in offsets.items()}
        found.append(Group(name, len(members), {place: at for place, at in committed.items() if at >= 0}))
    return found


class _QuorumResponse(Response):  # type: ignore[misc, unused-ignore]
    API_KEY = 55  # pyright: ignore[reportAssignmentType]
    API_VERSION = 1  # pyright: ignore[reportAssignmentType]
    FLEXIBLE_VERSION = True
    SCHEMA = Schema(
        ("error_code", Int16),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("error_code", Int16),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("high_watermark", Int64),
                        *(
                            (
                                replicas,
                                CompactArray(
                                    ("replica", Int32),
                                    ("end_offset", Int64),
                                    ("last_fetch_ms", Int64),
                                    ("last_caught_up_ms", Int64),
                                    ("tags", TaggedFields),
                                ),
                            )
                            for replicas in ("voters", "observers")
                        ),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _QuorumRequestV1(RequestStruct):  # type: ignore[misc, unused-ignore]
    API_KEY = 55  # pyright: ignore[reportAssignmentType]
    API_VERSION = 1  # pyright: ignore[reportAssignmentType]
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _QuorumResponse
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                ("partitions", CompactArray(("partition", Int32), ("tags", TaggedFields))),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _QuorumRequest(Request[_QuorumRequestV1]):  # type: ignore[misc, unused-ignore]
    API_KEY = 55

    def build(self, request_struct_class: type[_QuorumRequestV1]) -> _QuorumRequestV1:
        """See aiokafka."""
        return request_struct_class([("__cluster_metadata", [(0, {})], {})], {})


async def clock_skew_ms(admin: AIOKafkaAdminClient) -> tuple[int, int] | None:
    """How far the cluster's clock is ahead of ours, and by how much that may be wrong; None if it does not say."""
    node = admin._client.get_random_node()  # noqa: SLF001 - it has no public way to send a request of one's own
    asked_ms = time.time_ns() // 1_000_000
    try:
        response: Any = await admin._client.send(node, _QuorumRequest())  # noqa: SLF001
    except kafka.KafkaError:
        return None
    got_ms = time.time_ns() // 1_000_000
    if response.error_code or not response.topics:
        return None
    _, ((_, error, leader, _, _, voters, *_), *_), *_ = response.topics[0]
    now_ms = next((caught_up for replica, _, _, caught_up, *_ in voters if replica == leader), -1)
    if error or now_ms < 0:
        return None
    return now_ms - (asked_ms + got_ms) // 2, (got_ms - asked_ms + 1) // 2
