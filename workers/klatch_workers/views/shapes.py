# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types: this module is where they end.
"""How many partitions and replicas topics have, asked before Faust starts.

A table's changelog must have the partitions of its input, and Faust would create an input that is missing, with
whatever it holds to be right.
"""

from collections.abc import Sequence
from typing import NamedTuple

from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped, unused-ignore]
from aiokafka.errors import KafkaError  # type: ignore[import-untyped, unused-ignore]

from klatch_streams.log import LogError, UnknownTopic


class Shape(NamedTuple):
    """Of a topic."""

    partitions: int
    replicas: int


async def shapes_of(kafka: str, topics: Sequence[str]) -> list[Shape]:
    """The shape of each topic. Raises UnknownTopic, LogError."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    try:
        await admin.start()
        described = {found["topic"]: found for found in await admin.describe_topics(list(topics))}
    except (KafkaError, OSError) as error:
        raise LogError(f"Kafka at {kafka} does not answer ({error}): start it, or set KLATCH_KAFKA") from error
    finally:
        await admin.close()
    missing = [topic for topic in topics if not described.get(topic, {}).get("partitions")]
    if missing:
        raise UnknownTopic(f"no topic {missing[0]}; `klatch topics create` makes it")
    return [_shape(described[topic]["partitions"]) for topic in topics]


def _shape(partitions: list[dict[str, list[int]]]) -> Shape:
    return Shape(len(partitions), max(len(partition["replicas"]) for partition in partitions))
