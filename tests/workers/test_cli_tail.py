"""What `klatch tail` follows, and how it shows it."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from klatch_schemas import codec
from klatch_schemas.events import Event, Status, StreamAttempt, StreamCancel, StreamEnd, StreamRetract, Usage
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import CHAT_STREAM, Namespace
from klatch_streams.log import OffsetGone
from klatch_streams.memory_log import MemoryLog
from klatch_workers.cli.context import CommandFailed
from klatch_workers.cli.tail import Wanted, follow, tail
from klatch_workers.cli.tail_view import JsonView, RawView, Said, TextView, View

TOPIC = CHAT_STREAM.name


class Town:
    """A log with streams in it."""

    def __init__(self) -> None:
        self.now_ms = 1_000
        self.log = MemoryLog({TOPIC: 4}, now_ms=lambda: self.now_ms)
        self._seq = dict[str, int]()

    async def event(self, conversation: str, event: Event) -> None:
        await self.log.append([codec.draft(TOPIC, conversation, event)])

    @property
    def place(self) -> Partition:
        """Where the conversation `c` stands."""
        return self.log.records(TOPIC)[0].partition

    async def open(self, request: str, attempt: int = 1, conversation: str = "c", mode: str = "restart") -> None:
        self._seq[request] = 0
        names = {"request": request, "conversation": conversation, "tenant": "acme"}
        opened = StreamAttempt.model_validate({**names, "attempt": attempt, "writer": f"w{attempt}", "mode": mode})
        await self.event(conversation, opened)

    async def say(self, request: str, text: str, attempt: int = 1, conversation: str = "c") -> None:
        chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
        prefix = codec.delta_prefix(request, attempt, f"w{attempt}")
        value = codec.encode_delta(prefix, self._seq[request], chunk)
        await self.log.append([codec.delta_draft(TOPIC, conversation.encode(), None, value)])
        self._seq[request] += 1

    def restart(self, request: str) -> None:
        """The next delta has number 0 again."""
        self._seq[request] = 0

    def skip(self, request: str, count: int) -> None:
        """Deltas that never stand in the log."""
        self._seq[request] += count

    async def end(self, request: str, status: Status = "completed", attempt: int = 1, conversation: str = "c") -> None:
        end = StreamEnd(
            request=RequestId(request),
            tenant=Tenant("acme"),
            conversation=Conversation(conversation),
            attempt=attempt,
            writer=Writer(f"w{attempt}"),
            seq=self._seq.get(request, 0),
            status=status,
            usage=Usage(completion_tokens=2),
        )
        await self.event(conversation, end)

    async def cancel(self, request: str, conversation: str = "c") -> None:
        names: dict[str, Any] = {"request": request, "tenant": "acme", "conversation": conversation}
        await self.event(conversation, StreamCancel.model_validate({**names, "by": "me"}))

    async def shown(self, wanted: Wanted, view: View | None = None, since: str | int = "beginning") -> None:
        """Follow until the wanted request has ended."""
        async with asyncio.timeout(20):
            await follow(self.log, Namespace(), wanted, since, view or TextView())


@pytest.fixture
def town() -> Town:
    return Town()


async def test_the_text_of_a_request_stands_under_its_id_until_its_end(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    await town.open("r1")
    for word in ("Hello ", "world"):
        await town.say("r1", word)
    await town.end("r1")
    await town.shown(Wanted(request="r1"))
    assert capsys.readouterr().out == "── r1  c\nHello world\n── completed, 2 tokens\n"


async def test_a_restart_and_a_retraction_are_said_where_they_happen(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    await town.open("r1")
    await town.say("r1", "void")
    await town.open("r1", attempt=2)
    await town.say("r1", "late", attempt=1)
    town.restart("r1")
    await town.say("r1", "stands", attempt=2)
    retract = StreamRetract(request=RequestId("r1"), tenant=Tenant("acme"), conversation=Conversation("c"), from_seq=0)
    await town.event("c", retract)
    await town.end("r1", attempt=2)
    await town.shown(Wanted(request="r1"))
    out = capsys.readouterr().out
    assert "void\n── attempt 2: what was said before is void\nstands\n── taken back from delta 0 on\n" in out
    assert "late" not in out


async def test_two_replies_at_once_are_shown_one_after_the_other(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    for request in ("r1", "r2"):
        await town.open(request)
    for one, other in (("a", "1"), ("b", "2"), ("c", "3")):
        await town.say("r1", one)
        await town.say("r2", other)
    await town.end("r1")
    await town.end("r2")
    await _all(town, TextView())
    assert capsys.readouterr().out == ("── r1  c\nabc\n── completed, 2 tokens\n── r2  c\n123\n── completed, 2 tokens\n")


async def test_a_reply_that_pauses_gives_way(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    for request in ("r1", "r2"):
        await town.open(request)
    await town.say("r1", "thinking…")
    town.now_ms += 1_500
    await town.say("r2", "quick")
    await town.end("r2")
    await town.say("r1", " done")
    await town.end("r1")
    await _all(town, TextView())
    assert capsys.readouterr().out == (
        "── r1  c\nthinking…\n── r2  c\nquick\n── completed, 2 tokens\n"
        "── r1  c  (goes on)\n done\n── completed, 2 tokens\n"
    )


async def test_the_end_after_a_cancel_is_not_a_stream_of_its_own(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    await town.open("r1")
    await town.say("r1", "half")
    await town.cancel("r1")
    await town.end("r1", "cancelled")
    await _all(town, TextView())
    assert capsys.readouterr().out == "── r1  c\nhalf\n── cancelled\n"


async def test_of_a_stream_that_began_earlier_nothing_is_said_to_stand(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    await town.open("r1")
    await town.say("r1", "before")
    view = TextView()
    for record in town.log.records(TOPIC)[1:]:
        said = codec.decode(record.value)
        assert isinstance(said, codec.Delta)
        view.show(record, said)
    assert capsys.readouterr().out == ""


async def test_only_one_conversation_is_shown(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    for request, conversation in (("r1", "c"), ("r2", "d")):
        await town.open(request, conversation=conversation)
        await town.say(request, f"in {conversation}", conversation=conversation)
        await town.end(request, conversation=conversation)
    await _all(town, TextView(), Wanted(conversation="d"))
    assert capsys.readouterr().out == "── r2  d\nin d\n── completed, 2 tokens\n"


async def test_json_is_one_object_a_record_with_its_place(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    await town.open("r1")
    await town.say("r1", "hi")
    await town.end("r1")
    await town.shown(Wanted(request="r1"), JsonView())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["stream.attempt.v1", "stream.delta.v1", "stream.end.v1"]
    assert [line["offset"] for line in lines] == [0, 1, 2]
    assert lines[1]["chunk"] == {"choices": [{"index": 0, "delta": {"content": "hi"}}]}
    assert lines[2]["status"] == "completed"


async def test_raw_is_what_stands_in_the_log_whatever_it_is(town: Town, capsysbinary: Any) -> None:
    await town.log.append([Draft(TOPIC, b"c", b"no json")])
    await town.open("r1")
    await _all(town, RawView())
    out: bytes = capsysbinary.readouterr().out
    assert out.splitlines() == [record.value for record in town.log.records(TOPIC)[:2]]


async def test_a_record_that_cannot_be_read_is_named_and_the_rest_goes_on(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    await town.log.append([Draft(TOPIC, b"c", b"no json")])
    await town.open("r1")
    await town.say("r1", "hi")
    await town.end("r1")
    await _all(town, TextView())
    heard = capsys.readouterr()
    assert "cannot be read: the value is not JSON" in heard.err
    assert "hi" in heard.out


async def test_retention_that_overtakes_the_reader_is_survived(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    class Overtaken(MemoryLog):
        async def tail(self) -> Any:
            # Between the question where the log begins and the first read, retention takes what was there.
            self.truncate_before(town.log.records(TOPIC)[0].partition, 2)
            return await super().tail()

    town.log = Overtaken({TOPIC: 4})
    await town.open("r1")
    await town.say("r1", "hi")
    await town.open("r2")
    await town.say("r2", "later")
    await town.end("r2")
    await town.shown(Wanted(request="r2"))
    said = capsys.readouterr()
    assert "later" in said.out
    assert "the log has moved on" in said.err


async def test_a_reader_that_retention_overtakes_in_the_middle_of_its_request_is_told_so(town: Town) -> None:
    class Overtaken(TextView):
        def show(self, record: Record, said: Said) -> None:
            super().show(record, said)
            town.log.truncate_before(record.partition, 600)

    await town.open("r1")
    for _ in range(700):
        await town.say("r1", "x")
    with pytest.raises(CommandFailed, match=r"the log has moved on.*begins at 600, and 500 was next"):
        await town.shown(Wanted(request="r1"), Overtaken())


@pytest.mark.parametrize("view", [TextView, JsonView, RawView])
@pytest.mark.parametrize("ending", ["completed", "cancelled", "continued"])
async def test_a_request_whose_beginning_the_log_has_lost_is_told_so(
    town: Town, view: Callable[[], View], ending: str
) -> None:
    await town.open("r1")
    await town.say("r1", "the beginning of")
    if ending == "cancelled":
        await town.cancel("r1")
    if ending == "continued":
        await town.open("r1", attempt=2, mode="continue")
    await town.end("r1", attempt=2 if ending == "continued" else 1)
    town.log.truncate_before(town.place, 1)
    with pytest.raises(CommandFailed, match="no longer holds the beginning of this request"):
        await town.shown(Wanted(request="r1"), view())


async def test_a_request_whose_beginning_is_gone_is_told_so_at_its_end_too(town: Town) -> None:
    await town.open("r1")
    await town.say("r1", "the beginning of")
    town.log.truncate_before(town.place, 1)
    until = _Until(TextView())
    following = asyncio.create_task(town.shown(Wanted(request="r1"), until))
    await until.reached_delta.wait()
    await town.end("r1")
    with pytest.raises(CommandFailed, match="no longer holds the beginning of this request"):
        await following


async def test_a_request_that_began_before_the_place_that_was_named_can_be_read_from_the_beginning(town: Town) -> None:
    await town.open("r1")
    await town.say("r1", "the beginning of")
    town.now_ms = time.time_ns() // 1_000_000
    await town.say("r1", "the rest")
    await town.end("r1")
    with pytest.raises(CommandFailed, match="read it with --from beginning"):
        await town.shown(Wanted(request="r1"), since=60)
    await town.shown(Wanted(request="r1"))


async def test_an_attempt_that_began_anew_behind_what_is_gone_is_the_whole_request(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    await town.open("r1")
    await town.say("r1", "gone")
    await town.open("r1", attempt=2)
    await town.say("r1", "whole", attempt=2)
    await town.end("r1", attempt=2)
    town.log.truncate_before(town.place, 1)
    await town.shown(wanted := Wanted(request="r1"))
    assert wanted.status == "completed"
    assert "whole" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["said more", "ended", "cancelled"])
async def test_a_request_of_which_the_log_lacks_deltas_is_shown_to_its_end_and_is_an_error(
    town: Town, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await town.open("r1")
    await town.say("r1", "one")
    town.skip("r1", 2)
    if ending != "ended":
        await town.say("r1", "four")
    await (town.cancel("r1") if ending == "cancelled" else town.end("r1"))
    wanted = Wanted(request="r1")
    with pytest.raises(CommandFailed, match="the log lacks deltas 1 to 2 of this request"):
        await town.shown(wanted)
    assert wanted.status == ("cancelled" if ending == "cancelled" else "completed")
    out = capsys.readouterr().out
    assert "one\n── deltas 1 to 2 are missing\n" in out
    assert f"── {wanted.status}" in out


async def test_what_is_missing_of_an_attempt_that_was_void_is_no_error(town: Town) -> None:
    await town.open("r1")
    town.skip("r1", 2)
    await town.say("r1", "four")
    await town.open("r1", attempt=2)
    await town.say("r1", "whole", attempt=2)
    await town.end("r1", attempt=2)
    await town.shown(wanted := Wanted(request="r1"))
    assert wanted.status == "completed"


async def test_a_request_that_was_cancelled_before_it_began_is_told_as_cancelled(town: Town) -> None:
    await town.cancel("r1")
    await town.shown(wanted := Wanted(request="r1"))
    assert wanted.status == "cancelled"


@pytest.mark.parametrize("place", ["yesterday", "10m", "-10", "-1y"])
def test_a_place_that_is_none_is_refused_with_those_there_are(place: str) -> None:
    said = CliRunner().invoke(tail, ["--from", place])
    assert said.exit_code == 2
    assert "beginning, end" in said.output


class _Until:
    """A view up to a marker, which is not shown."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.reached = asyncio.Event()
        self.reached_delta = asyncio.Event()

    def show(self, record: Record, said: Said) -> None:
        if said.request == "marker":
            self.reached.set()
        else:
            self._view.show(record, said)
        if isinstance(said, codec.Delta):
            self.reached_delta.set()

    def unreadable(self, record: Record, reason: str) -> None:
        self._view.unreadable(record, reason)

    def moved(self, gone: OffsetGone) -> None:
        self._view.moved(gone)


async def _all(town: Town, view: View, wanted: Wanted | None = None) -> None:
    """Show all there is in a conversation."""
    wanted = wanted or Wanted()
    until = _Until(view)
    await town.cancel("marker", wanted.conversation or "c")
    following = asyncio.create_task(follow(town.log, Namespace(), wanted, "beginning", until))
    async with asyncio.timeout(20):
        await until.reached.wait()
    following.cancel()
    await asyncio.wait([following])
