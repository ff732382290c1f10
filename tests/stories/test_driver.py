"""The Driver itself: it decides as the production owner of a partition does, and it kills where it is told to."""

from typing import TYPE_CHECKING

import pytest

from klatch_schemas import codec
from klatch_schemas.events import Limits, QuotaLimitSet, StreamDelta
from klatch_schemas.ids import RequestId, Tenant, Writer
from klatch_schemas.records import Draft, Partition
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_STREAM, DEAD_LETTERS, TOPICS, Namespace
from klatch_streams import decider_owner
from klatch_streams.admission import Admission
from klatch_streams.driver import START_MS, DeciderStage, Driver
from klatch_streams.memory_log import MemoryLog

if TYPE_CHECKING:
    from tests.stories.conftest import Story


@pytest.fixture
def drafts(story: "Story") -> list[Draft]:
    """A bit of everything that may stand in `chat.requests`."""
    ask = story.request
    limits = QuotaLimitSet(tenant=Tenant("acme"), limits=Limits(concurrent_requests=2))
    events = [
        limits,
        ask(request="r1"),
        ask(request="r2"),
        ask(request="r1"),
        ask(request="r3"),
        ask(request="r4", deadline_ms=START_MS - 1),
    ]
    return [
        *(codec.draft("chat.requests", "acme", event) for event in events),
        codec.draft("chat.requests", "somebody", ask(request="r5")),
        Draft("chat.requests", b"acme", b"garbage"),
    ]


async def test_the_driver_writes_what_the_production_owner_writes(drafts: list[Draft]) -> None:
    driver = Driver(DeciderStage(Admission()), partitions=1)
    driver.append(*drafts)
    driver.run()

    log = MemoryLog({topic.name: 1 for topic in TOPICS}, now_ms=lambda: START_MS)
    await log.append(drafts)
    stage = decider_owner.DeciderStage(Admission(), log, Namespace())
    owner = await stage.own(Partition("chat.requests", 0), 0)
    await owner.take(log.records("chat.requests"))
    await owner.take(log.records("chat.requests")[len(drafts) :])

    for topic in (CHAT_ADMITTED, CHAT_STREAM, DEAD_LETTERS):
        ours, theirs = driver.records(topic), log.records(topic.name)
        assert [(one.key, one.value, list(one.headers)) for one in ours] == [
            (one.key, one.value, list(one.headers)) for one in theirs
        ]
    assert len(driver.records(CHAT_ADMITTED)) == 5
    await owner.release(0)
    await log.close()


def test_a_stage_is_killed_only_if_it_exists() -> None:
    with pytest.raises(KeyError, match="there are admission"):
        Driver(DeciderStage(Admission())).crash("admision", after=1)


def test_an_event_without_a_key_of_its_own_has_to_be_appended_as_a_draft() -> None:
    delta = StreamDelta(request=RequestId("r1"), attempt=1, writer=Writer("w"), seq=0, chunk={})
    with pytest.raises(TypeError, match="append a draft"):
        Driver(DeciderStage(Admission())).feed(delta)


def test_time_stands_still_until_it_is_moved(story: "Story") -> None:
    driver = Driver(DeciderStage(Admission()))
    driver.feed(story.request(request="r1"))
    driver.advance(500)
    driver.feed(story.request(request="r2"))
    assert [record.timestamp_ms for record in driver.records(CHAT_ADMITTED)] == [START_MS, START_MS + 500]
