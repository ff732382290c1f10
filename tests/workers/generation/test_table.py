"""The table: floors never pass what a successor needs, and nothing is kept of what is over."""
# pyright: reportPrivateUsage=false
# What is kept is what this is about.

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas import codec
from klatch_schemas.events import Event, StreamAttempt, StreamCancel, StreamDelta, StreamEnd, TrustVerdict
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Cause, Partition, Record
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, TRUST_VERDICTS
from klatch_workers.generation.table import EARLY, ORPHAN_MS, Early, Table, Tracked

STREAM, VERDICTS = Partition(CHAT_STREAM.name, 0), Partition(TRUST_VERDICTS.name, 0)
SOURCE, ADMITTED = Partition(CHAT_REQUESTS.name, 0), Partition(CHAT_ADMITTED.name, 0)
SOURCE_NAME = f"{CHAT_REQUESTS.name}/0"
ACME, C1 = Tenant("acme"), Conversation("c1")


@dataclass
class History:
    """Two logs and the table of their owner. Request n is asked at offset n and admitted at offset n."""

    table: Table = field(default_factory=Table)
    stream: list[Record] = field(default_factory=list[Record])
    verdicts: list[Record] = field(default_factory=list[Record])
    admitted: int = 0
    under_way: dict[int, Tracked] = field(default_factory=dict[int, Tracked])
    concluded: set[int] = field(default_factory=set[int])

    @property
    def low_water(self) -> int:
        return next(number for number in range(len(self.concluded) + 1) if number not in self.concluded)

    def say(self, event: Event, at_ms: int = 1, *, caused_by: int | None = None) -> None:
        """`caused_by` is the request as whose effect it is written."""
        headers = () if caused_by is None else ((codec.CAUSE, str(Cause(ADMITTED, caused_by, 0)).encode()),)
        record = Record(STREAM, len(self.stream), at_ms, b"c1", codec.encode(event), headers)
        self.stream.append(record)
        self.table.hear_stream(record)

    def verdict(self, number: int, at_ms: int = 1, *, caused: bool = True) -> None:
        event = TrustVerdict(
            request=_id(number), tenant=ACME, conversation=C1, stage="input", decision="allow", policy="p"
        )
        headers = ((codec.CAUSE, str(Cause(SOURCE, number, 0)).encode()),) if caused else ()
        record = Record(VERDICTS, len(self.verdicts), at_ms, b"c1", codec.encode(event), headers)
        self.verdicts.append(record)
        self.table.hear_verdict(record)

    def cancel(self, number: int, at_ms: int = 1) -> None:
        self.say(StreamCancel(request=_id(number), tenant=ACME, conversation=C1, by="x"), at_ms)

    def take(self) -> None:
        """The next request is admitted and taken."""
        self.under_way[self.admitted] = self.table.take("acme", _id(self.admitted))
        self.admitted += 1

    def go_on(self, number: int) -> None:
        """The owner of a request that is under way does what comes next."""
        tracked = self.under_way[number]
        state = tracked.assembly.state
        if state.settled:
            self.conclude(number)
        elif state.status or state.next_seq > 1:
            self.end(number)
        elif state.attempt and state.next_seq <= 1:
            chunk = json.loads('{"choices":[]}')
            self.say(
                StreamDelta(
                    request=_id(number), attempt=1, writer=Writer(state.writer), seq=state.next_seq, chunk=chunk
                )
            )
        elif tracked.verdict:
            writer = Writer(f"w{number}")
            opening = StreamAttempt(request=_id(number), tenant=ACME, conversation=C1, attempt=1, writer=writer)
            self.say(opening, caused_by=number)

    def end(self, number: int) -> None:
        state = self.under_way[number].assembly.state
        end = StreamEnd(
            request=_id(number),
            tenant=ACME,
            conversation=C1,
            attempt=state.attempt,
            writer=Writer(state.writer or "w"),
            seq=state.next_seq,
            status="completed",
        )
        self.say(end, caused_by=number)

    def conclude(self, number: int, asked_ms: int = 1) -> None:
        self.table.conclude(self.under_way.pop(number), number, asked_ms)
        self.concluded.add(number)

    def checkpoint(self) -> tuple[int, int]:
        low_water = self.low_water
        self.table.commit(low_water, {SOURCE_NAME: (low_water - 1, 0)})
        return self.table.floors()

    def snapshot(self) -> "Snapshot":
        """What a checkpoint leaves to a successor."""
        return Snapshot(self.low_water, *self.checkpoint(), self.table.early())

    def read(self, since: "Snapshot") -> Table:
        """A table that read the logs from there on."""
        table = Table(since.stream_floor, since.verdict_floor, since.early, {ADMITTED: since.low_water})
        for record in self.stream[since.stream_floor :]:
            table.hear_stream(record)
        for record in self.verdicts[since.verdict_floor :]:
            table.hear_verdict(record)
        return table


class Snapshot(NamedTuple):
    """What a successor begins with."""

    low_water: int
    stream_floor: int
    verdict_floor: int
    early: Sequence[Early] = ()


def _id(number: int) -> RequestId:
    return RequestId(f"r{number}")


def known(table: Table, number: int) -> object:
    tracked = table.of("acme", _id(number))
    return tracked.verdict, tracked.assembly


STEPS = st.lists(
    st.tuples(st.sampled_from(["verdict", "cancel", "take", "on", "on", "on", "check"]), st.integers(0, 5))
)


