"""Reads topics from their first record to their end, as anybody may, after all is over.

A record that cannot be read is left out: klatch wrote none, so the judge misses what should have stood there.
"""

from collections import defaultdict
from collections.abc import Sequence

from klatch_schemas import codec
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import Namespace, Topic
from klatch_streams.log import Log
from klatch_streams.snapshots import stood
from klatch_workers.torture.evidence import Entry, Kept
from klatch_workers.torture.system import Read, by_contract


async def read_back(log: Log, namespace: Namespace, topic: Topic) -> list[Record]:
    """All records of a topic, in log order within each partition. Raises LogError."""
    name = namespace.of(topic)
    records, tail = list[Record](), await log.tail()
    ends = dict[Partition, int]()
    try:
        for number in range(await log.partitions(name)):
            partition = Partition(name, number)
            first, end = await log.bounds(partition)
            if first < end:
                ends[partition] = end
                tail.follow(partition, first)
        while ends:
            for record in await tail.read(1000):
                records.append(record)
                if record.offset + 1 >= ends.get(record.partition, 0):
                    ends.pop(record.partition, None)
    finally:
        await tail.close()
    return records


def entries(records: Sequence[Record], read: Read = by_contract) -> list[Entry]:
    """What they say; nothing of those that cannot be read."""
    return [
        Entry(*record.partition, record.offset, record.timestamp_ms, _event_id(record), said)
        for record in records
        for said in read(record)
    ]


def snapshots(records: Sequence[Record]) -> list[Kept]:
    """The snapshots that stood in a topic of them; compaction has left the last of each key, and the newest others."""
    by_partition = defaultdict[Partition, list[Record]](list)
    for record in records:
        by_partition[record.partition].append(record)
    return [
        Kept(*partition, one.at, one.key, one.saved.applied, one.saved.parts)
        for partition, its in by_partition.items()
        for one in stood(partition, its)
    ]


def _event_id(record: Record) -> str:
    return (record.header(codec.EVENT_ID) or b"").decode()
