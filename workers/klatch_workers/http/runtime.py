"""What the handlers of one door process share: what it was given, its hub, its clockwork, and its memory."""

import asyncio
from dataclasses import dataclass, field

from klatch_schemas import codec
from klatch_schemas.events import StreamCancel
from klatch_schemas.ids import Conversation, Tenant
from klatch_schemas.records import Draft, Partition, partition_of
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM
from klatch_workers.http.door import Door
from klatch_workers.http.hub import Hub
from klatch_workers.http.intake import Intake
from klatch_workers.http.pulse import Pulse
from klatch_workers.http.reader import Reader, Stream
from klatch_workers.http.recent import Place, Recent
from klatch_workers.http.request_ids import MAX_PARTITIONS


class TooManyPartitions(ValueError):
    """Request ids have room for 4095 partition numbers."""


@dataclass(slots=True)
class Runtime:
    """`start` before the first call, `close` after the last."""

    door: Door
    hub: Hub = field(init=False)
    intake: Intake = field(init=False)
    pulse: Pulse = field(default_factory=Pulse)
    recent: Recent = field(default_factory=Recent)
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who looks through a tenant's requests of a day because a stream is silent."""
    streams: int = 0
    """How many partitions `chat.stream` has."""
    requests: int = 0
    """How many partitions `chat.requests` has."""

    def __post_init__(self) -> None:
        self.hub = Hub(self.door.log, self.door.terms)
        self.intake = Intake(self.door.log, self.door.terms)

    async def start(self) -> None:
        """Look at the topics and begin to read. Raises LogError, TooManyPartitions."""
        self.streams = await self.door.log.partitions(self.stream_topic)
        self.requests = await self.door.log.partitions(self.request_topic)
        if self.streams > MAX_PARTITIONS:
            raise TooManyPartitions(f"{self.stream_topic} has {self.streams} partitions; a door can name 4095")
        self.hub.start()
        self.pulse.members.add(self)
        self.pulse.start()

    async def open(self, stream: Stream, partition: Partition, start: int | None = None) -> Reader:
        """See `Hub.open`; where the reader finds the stream to begin is remembered. Raises LogError."""
        reader = await self.hub.open(stream, partition, start)

        def remember(offset: int, timestamp_ms: int, conversation: Conversation) -> None:
            self.recent.put(stream, Place(partition.number, offset, timestamp_ms, conversation))

        reader.on_found = remember
        return reader

    async def close(self) -> None:
        """Stop; the log is its owner's to close."""
        await self.pulse.close()
        await self.hub.close()

    def __hash__(self) -> int:
        return id(self)

    def beat(self, now: float) -> None:
        """See `Beating`."""
        self.hub.tick(now)

    @property
    def stream_topic(self) -> str:
        """The full name of `chat.stream`."""
        return self.door.namespace.of(CHAT_STREAM)

    @property
    def request_topic(self) -> str:
        """The full name of `chat.requests`."""
        return self.door.namespace.of(CHAT_REQUESTS)

    def requests_of(self, tenant: Tenant) -> Partition:
        """Where the requests of a tenant stand."""
        return Partition(self.request_topic, partition_of(tenant.encode(), self.requests))

    def partition(self, conversation: Conversation) -> Partition:
        """Where the streams of a conversation stand."""
        return Partition(self.stream_topic, partition_of(conversation.encode(), self.streams))

    def cancel_draft(self, stream: Stream, conversation: Conversation, reason: str) -> Draft:
        """A cancel, ready to be appended."""
        event = StreamCancel(
            request=stream.request,
            tenant=stream.tenant,
            conversation=conversation,
            by="client",
            reason=reason,
        )
        return codec.draft(self.stream_topic, conversation, event)
