# pyright: reportMissingTypeStubs=false
# aiokafka has no types.
"""Records that nobody can use, in every topic: no stage stops, nothing is lost, and the next request is answered."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import uuid4

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer

from klatch_schemas import codec
from klatch_schemas.events import (
    ApiKey,
    ChatRequested,
    Limits,
    SkillRegistered,
    StreamEnd,
    TenantConfigured,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Record
from klatch_schemas.topics import (
    CHAT_ADMITTED,
    CHAT_REQUESTS,
    CHAT_STREAM,
    CHAT_TURNS,
    DEAD_LETTERS,
    TENANTS,
    TOPICS,
    TRUST_VERDICTS,
    Topic,
)
from klatch_streams import dead_headers as dead

if TYPE_CHECKING:
    from tests.broker.conftest import Stack

pytestmark = pytest.mark.broker

CONSUMED: Final = (CHAT_REQUESTS, CHAT_ADMITTED, TRUST_VERDICTS, CHAT_STREAM, CHAT_TURNS)
LARGEST: Final = int(DEAD_LETTERS.config["max.message.bytes"]) - 1_000
"""A little below what a broker accepts, and more than klatch itself would write."""

OTHERS_KIND: Final = codec.encode(SkillRegistered(name="weather", version=1, description="", parameters={}))
BAD: Final[dict[str, bytes | None]] = {
    "malformed": b'{"kind":"chat.req',
    "empty": b"",
    "no value": None,
    "no object": b"[1, 2]",
    "unknown kind": b'{"kind":"no.such.v1"}',
    "newer and different": b'{"kind":"chat.requested.v9","everything":"is different"}',
    "another topic's kind": OTHERS_KIND,
    "deeply nested": b'{"kind":"chat.requested.v1","body":' + b"[" * 100_000,
    "invalid UTF-8": b'{"kind":"stream.delta.v1","request":"\xff\xfe"}',
    "a chunk of invalid UTF-8": codec.encode_delta(codec.delta_prefix("r", 1, "w"), 0, b'{"\xff":1}'),
    "a number past all numbers": b'{"kind":"chat.turn.v1","attempt":1e999}',
    "oversized": b'{"kind":"chat.requested.v1","x":"' + b"x" * LARGEST,
}


class Place(NamedTuple):
    topic: str
    partition: int
    offset: int


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def producer(stack: "Stack") -> AsyncIterator[Any]:
    """A producer that klatch has not made: it writes what it is told to."""
    async with AIOKafkaProducer(bootstrap_servers=stack.bootstrap, max_request_size=LARGEST + 10_000) as producer:
        yield producer


async def spoil(stack: "Stack", producer: Any, topic: Topic) -> dict[Place, bytes | None]:
    """Write every bad record into the topic, each under a key of its own."""
    name, written = stack.namespace.of(topic), dict[Place, bytes | None]()
    for what, value in BAD.items():
        at = await producer.send_and_wait(name, value, key=uuid4().hex.encode(), headers=[("what", what.encode())])
        written[Place(at.topic, at.partition, at.offset)] = value
    return written


def place_of(letter: Record) -> Place | None:
    """Where a dead letter comes from; None for one of those that this test has put there itself."""
    topic, number, offset = (letter.header(name) for name in (dead.TOPIC, dead.PARTITION, dead.OFFSET))
    return Place(topic.decode(), int(number), int(offset)) if topic and number and offset else None


async def letters(stack: "Stack", places: Sequence[Place]) -> dict[Place, Record]:
    """The dead letters there are, once those of these records have come."""
    found, left = dict[Place, Record](), set(places)

    def look(record: Record) -> bool:
        if place := place_of(record):
            found.setdefault(place, record)
            left.discard(place)
        return not left

    await stack.until_record(DEAD_LETTERS, look)
    return found


@pytest.mark.parametrize("topic", CONSUMED, ids=lambda topic: topic.name)
async def test_what_a_stage_cannot_use_is_a_dead_letter_and_the_next_request_is_answered(
    stack: "Stack", producer: Any, topic: Topic
) -> None:
    written = await spoil(stack, producer, topic)
    found = await letters(stack, list(written))
    for place, value in written.items():
        letter = found[place]
        cut = letter.header(dead.CUT)
        if cut:
            assert value
            assert int(cut) == len(value) >= LARGEST
            assert letter.value
            assert value.startswith(letter.value)
        else:
            assert letter.value == value
        assert letter.header(dead.REASON)
        assert letter.header("what") in {what.encode() for what in BAD}
        assert letter.key
    assert await stack.text("fake?text=still here") == "still here"


@pytest.mark.parametrize("topic", [topic for topic in TOPICS if topic not in CONSUMED], ids=lambda topic: topic.name)
async def test_what_stands_in_other_topics_stops_nobody(stack: "Stack", producer: Any, topic: Topic) -> None:
    await spoil(stack, producer, topic)
    assert await stack.text("fake?text=still here") == "still here"


async def test_a_ledger_passes_over_what_it_cannot_use_says_so_and_follows_on(stack: "Stack", producer: Any) -> None:
    written = await spoil(stack, producer, TENANTS)
    key, name = f"key-{uuid4().hex}", Tenant(f"new-{uuid4().hex[:8]}")
    digest = ApiKey(id="k", sha256=stack.digest(key))
    tenant = TenantConfigured(tenant=name, keys=(digest,), limits=Limits())
    await producer.send_and_wait(stack.namespace.of(TENANTS), codec.encode(tenant), key=name.encode())
    stack.keys[name] = key
    status = 401
    while status == 401:  # until the door has read it
        async with stack.ask("fake", tenant=name, stream=False) as answer:
            status = answer.status
    assert status == 200
    said = (stack.up.data / "logs" / "http.log").read_text()
    for place in (place for place, value in written.items() if value is not None):  # a tombstone takes nothing away
        assert f'"offset": {place.offset}' in said


async def test_stages_restore_past_what_stands_in_their_snapshots(stack: "Stack", producer: Any) -> None:
    for topic in TOPICS:
        if topic.name.endswith(".state"):
            await spoil(stack, producer, topic)
    conversation = f"kept-{uuid4().hex}"
    assert await stack.text("fake?text=one", "first", conversation=conversation) == "one"
    await asyncio.gather(stack.up.kill("admission"), stack.up.kill("generation"))
    said = await stack.text("fake?reply=echo-messages", "second", conversation=conversation)
    assert '"first"' in said


async def test_a_request_under_a_wrong_key_and_in_a_wrong_partition_is_answered_once(
    stack: "Stack", producer: Any
) -> None:
    request = RequestId(str(uuid4()))
    said = ChatRequested(
        request=request,
        tenant=Tenant("acme"),
        conversation=Conversation("moved"),
        body={"model": "fake?text=found", "messages": [{"role": "user", "content": "hi"}]},
    )
    for number in range(2):
        draft = codec.draft(stack.namespace.of(CHAT_REQUESTS), said.tenant, said)
        await producer.send_and_wait(draft.topic, draft.value, key=b"no tenant", partition=number)
    story = await stack.story(request)
    assert [end.status for end in story.ends] == ["completed"]
    assert len(story.settlements) == len(story.told) == 1


async def test_a_newer_version_that_still_fits_is_read(stack: "Stack", producer: Any) -> None:
    end = StreamEnd(
        request=RequestId(str(uuid4())),
        tenant=Tenant("acme"),
        conversation=Conversation("newer"),
        writer=Writer("w"),
        status="completed",
    )
    value = codec.encode(end).replace(b"stream.end.v1", b"stream.end.v7").replace(b'{"kind"', b'{"new":1,"kind"')
    at = await producer.send_and_wait(stack.namespace.of(CHAT_STREAM), value, key=b"newer")
    marker = await producer.send_and_wait(at.topic, b"after it", partition=at.partition)
    found = await letters(stack, [Place(marker.topic, marker.partition, marker.offset)])
    assert Place(at.topic, at.partition, at.offset) not in found