def play(steps: list[tuple[str, int]]) -> tuple[History, list[Snapshot]]:
    history, checkpoints, judged = History(), list[Snapshot](), set[int]()
    for step, number in steps:
        match step:
            case "verdict":
                history.verdict(number)
                judged.add(number)
            case "cancel":
                history.cancel(number)
            case "take" if history.admitted < 6:
                history.take()
            case "on" if number in history.under_way:
                history.go_on(number)
            case "check":
                checkpoints.append(history.snapshot())
            case _:
                pass
    return history, checkpoints


@given(STEPS)
def test_a_successor_knows_from_the_floors_of_any_checkpoint_what_it_would_know_from_the_beginning(
    steps: list[tuple[str, int]],
) -> None:
    history, checkpoints = play(steps)
    for snapshot in checkpoints:
        successor, from_the_beginning = history.read(snapshot), history.read(Snapshot(0, 0, 0))
        for number in range(snapshot.low_water, 6):
            assert known(successor, number) == known(from_the_beginning, number), snapshot


def test_a_successor_keeps_nothing_of_the_stream_of_what_was_committed() -> None:
    """It had all of it in memory until it had caught up, as far back as the floors were held."""
    history = History()
    history.verdict(0)
    history.take()
    history.take()
    for _ in range(5):
        history.go_on(0)
    snapshot = history.snapshot()
    assert (snapshot.low_water, snapshot.stream_floor) == (1, 0)
    assert not history.read(snapshot)._tracked
    assert not history.read(snapshot)._by_writer
    assert history.read(Snapshot(0, 0, 0)).of("acme", _id(0)).assembly.standing


@given(STEPS)
def test_nothing_is_kept_of_what_is_over(steps: list[tuple[str, int]]) -> None:
    history, _ = play(steps)
    while history.admitted < 6:
        history.take()
    for number in list(history.under_way):
        history.verdict(number)
        while number in history.under_way:
            history.go_on(number)
    assert history.checkpoint() == (len(history.stream), len(history.verdicts))
    # Late words of any kind open nothing again.
    for number in range(6):
        history.verdict(number)
        history.cancel(number)
        history.verdict(number, caused=False)
    assert history.checkpoint() == (len(history.stream), len(history.verdicts))
    assert not history.table._tracked
    assert not history.table._by_writer
    assert not history.table._uncommitted


def test_a_verdict_waits_for_its_request_however_long_the_outage() -> None:
    history = History()
    history.verdict(1, at_ms=1)
    history.verdict(0, at_ms=1)
    history.take()
    history.end(0)
    history.conclude(0, asked_ms=100 * ORPHAN_MS)
    history.checkpoint()
    history.take()
    assert history.under_way[1].verdict


def test_a_verdict_that_admission_passed_over_is_forgotten() -> None:
    history = History()
    history.verdict(0)
    history.table.commit(0, {SOURCE_NAME: (1, 0)})
    assert history.table.floors() == (0, 1)


def test_a_cancel_of_nobody_is_forgotten_once_requests_asked_much_later_are_done() -> None:
    history = History()
    history.cancel(5, at_ms=1)
    assert [one.request for one in history.snapshot().early] == [_id(5)]
    for number, asked_ms in enumerate([ORPHAN_MS, 2 * ORPHAN_MS]):
        history.take()
        history.end(number)
        history.conclude(number, asked_ms)
        assert len(history.snapshot().early) == (1 if number == 0 else 0)


def test_a_cancel_of_nobody_does_not_hold_the_floors_back() -> None:
    """It did, for an hour: successors read all that was said since, and had it in memory."""
    history = History()
    history.cancel(5)
    history.cancel(5)
    history.cancel(4)
    for number in range(2):
        history.take()
        history.end(number)
        history.conclude(number)
    snapshot = history.snapshot()
    assert snapshot.stream_floor == len(history.stream)
    successor = history.read(snapshot)
    assert successor.of("acme", _id(5)).assembly.state.status == "cancelled"
    assert successor.early() == snapshot.early


def test_more_cancels_of_nobody_than_a_snapshot_carries_hold_the_floors_back() -> None:
    history = History()
    for number in range(10, 10 + EARLY + 2):
        history.cancel(number)
    snapshot = history.snapshot()
    assert (len(snapshot.early), snapshot.stream_floor) == (EARLY, EARLY)


def test_what_was_forgotten_may_still_be_taken_and_heard() -> None:
    history = History()
    history.table.forget("acme", "r0")
    history.take()
    history.cancel(0)
    assert history.under_way[0].assembly.state.status == "cancelled"


def test_what_an_earlier_owner_concluded_is_forgotten_and_what_a_zombie_opens_is_not() -> None:
    history = History()
    for number in (3, 4):
        writer = Writer(f"w{number}")
        opening = StreamAttempt(request=_id(number), tenant=ACME, conversation=C1, attempt=1, writer=writer)
        history.say(opening)
    history.table.forget_concluded(before=1)
    assert set(history.table._tracked) == {("acme", "r4")}


async def test_who_waits_for_the_end_does_not_wait_for_a_marker_that_stands_there() -> None:
    table = Table()
    waiting = asyncio.create_task(table.passed(3))
    table.stream_moved(3)
    await asyncio.sleep(0)
    assert not waiting.done()
    table.stream_moved(4)
    table.stream_moved(2)
    await waiting
    table.verdicts_moved(7)
    assert (table.stream_position, table.verdict_position) == (4, 7)
