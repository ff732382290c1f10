# pyright: reportMissingTypeStubs=false
# aiokafka has no types.
"""One log, several streams, every place to resume at: server-sent events, the Python client and the fold tell the same.

The client reads through a consumer that is small and real: aiokafka's two calls that it makes, on the same log.
"""

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from klatch_schemas import client as clients
from klatch_schemas import codec
from klatch_schemas.assembly import Ended, ReplyReader, Said
from klatch_schemas.codec import Delta
from klatch_schemas.errors import KlatchError
from klatch_schemas.events import ChatRequested, StreamAttempt, StreamCancel, StreamEnd, StreamError, StreamRetract
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Draft, Partition
from klatch_streams.memory_log import MemoryLog
from klatch_workers.http.errors import error_of_end

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit

PLACE = Partition("chat.stream", 0)
KINDS = (
    *("plain", "restart", "continue", "cancelled", "cancelled before", "retracted", "zombie", "failed", "refused"),
    *("cancelled, then failed", "cancelled, then refused"),
)
FAILED = StreamError(code="model_error", message="it failed")
REFUSED = StreamError(code="rate_limit_exceeded", message="too many")


class Seen(NamedTuple):
    """What a reader was shown: chunks by offset, and how it ended."""

    chunks: list[tuple[int, bytes]]
    outcome: str
    """`completed`, or the code of the error."""


class Writing:
    """Writes streams of every kind into one partition, mixed by a seed."""

    def __init__(self, log: MemoryLog, dice: random.Random) -> None:
        self.log, self.dice = log, dice
        self.names = {kind: f"r-{number}" for number, kind in enumerate(KINDS)}

    async def write(self) -> None:
        """All of them, interleaved."""
        left = {kind: self.drafts(kind, request) for kind, request in self.names.items()}
        while left:
            kind = self.dice.choice(sorted(left))
            if not (drafts := left[kind]):
                del left[kind]
                continue
            await self.log.append([drafts.pop(0)])

    def drafts(self, kind: str, request: str) -> list[Draft]:
        """A stream of a kind."""
        open_, say, end = self._open, self._say, self._end
        first = [open_(request, 1), *say(request, 1, 0, 5)]
        more = say(request, 1, 5, 9)
        match kind:
            case "plain":
                return [*first, *more, end(request, 1, 9)]
            case "restart":
                return [*first, open_(request, 2), *more[:2], *say(request, 2, 0, 6), *more[2:], end(request, 2, 6)]
            case "continue":
                goes_on = [open_(request, 2, "continue"), *more[:1], *say(request, 2, 0, 4), end(request, 2, 4)]
                return [*first, *goes_on, *more[1:], end(request, 1, 9)]
            case "cancelled" | "cancelled, then failed":
                error = FAILED if kind.endswith("failed") else None
                return [*first, self._cancel(request), *more, end(request, 1, 9, error=error)]
            case "cancelled before" | "cancelled, then refused":
                spoke = first if kind.endswith("before") else []
                return [self._cancel(request), *spoke, end(request, 0, 0, error=None if spoke else REFUSED)]
            case "retracted":
                takes_back = self._event(StreamRetract(**self._named(request), from_seq=3))
                return [*first, takes_back, *more, end(request, 1, 9)]
            case "zombie":
                dead = [
                    open_(request, 1, writer="z"),
                    *say(request, 1, 0, 3, writer="z"),
                    end(request, 1, 3, writer="z"),
                ]
                return [*first, *dead, *more, *dead[1:], end(request, 1, 9), *dead[1:]]
            case "failed":
                return [*first, end(request, 1, 5, error=FAILED)]
            case _:
                return [end(request, 0, 0, error=REFUSED)]

    @staticmethod
    def _named(request: str) -> dict[str, Any]:
        return {"request": RequestId(request), "tenant": Tenant("acme"), "conversation": Conversation("c")}

    @staticmethod
    def _event(event: Any) -> Draft:
        return codec.draft(PLACE.topic, "c", event)._replace(partition=PLACE.number)

    def _open(self, request: str, attempt: int, mode: Any = "restart", writer: str = "w") -> Draft:
        named = {**self._named(request), "attempt": attempt, "writer": Writer(f"{writer}{attempt}")}
        return self._event(StreamAttempt.model_validate({**named, "mode": mode}))

    def _say(self, request: str, attempt: int, since: int, until: int, writer: str = "w") -> list[Draft]:
        prefix = codec.delta_prefix(request, attempt, f"{writer}{attempt}")
        says = [f"<{writer}{attempt}:{seq} é>" for seq in range(until)]
        chunks = [codec.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) for text in says]
        deltas = [(seq, codec.encode_delta(prefix, seq, chunks[seq])) for seq in range(since, until)]
        return [codec.delta_draft(PLACE.topic, b"c", PLACE.number, value) for _, value in deltas]

    def _end(
        self, request: str, attempt: int, seq: int, *, error: StreamError | None = None, writer: str = "w"
    ) -> Draft:
        status = "completed" if error is None else "rejected" if attempt == 0 else "failed"
        named = {**self._named(request), "attempt": attempt, "writer": f"{writer}{attempt}", "seq": seq}
        return self._event(StreamEnd.model_validate({**named, "status": status, "error": error}))

    def _cancel(self, request: str) -> Draft:
        return self._event(StreamCancel(**self._named(request), by="somebody"))


