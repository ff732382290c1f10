# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types; this module is the typed face of its admin client.
"""Creating and describing topics: plain facts in and out."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka.wire import Wire
from klatch_streams.log import LogError

_LEADERS_S = 10.0


class Found(NamedTuple):
    """A topic as it is."""

    partitions: int
    replication: int
    led: bool
    """Whether every partition has a leader."""


class Wanted(NamedTuple):
    """A topic as it shall be."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]


class Admin:
    """An administrator of one cluster."""

    def __init__(self, client: AIOKafkaAdminClient) -> None:
        self._client = client

    async def topics(self, names: Sequence[str]) -> dict[str, Found]:
        """Those of `names` that exist."""
        # Asked for all: asking for a topic by name creates it on a cluster that creates topics by itself.
        described = await self._client.describe_topics()
        return {
            topic["topic"]: Found(
                len(topic["partitions"]),
                min(len(part["replicas"]) for part in topic["partitions"]),
                all(part["leader"] >= 0 for part in topic["partitions"]),
            )
            for topic in described
            if topic["topic"] in names and topic["partitions"] and topic["error_code"] == 0
        }

    async def configs(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """The configuration in force of each topic."""
        if not names:
            return {}
        asked = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        found = dict[str, dict[str, str]]()
        responses: list[Any] = await self._client.describe_configs(asked)
        for response in responses:
            for code, message, _, name, entries in response.resources:
                if code:
                    raise LogError(f"the configuration of {name} cannot be read: {message or kafka.for_code(code)}")
                found[name] = {entry[0]: entry[1] for entry in entries}
        return found

    async def create(self, wanted: Sequence[Wanted]) -> list[str]:
        """Create topics, all in one request; returns the names of those that were not there already."""
        topics = [NewTopic(one.name, one.partitions, one.replication, topic_configs=dict(one.config)) for one in wanted]
        response: Any = await self._client.create_topics(topics)
        errors = {name: (kafka.for_code(code), message) for name, code, *message in response.topic_errors}
        for name, (error, message) in errors.items():
            if error not in {kafka.NoError, kafka.TopicAlreadyExistsError}:
                raise LogError(f"{name} was not created: {(message or [None])[0] or error.__name__}")
        return [one.name for one in wanted if errors[one.name][0] is kafka.NoError]

    async def until_led(self, names: Sequence[str]) -> None:
        """Wait until every partition of `names` has a leader that the brokers know of."""
        deadline = time.monotonic() + _LEADERS_S
        while True:
            found = await self.topics(names)
            if len(found) == len(names) and all(topic.led for topic in found.values()):
                return
            if time.monotonic() > deadline:
                missing = [name for name in names if name not in found or not found[name].led]
                raise LogError(f"no leader after {_LEADERS_S:g} s for {', '.join(missing)}: are all brokers up?")
            await asyncio.sleep(0.05)


@asynccontextmanager
async def administrator(options: KafkaOptions) -> AsyncGenerator[Admin, None]:
    """An administrator while it is needed. Raises Unreachable, LogError."""
    # For its patience with a broker that is coming up, and its error message.
    await (await Wire.open(options)).close()
    client = AIOKafkaAdminClient(bootstrap_servers=options.bootstrap, client_id=options.client_id, **options.security())
    try:
        await client.start()
        yield Admin(client)
    except kafka.KafkaError as error:
        raise LogError(f"Kafka at {options.bootstrap} refused: {error!r}") from error
    finally:
        await client.close()
