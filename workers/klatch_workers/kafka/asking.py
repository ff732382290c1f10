# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types: this module is where they end.
"""Ask a broker which members of its cluster are alive."""

from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped, unused-ignore]
from aiokafka.errors import KafkaError  # type: ignore[import-untyped, unused-ignore]


async def live_members(bootstrap: str) -> frozenset[int]:
    """The node ids that the broker at `bootstrap` counts as alive; none while it cannot say."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=5000)
    try:
        await admin.start()
        cluster = await admin.describe_cluster()
    except KafkaError:
        return frozenset()
    finally:
        await admin.close()
    return frozenset(int(broker["node_id"]) for broker in cluster["brokers"])
