"""Whatever a producer writes into headers, its request is admitted or refused, and judged; nothing stands still."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from klatch_agents.trust.policy import load_policy
from klatch_agents.trust.rules import RulesJudge
from klatch_schemas import codec
from klatch_schemas.events import ChatAdmitted, ChatRequested, TrustVerdict
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft, Headers, Partition
from klatch_schemas.topics import TOPICS, Namespace
from klatch_streams.addresses import MOVED_FROM
from klatch_streams.admission import Admission
from klatch_streams.dead_headers import OURS
from klatch_streams.decider_owner import DeciderStage
from klatch_streams.memory_log import MemoryLog
from klatch_streams.owner import Owner
from klatch_workers.screening import ScreeningStage

ACME = Tenant("acme")
PLACE = Partition("chat.requests", 0)
KNOWN = sorted(
    {codec.EVENT_ID, codec.KIND, codec.TENANT, codec.CAUSE, codec.TRACEPARENT, codec.CONTENT_TYPE, MOVED_FROM, *OURS}
)
SAID = st.none() | st.binary(max_size=60) | st.sampled_from([b"\xff", b"1", b"-1", b"a/0/1", b"9" * 30, b"00-\xff"])
HEADERS = st.lists(st.tuples(st.sampled_from(KNOWN), SAID), max_size=8)
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def request(name: str) -> ChatRequested:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    return ChatRequested(request=RequestId(name), tenant=ACME, conversation=Conversation("talk"), body=body)


async def through_admission_and_screening(*drafts: Draft) -> MemoryLog:
    """A log after both stages have taken `drafts`, and what they moved to where it belongs."""
    log, taken = MemoryLog({topic.name: 1 for topic in TOPICS}), 0
    admission = Admission()
    owners: list[Owner] = [
        await DeciderStage(admission, log, Namespace(), admission.give_up).own(PLACE, 0),
        await ScreeningStage(log, Namespace(), RulesJudge(), load_policy()).own(PLACE, 0),
    ]
    await log.append(drafts)
    while records := log.records("chat.requests")[taken:]:
        taken += len(records)
        for owner in owners:
            await owner.take(records)
    assert [await owner.checkpoint() for owner in owners] == [taken, taken]
    return log


def admitted(log: MemoryLog) -> list[str]:
    return [codec.decode_as(ChatAdmitted, record.value).request.request for record in log.records("chat.admitted")]


def judged(log: MemoryLog) -> list[str]:
    return [codec.decode_as(TrustVerdict, record.value).request for record in log.records("trust.verdicts")]


@settings(max_examples=60, deadline=None)
@given(headers=HEADERS, garbled=HEADERS, misplaced=HEADERS)
async def test_a_request_with_whatever_headers_is_admitted_and_judged_and_what_is_garbled_buried(
    headers: Headers, garbled: Headers, misplaced: Headers
) -> None:
    log = await through_admission_and_screening(
        Draft("chat.requests", b"acme", codec.encode(request("r1")), headers),
        Draft("chat.requests", b"acme", b"garbage", garbled),
        Draft("chat.requests", b"elsewhere", codec.encode(request("r2")), misplaced),
        codec.draft("chat.requests", ACME, request("r3")),
    )
    buried = [int(record.header("dead-offset") or b"") for record in log.records("dead.letters")]
    # One that says it was moved before is not moved again.
    stays = dict(reversed(misplaced)).get(MOVED_FROM)
    assert sorted(admitted(log)) == sorted(judged(log)) == (["r1", "r3"] if stays else ["r1", "r2", "r3"])
    assert buried == ([1, 2] if stays else [1])


async def test_a_trace_is_carried_on_and_what_is_none_is_left_out() -> None:
    for said, carried in ((TRACE, TRACE), (b"\xff", None), (None, None), (b"00-ab", None)):
        headers = [(codec.TRACEPARENT, said)]
        log = await through_admission_and_screening(
            Draft("chat.requests", b"acme", codec.encode(request("r1")), headers)
        )
        for topic in ("chat.admitted", "trust.verdicts"):
            [record] = log.records(topic)
            assert record.header(codec.TRACEPARENT) == carried