class LogConsumer:
    """A consumer of one partition, as far as the client uses one."""

    def __init__(self, log: MemoryLog, start: int, dice: random.Random) -> None:
        self._log, self._at, self._dice = log, start, dice

    async def position(self, _: TopicPartition) -> int:
        await asyncio.sleep(0)
        return self._at

    async def getmany(self, place: TopicPartition, timeout_ms: int) -> Mapping[TopicPartition, Sequence[Any]]:
        del timeout_ms
        await asyncio.sleep(0)
        held = self._log.held(PLACE)
        if self._at < held.first:
            raise OffsetOutOfRangeError({place: self._at})
        at = held.at(self._at)
        records = held.records[at : at + self._dice.randint(1, 7)]
        self._at += len(records)
        return {place: records}


def places(log: MemoryLog, request: str) -> list[tuple[int, Said]]:
    """What the log holds of a stream, and where."""
    said = [(record.offset, codec.decode(record.value)) for record in log.records(PLACE.topic)]
    return [(offset, one) for offset, one in said if getattr(one, "request", None) == request]


async def by_fold(log: MemoryLog, request: str, after: int | None) -> Seen:
    """What the contract says of a late reader that resumes there."""
    reader, chunks = ReplyReader(after), list[tuple[int, bytes]]()
    for offset, said in places(log, request):
        reader.hear(offset, said)
    try:
        for shown in reader.go_live():
            if isinstance(shown, Ended):
                error = error_of_end(shown)
                return Seen(chunks, error.code if error else "completed")
            chunks.append((shown.offset, bytes(shown.chunk)))
    except KlatchError as error:
        return Seen(chunks, error.code)
    raise AssertionError("no end")


async def by_client(
    log: MemoryLog, request: str, after: int | None, dice: random.Random, live_from: int, start: int = 0
) -> Seen:
    stream = clients.Stream(Tenant("acme"), RequestId(request), Conversation("c"), PLACE.number, start)
    consumer: Any = LogConsumer(log, start, dice)
    chunks = list[tuple[int, bytes]]()
    read: Any = clients._read  # pyright: ignore[reportPrivateUsage]
    try:
        async for shown in read(consumer, TopicPartition(*PLACE), stream, live_from, after):
            chunks.append((shown.offset, codec.dumps(shown.chunk)))
    except KlatchError as error:
        return Seen(chunks, error.code)
    return Seen(chunks, "completed")


async def by_events(kit: "Kit", request: str, after: int | None) -> Seen:
    headers = {} if after is None else {"last-event-id": f"{PLACE.number}-{after}"}
    answer = await kit.call("GET", f"/v1/streams/{request}?conversation=c", headers=headers)
    if answer.status != 200:
        return Seen([], (await answer.json())["error"]["code"])
    chunks, outcome = list[tuple[int, bytes]](), ""
    for event in await answer.events():
        if event.id:
            chunks.append((int(event.id.partition("-")[2]), event.data.encode()))
        else:
            outcome = "completed" if event.data == "[DONE]" else json.loads(event.data)["error"]["code"]
    await answer.close()
    return Seen(chunks, outcome)


