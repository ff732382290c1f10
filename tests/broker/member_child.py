"""A member of a consumer group until it is killed.

`python member_child.py BOOTSTRAP GROUP TOPIC SESSION_MS REBALANCE_MS [INSTANCE]`.
It says `joining`, and `assigned` each time that it is.
"""

import asyncio
import sys
from collections.abc import Sequence

from klatch_schemas.records import Partition
from klatch_streams.kafka_log import KafkaLog, KafkaOptions


def say(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


class Telling:
    """Says when it is assigned."""

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        say("assigned" if partitions else "idle")

    async def revoked(self, partitions: Sequence[Partition]) -> None: ...


async def main(
    bootstrap: str, group: str, topic: str, session_ms: str, rebalance_ms: str, instance: str | None = None
) -> None:
    options = KafkaOptions(bootstrap, instance_id=instance, session_ms=int(session_ms), rebalance_ms=int(rebalance_ms))
    log = await KafkaLog.open(options)
    say("joining")
    member = await log.join(group, topic, Telling())
    while True:
        await member.read(1_000)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
