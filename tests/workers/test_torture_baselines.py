"""What baselines of `klatch torture` say is read as consumers read it, and judged by the same judge as klatch."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import pytest

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.events import ChatRequested
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Partition, Record
from klatch_workers.torture.baselines.protocol import ModelFailed, answer
from klatch_workers.torture.baselines.reading import Careful, Usual, reading
from klatch_workers.torture.baselines.system import BASELINES, Baseline
from klatch_workers.torture.evidence import Asked, Entry, Evidence, ModelCall
from klatch_workers.torture.judge import judge
from klatch_workers.torture.load import Turn
from klatch_workers.torture.readback import entries
from klatch_workers.torture.report import BROKEN, Report

TENANT, TALK, ONE = Tenant("acme"), Conversation("talk"), RequestId("talk.0")
TOKENS = 3
Line = dict[str, Any]


def chunk(delivery: str, seq: int, call: str = "") -> Line:
    return {"request": ONE, "delivery": delivery, "seq": seq, "text": f"<<{call or delivery}:{seq}>>"}


def done(delivery: str) -> Line:
    return {"request": ONE, "delivery": delivery, "seq": TOKENS, "done": True}


def reply(delivery: str) -> list[Line]:
    return [*(chunk(delivery, seq) for seq in range(TOKENS)), done(delivery)]


def judged(reader: Callable[[], Usual | Careful], lines: Sequence[Line], *calls: ModelCall) -> Report:
    """What a run comes to in which one request was asked, and `lines` were written a tenth of a second apart."""
    records = [
        Record(Partition("chat.stream", 0), at, 100 * at, TALK.encode(), json.dumps(line).encode())
        for at, line in enumerate(lines)
    ]
    said = ChatRequested(request=ONE, tenant=TENANT, conversation=TALK, body={"messages": []})
    evidence = Evidence(
        asked={ONE: Asked(TENANT, TALK, Turn(0, ONE, TOKENS, 1.0))},
        acknowledged={ONE},
        requests=[Entry("chat.requests", 0, 0, 0, "", said)],
        stream=entries(records, reading(reader)),
        calls=calls,
        bare=True,
    )
    return judge(evidence)


def counts(report: Report) -> dict[str, int]:
    return {kind: report.count(kind) for kind in BROKEN if report.count(kind)}


@pytest.mark.parametrize("reader", [Usual, Careful])
def test_a_reply_that_was_made_once_breaks_no_promise(reader: type[Usual | Careful]) -> None:
    report = judged(reader, reply("c1"))
    assert counts(report) == {}
    assert (report.accepted, report.ended_once) == (1, 1)


CUT = [*reply("c1")[:2], *reply("c2")]
ZOMBIE = [chunk("c1", 0), chunk("c2", 0), chunk("c1", 1), chunk("c2", 1), chunk("c1", 2), chunk("c2", 2), done("c2")]


@pytest.mark.parametrize(
    ("lines", "usual", "careful"),
    [
        pytest.param(CUT, {"spliced": 1}, {}, id="delivered again in mid-reply"),
        pytest.param(ZOMBIE, {"spliced": 1}, {}, id="a zombie speaks beside its successor"),
        pytest.param([*ZOMBIE, done("c1")], {"spliced": 1}, {}, id="a zombie ends after its successor"),
        pytest.param([*ZOMBIE[:-1], done("c1"), done("c2")], {"spliced": 1}, {}, id="a zombie ends first"),
        pytest.param(
            [chunk("c1", 0), *reply("c1")], {"duplicated": 1, "spliced": 1}, {}, id="a record stands there twice"
        ),
        pytest.param(
            [chunk("c1", 0), chunk("c1", 2), done("c1")],
            {"spliced": 1},
            {"spliced": 1},
            id="a record is lost",
        ),
        pytest.param(reply("c1")[:-1], {"lost": 1}, {"lost": 1}, id="it is never done"),
        pytest.param([], {"lost": 1}, {"lost": 1}, id="nobody answers"),
        pytest.param([*reply("c1"), *reply("c2")], {}, {}, id="a second answer after the end is read by nobody"),
    ],
)
def test_what_each_reader_is_shown_is_counted(
    lines: Sequence[Line], usual: dict[str, int], careful: dict[str, int]
) -> None:
    assert counts(judged(Usual, lines)) == usual
    assert counts(judged(Careful, lines)) == careful


@pytest.mark.parametrize("reader", [Usual, Careful])
def test_an_answer_that_is_made_again_after_its_end_is_counted(reader: type[Usual | Careful]) -> None:
    lines = [*reply("c1"), *reply("c2")]
    assert counts(judged(reader, lines, ModelCall("c2", ONE, 10_000.0))) == {"redone": 1}
    assert counts(judged(reader, lines, ModelCall("c2", ONE, 400.0))) == {}, "it may have begun before it heard"


def test_what_is_no_record_of_the_protocol_is_read_by_nobody() -> None:
    read = reading(Usual)
    for value in (None, b"", b"[]", b'{"request": "r"}', b'{"request": "", "delivery": "d", "seq": 0}'):
        assert read(Record(Partition("chat.stream", 0), 0, 0, None, value)) == []


# --- the worker's part that frameworks share -----------------------------------------------------------------------


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as server:
        yield server


async def answered(upstream: Upstream, model: str, **fields: Any) -> list[dict[str, Any]]:
    body: dict[str, Any] = {"model": model, "messages": []}
    request: dict[str, Any] = {
        "kind": "chat.requested.v1",
        "request": ONE,
        "conversation": TALK,
        "body": body,
        **fields,
    }
    async with aiohttp.ClientSession() as session:
        return [record async for record in answer(session, upstream.url, request)]


async def test_each_chunk_is_a_record_and_the_last_says_that_the_reply_is_done(upstream: Upstream) -> None:
    first = await answered(upstream, "fake?reply=unique&tokens=3")
    again = await answered(upstream, "fake?reply=unique&tokens=3")
    assert [record.get("text") for record in first] == ["<<c0:0>>", "<<c0:1>>", "<<c0:2>>", None]
    assert [record["seq"] for record in first] == [0, 1, 2, 3]
    assert first[-1]["done"] is True
    deliveries = {record["delivery"] for record in first}, {record["delivery"] for record in again}
    assert [len(one) for one in deliveries] == [1, 1]
    assert deliveries[0] != deliveries[1]


@pytest.mark.parametrize("model", ["fake?status=500", "fake?fault=no-finish", "fake?fault=drop"])
async def test_a_model_that_fails_makes_no_reply_that_is_done(upstream: Upstream, model: str) -> None:
    with pytest.raises((ModelFailed, aiohttp.ClientError)):
        await answered(upstream, model)


async def test_what_is_no_request_is_not_answered(upstream: Upstream) -> None:
    assert await answered(upstream, "fake", kind="quota.limit_set.v1") == []
    assert not upstream.calls


# --- as systems under torture --------------------------------------------------------------------------------------


def test_every_framework_that_is_installed_here_has_a_worker() -> None:
    assert [baseline.name for baseline in BASELINES if baseline.installed] == ["faststream", "faust"]
    assert not Baseline("no", "there-is-no-such-framework", "no==1").installed