async def published(kit: "Kit", names: Mapping[str, str]) -> None:
    """The requests of the streams: what a door looks for when it knows no more than an id."""
    kit.stages.script = nothing
    for request in names.values():
        asked = ChatRequested(
            request=RequestId(request), tenant=Tenant("acme"), conversation=Conversation("c"), body={}
        )
        await kit.log.append([codec.draft("chat.requests", "acme", asked)])


async def written(kit: "Kit", dice: random.Random) -> tuple[Writing, int]:
    """All streams, published and told to their ends, and the end of their partition."""
    writing = Writing(kit.log, dice)
    await published(kit, writing.names)
    await writing.write()
    _, end = await kit.log.bounds(PLACE)
    return writing, end


async def nothing(_: Any) -> None:
    """The streams are written by hand."""


@pytest.mark.parametrize("seed", range(3))
async def test_late_readers_agree_byte_for_byte_at_every_place(kits: Any, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - a seed that can be repeated
    async with kits.serving(partitions=1) as kit:
        writing, end = await written(kit, dice)
        outcomes = set[str]()
        for kind, request in writing.names.items():
            for after in (None, *range(end)):
                told = await by_fold(kit.log, request, after)
                assert await by_client(kit.log, request, after, dice, end) == told, (request, after)
                assert await by_events(kit, request, after) == told, (request, after)
                if told.outcome not in {"superseded", "invalid_request"}:
                    assert (told.outcome == "cancelled") == kind.startswith("cancelled"), (request, after)
                outcomes.add(told.outcome)
        assert outcomes == {
            *("completed", "superseded", "cancelled", "model_error", "rate_limit_exceeded"),
            "invalid_request",
        }


async def test_the_place_of_another_stream_or_of_what_does_not_count_is_refused_everywhere(kits: Any) -> None:
    """Text was left out in silence, with 200 and an ordered end."""
    dice = random.Random(0)  # noqa: S311 - a seed that can be repeated
    async with kits.serving(partitions=1) as kit:
        writing, end = await written(kit, dice)
        said = [(record.offset, codec.decode(record.value)) for record in kit.log.records(PLACE.topic)]
        for name in ("plain", "zombie", "continue"):
            request = writing.names[name]
            others = [at for at, one in said if getattr(one, "request", None) != request]
            zombies = [
                at for at, one in said if isinstance(one, Delta) and one.request == request and "z" in one.writer
            ]
            for place in (*dice.sample(others, 8), *zombies):
                refused = Seen([], "invalid_request")
                assert await by_fold(kit.log, request, place) == refused
                assert await by_client(kit.log, request, place, dice, end) == refused
                assert await by_events(kit, request, place) == refused


async def test_who_resumes_where_the_opening_is_gone_and_another_attempt_began_anew_is_told(kits: Any) -> None:
    """Text of the one attempt was joined to that of the next."""
    dice = random.Random(0)  # noqa: S311 - a seed that can be repeated
    async with kits.serving(partitions=1) as kit:
        writing, end = await written(kit, dice)
        request = writing.names["restart"]
        opened, first, *_ = (
            record.offset
            for record in kit.log.records(PLACE.topic)
            if getattr(codec.decode(record.value), "request", None) == request
        )
        kit.log.truncate_before(PLACE, opened + 1)
        superseded = Seen([], "superseded")
        assert await by_fold(kit.log, request, first) == superseded
        assert await by_client(kit.log, request, first, dice, end, start=opened + 1) == superseded
        assert await by_events(kit, request, first) == superseded


@pytest.mark.parametrize("seed", range(3))
async def test_live_readers_end_as_late_ones_or_are_told_that_their_text_was_taken_back(kits: Any, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - a seed that can be repeated
    async with kits.serving(partitions=1) as kit:
        writing = Writing(kit.log, dice)
        await published(kit, writing.names)
        names = list(writing.names.values())
        reading = [asyncio.create_task(by_events(kit, request, None)) for request in names]
        reading += [asyncio.create_task(by_client(kit.log, request, None, dice, 0)) for request in names]
        await writing.write()
        for request, seen in zip(names * 2, await asyncio.gather(*reading), strict=True):
            told = await by_fold(kit.log, request, None)
            if seen.outcome == "superseded":
                assert request in {writing.names["restart"], writing.names["retracted"]}
                assert len({chunk.partition(b"<")[2][:2] for _, chunk in seen.chunks}) <= 1
            else:
                assert seen == told, request


async def test_a_reader_whose_place_retention_took_is_told_so_everywhere(kits: Any) -> None:
    dice = random.Random(0)  # noqa: S311 - a seed that can be repeated
    async with kits.serving(partitions=1) as kit:
        writing, end = await written(kit, dice)
        kit.log.truncate_before(PLACE, end - 2)
        request = writing.names["plain"]
        assert await by_client(kit.log, request, 3, dice, end) == Seen([], "log_moved")
        assert await by_events(kit, request, 3) == Seen([], "log_moved")


@pytest.mark.parametrize("seed", range(3))
async def test_readers_from_the_first_that_the_log_holds_are_told_the_whole_or_that_its_beginning_is_gone(
    kits: Any, seed: int
) -> None:
    dice = random.Random(seed)  # noqa: S311 - a seed that can be repeated
    async with kits.serving(partitions=1) as kit:
        writing, end = await written(kit, dice)
        names = writing.names.values()
        begins = {request: next(offset for offset, _ in places(kit.log, request)) for request in names}
        told = {request: await by_fold(kit.log, request, None) for request in names}
        outcomes = set[str]()
        for first in sorted({*dice.sample(range(end), 12), *(begins[request] + 1 for request in names)}):
            kit.log.truncate_before(PLACE, first)
            async with kits.serving(beside=kit) as fresh, asyncio.timeout(20):
                for kind, request in writing.names.items():
                    held = places(kit.log, request)
                    # What is behind a cancel that is gone tells of nothing; nor does what is gone altogether.
                    if begins[request] < first and (kind == "cancelled before" or not held):
                        continue
                    seen = await by_client(kit.log, request, None, dice, end, first)
                    assert seen == await by_events(fresh, request, None), (kind, first)
                    assert seen == told[request] or begins[request] < first, (kind, first)
                    after, _ = dice.choice(held)
                    resumed = await by_client(kit.log, request, after, dice, end, first)
                    assert resumed == await by_events(fresh, request, after), (kind, first, after)
                    outcomes |= {seen.outcome, resumed.outcome}
        assert outcomes >= {"completed", "cancelled", "log_moved", "model_error", "rate_limit_exceeded"}


async def test_a_client_that_waits_for_what_has_lost_its_beginning_is_told_so_at_its_end() -> None:
    dice = random.Random(0)  # noqa: S311 - a seed that can be repeated
    log = MemoryLog({PLACE.topic: 1})
    drafts = Writing(log, dice).drafts("plain", "r")
    await log.append(drafts[:3])
    log.truncate_before(PLACE, 1)
    reading = asyncio.create_task(by_client(log, "r", None, dice, 3, 1))
    await log.append(drafts[3:])
    async with asyncio.timeout(20):
        assert await reading == Seen([], "log_moved")


@pytest.mark.parametrize("spoke", [False, True])
async def test_a_reader_from_the_right_place_is_told_of_a_cancel_whatever_another_tenant_says_under_its_id(
    spoke: bool,
) -> None:
    dice = random.Random(0)  # noqa: S311 - a seed that can be repeated
    log = MemoryLog({PLACE.topic: 1})
    writing = Writing(log, dice)
    others, mine = writing.drafts("plain", "r"), writing.drafts("cancelled before", "r")
    await log.append(others[1:4])
    await log.append(mine if spoke else [mine[0], mine[-1]])
    async with asyncio.timeout(20):
        assert await by_client(log, "r", None, dice, len(log.records(PLACE.topic))) == Seen([], "cancelled")


async def test_a_reader_whose_place_the_log_has_not_come_to_is_refused_everywhere(kits: Any) -> None:
    dice = random.Random(0)  # noqa: S311 - a seed that can be repeated
    async with kits.serving(partitions=1) as kit:
        writing, end = await written(kit, dice)
        request = writing.names["plain"]
        for beyond in (end, end + 1_000_000):
            assert await by_client(kit.log, request, beyond, dice, end) == Seen([], "invalid_request")
            assert await by_events(kit, request, beyond) == Seen([], "invalid_request")
        own = max(record.offset for record in kit.log.records(PLACE.topic) if request.encode() in (record.value or b""))
        assert (await by_client(kit.log, request, own, dice, end)).outcome == "completed"
