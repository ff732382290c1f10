"""The table: floors never pass what a successor needs, and nothing is kept of what is over."""
# pyright: reportPrivateUsage=false
# What is kept is what this is about.

import asyncio
import json
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from klatch_schemas import codec
from klatch_schemas.events import Event, StreamAttempt, StreamCancel, StreamDelta, StreamEnd, TrustVerdict
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Cause, Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, TRUST_VERDICTS
from klatch_workers.generation.table import ORPHAN_MS, Table, Tracked

STREAM, VERDICTS = Partition(CHAT_STREAM.name, 0), Partition(TRUST_VERDICTS.name, 0)
SOURCE = Partition(CHAT_REQUESTS.name, 0)
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

    def say(self, event: Event, at_ms: int = 1) -> None:
        record = Record(STREAM, len(self.stream), at_ms, b"c1", codec.encode(event))
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
            self.say(StreamAttempt(request=_id(number), tenant=ACME, conversation=C1, attempt=1, writer=writer))

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
        self.say(end)

    def conclude(self, number: int, asked_ms: int = 1) -> None:
        self.table.conclude(self.under_way.pop(number), number, asked_ms)
        self.concluded.add(number)

    def checkpoint(self) -> tuple[int, int]:
        low_water = self.low_water
        self.table.commit(low_water, {SOURCE_NAME: (low_water - 1, 0)})
        return self.table.floors()

    def read(self, stream_floor: int, verdict_floor: int) -> Table:
        """A table that read the logs from there on."""
        table = Table(stream_floor, verdict_floor)
        for record in self.stream[stream_floor:]:
            table.hear_stream(record)
        for record in self.verdicts[verdict_floor:]:
            table.hear_verdict(record)
        return table


def _id(number: int) -> RequestId:
    return RequestId(f"r{number}")


def known(table: Table, number: int) -> object:
    tracked = table.of("acme", _id(number))
    return tracked.verdict, tracked.assembly


STEPS = st.lists(
    st.tuples(st.sampled_from(["verdict", "cancel", "take", "on", "on", "on", "check"]), st.integers(0, 5))
)


def play(steps: list[tuple[str, int]]) -> tuple[History, list[tuple[int, tuple[int, int]]]]:
    history, checkpoints, judged = History(), list[tuple[int, tuple[int, int]]](), set[int]()
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
                checkpoints.append((history.low_water, history.checkpoint()))
            case _:
                pass
    return history, checkpoints


@given(STEPS)
def test_a_successor_knows_from_the_floors_of_any_checkpoint_what_it_would_know_from_the_beginning(
    steps: list[tuple[str, int]],
) -> None:
    history, checkpoints = play(steps)
    for low_water, floors in checkpoints:
        for number in range(low_water, 6):
            assert known(history.read(*floors), number) == known(history.read(0, 0), number), (low_water, floors)


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
    assert history.checkpoint() == (0, 0)
    for number, asked_ms in enumerate([ORPHAN_MS, 2 * ORPHAN_MS]):
        history.take()
        history.end(number)
        history.conclude(number, asked_ms)
        assert history.checkpoint()[0] == (0 if number == 0 else len(history.stream))


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
