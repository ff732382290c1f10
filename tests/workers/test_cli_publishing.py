"""Publishing many requests on a log, and waiting for their replies."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, Event, Status, StreamAttempt, StreamCancel, StreamEnd, StreamError
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, Namespace
from klatch_streams.log import AppendFailed
from klatch_streams.memory_log import MemoryLog
from klatch_workers.cli.context import CommandFailed
from klatch_workers.cli.publishing import MOST_IN_FLIGHT, Line, Published, Publishing
from klatch_workers.cli.replies import Finished, Replies
from klatch_workers.cli.request_lines import Defaults

TOPICS: dict[str, int] = {CHAT_REQUESTS.name: 1, CHAT_STREAM.name: 4}
ACME = Defaults(tenant=Tenant("acme"))


def line(number: int, request: str | None = None, text: str = "hi") -> Line:
    said = {"messages": [{"role": "user", "content": text}], **({"request": request} if request else {})}
    return Line(number, json.dumps(said).encode())


async def each(*lines: Line) -> AsyncIterator[Line]:
    for one in lines:
        yield one


@dataclass
class Heard:
    """A listener that remembers."""

    announced: list[str] = field(default_factory=list[str])
    published_: list[Published] = field(default_factory=list[Published])
    refused_: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def publishing(self, request: ChatRequested) -> None:
        self.announced.append(request.request)

    def published(self, published: Published) -> None:
        self.published_.append(published)

    def refused(self, number: int, reason: str, request: ChatRequested | None) -> None:
        self.refused_.append((number, reason))
        if request:
            self.announced.remove(request.request)


async def test_requests_stand_in_the_order_of_their_lines_however_late_they_are_acknowledged() -> None:
    slow, all_wait, waiting = asyncio.Event(), asyncio.Event(), 0

    async def appending(_: Sequence[Draft]) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 50:
            all_wait.set()
        await slow.wait()

    log, heard = MemoryLog(TOPICS, appending=appending), Heard()
    lines = [line(number, f"r{number}") for number in range(1, 51)]
    running = asyncio.create_task(Publishing(log, Namespace(), ACME, heard).run(each(*lines)))
    await all_wait.wait()
    assert not heard.published_
    slow.set()
    await running
    assert [one.request.request for one in heard.published_] == [f"r{number}" for number in range(1, 51)]
    assert [one.offset for one in heard.published_] == list(range(50))
    said = [codec.decode_as(ChatRequested, record.value).request for record in log.records(CHAT_REQUESTS.name)]
    assert said == [f"r{number}" for number in range(1, 51)]


async def test_no_more_than_a_thousand_are_on_their_way() -> None:
    stuck, waiting = asyncio.Event(), 0

    async def appending(_: Sequence[Draft]) -> None:
        nonlocal waiting
        waiting += 1
        await stuck.wait()

    log, heard = MemoryLog(TOPICS, appending=appending), Heard()
    lines = [line(number) for number in range(3 * MOST_IN_FLIGHT)]
    running = asyncio.create_task(Publishing(log, Namespace(), ACME, heard).run(each(*lines)))
    before = -1
    while before != waiting:  # until nothing moves any more
        before = waiting
        for _ in range(10):
            await asyncio.sleep(0)
    assert MOST_IN_FLIGHT <= waiting <= MOST_IN_FLIGHT + 2
    stuck.set()
    await running
    assert len(heard.published_) == 3 * MOST_IN_FLIGHT


async def test_a_bad_line_is_named_and_the_rest_goes_on() -> None:
    log, heard = MemoryLog(TOPICS), Heard()
    publishing = Publishing(log, Namespace(), ACME, heard)
    await publishing.run(each(line(1, "r1"), Line(2, b"{}"), Line(3, b"  "), Line(4, b"nonsense"), line(5, "r5")))
    assert [one.request.request for one in heard.published_] == ["r1", "r5"]
    assert [number for number, _ in heard.refused_] == [2, 4]
    assert "messages" in heard.refused_[0][1]
    assert (publishing.published, publishing.refused) == (2, 2)


async def test_a_request_larger_than_a_record_may_be_is_a_bad_line() -> None:
    log, heard = MemoryLog(TOPICS), Heard()
    await Publishing(log, Namespace(), ACME, heard).run(each(line(1, text="x" * 2_000_000), line(2, "r2")))
    assert [one.request.request for one in heard.published_] == ["r2"]
    assert [number for number, _ in heard.refused_] == [1]
    assert heard.announced == ["r2"], "nobody may wait for the reply to what was not published"


async def test_a_log_that_does_not_acknowledge_ends_it_all() -> None:
    log, heard = MemoryLog(TOPICS), Heard()
    log.fail_next_append()
    with pytest.raises(AppendFailed):
        await Publishing(log, Namespace(), ACME, heard).run(each(*(line(number) for number in range(100))))


class Writing:
    """Writes the stream of one request."""

    def __init__(self, log: MemoryLog, request: ChatRequested) -> None:
        self.log, self.request, self.seq = log, request, 0

    async def event(self, event: Event) -> None:
        await self.log.append([codec.draft(CHAT_STREAM.name, self.request.conversation, event)])

    async def open(self, attempt: int = 1, tenant: str = "acme") -> None:
        self.seq = 0
        names = {"request": self.request.request, "conversation": self.request.conversation}
        await self.event(StreamAttempt.model_validate({**names, "tenant": tenant, "attempt": attempt, "writer": "w"}))

    async def say(self, text: str, attempt: int = 1) -> None:
        chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
        value = codec.encode_delta(codec.delta_prefix(self.request.request, attempt, "w"), self.seq, chunk)
        await self.log.append([codec.delta_draft(CHAT_STREAM.name, self.request.conversation.encode(), None, value)])
        self.seq += 1

    async def end(self, status: Status = "completed", attempt: int = 1, lost: int = 0, tenant: str = "acme") -> None:
        await self.event(
            StreamEnd(
                request=self.request.request,
                tenant=Tenant(tenant),
                conversation=self.request.conversation,
                attempt=attempt,
                writer=Writer("w"),
                seq=self.seq + lost,
                status=status,
                error=StreamError(code="model_error", message="it broke") if status == "failed" else None,
            )
        )


def request(name: str = "r1", conversation: str = "c1") -> ChatRequested:
    return ChatRequested(
        request=RequestId(name), tenant=Tenant("acme"), conversation=Conversation(conversation), body={"messages": []}
    )


async def waited(log: MemoryLog, *requests: ChatRequested, patience_s: float = 30) -> tuple[Replies, list[Finished]]:
    finished = list[Finished]()
    replies = await Replies.open(log, Namespace(), finished.append, patience_s)
    for one in requests:
        replies.expect(one)
    replies.complete()
    return replies, finished


async def test_replies_are_put_together_by_the_contracts_rule() -> None:
    log = MemoryLog(TOPICS)
    one, other = request("r1", "c1"), request("r2", "c2")
    replies, finished = await waited(log, one, other)
    first, second = Writing(log, one), Writing(log, other)
    await first.open()
    await first.say("void ")
    await second.open()
    await second.say("second")
    await first.open(attempt=2)
    await first.say("that ", attempt=2)
    await first.say("stands", attempt=2)
    await second.end("failed")
    await first.end(attempt=2)
    await replies.run()
    await replies.close()
    assert {(one.request.request, one.status, one.text) for one in finished} == {
        ("r1", "completed", "that stands"),
        ("r2", "failed", "second"),
    }


async def test_another_tenants_stream_under_the_same_id_is_not_ours() -> None:
    log = MemoryLog(TOPICS)
    replies, finished = await waited(log, request())
    writing = Writing(log, request())
    await writing.open(attempt=1, tenant="globex")
    await writing.end(attempt=1, tenant="globex")
    await writing.open()
    await writing.say("ours")
    await writing.end()
    await replies.run()
    await replies.close()
    assert [(one.status, one.text) for one in finished] == [("completed", "ours")]


async def test_a_reply_with_a_gap_ends_and_says_so() -> None:
    log = MemoryLog(TOPICS)
    replies, finished = await waited(log, request())
    writing = Writing(log, request())
    await writing.open()
    await writing.say("half")
    await writing.end(lost=2)
    await replies.run()
    await replies.close()
    assert [(one.broken, one.text) for one in finished] == [(True, "half")]


async def test_a_cancel_ends_the_wait() -> None:
    log = MemoryLog(TOPICS)
    replies, finished = await waited(log, request())
    cancel = StreamCancel(
        request=RequestId("r1"), tenant=Tenant("acme"), conversation=Conversation("c1"), by="somebody"
    )
    await Writing(log, request()).event(cancel)
    await replies.run()
    await replies.close()
    assert [one.status for one in finished] == ["cancelled"]


async def test_a_silence_that_lasts_too_long_is_an_error_that_counts_what_is_open() -> None:
    replies, _ = await waited(MemoryLog(TOPICS), request(), patience_s=0.1)
    with pytest.raises(CommandFailed, match="1 replies have not ended"):
        await replies.run()
    await replies.close()
