"""`klatch redrive`: which letters it takes, what it writes, and that nothing is done twice."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from click.testing import CliRunner

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatRequested,
    Event,
    Limits,
    QuotaLimitSet,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import (
    CHAT_ADMITTED,
    CHAT_REQUESTS,
    CHAT_STREAM,
    CHAT_TURNS,
    DEAD_LETTERS,
    TENANTS,
    TOPICS,
    TRUST_VERDICTS,
    Namespace,
    Topic,
)
from klatch_streams.dead_letters import DeadLetter, bury, dead_letter
from klatch_streams.memory_log import MemoryLog
from klatch_workers.cli.context import CommandFailed
from klatch_workers.cli.redrive import Voice, redrive, run
from klatch_workers.redrive.letters import Wanted
from klatch_workers.redrive.plan import Policy

HERE = Namespace.named("t")


class Yard:
    """A log with dead letters in it, and the command on it."""

    def __init__(self, largest: int = 1_000_000) -> None:
        self.appends_left = -1
        """After so many appends, the next one fails and stands all the same."""
        self.closes_after = -1
        """After so many, the log is closed."""
        self.now_ms = 1_000_000
        sizes = {HERE.of(topic): 1 if topic.partitioning == "ledger" else 2 for topic in TOPICS}
        self.log = MemoryLog(sizes, now_ms=lambda: self.now_ms, max_record_bytes=largest, appending=self._appending)
        self.code = 0

    async def _appending(self, _: Sequence[Draft]) -> None:
        if self.appends_left == 0:
            self.log.fail_next_append(stands=True)
        if self.closes_after == 0:
            await self.log.close()
        self.appends_left -= 1
        self.closes_after -= 1

    async def write(self, topic: Topic, key: bytes | None, value: bytes | None, headers: Any = ()) -> Record:
        """A record of a topic, as a stage reads it."""
        [(place, offset)] = await self.log.append([Draft(HERE.of(topic), key, value, headers)])
        return self.record(place, offset)

    def record(self, place: Partition, offset: int) -> Record:
        return next(one for one in self.records(place.topic) if (one.partition, one.offset) == (place, offset))

    def records(self, topic: str) -> Sequence[Record]:
        return self.log.records(topic)

    async def die(self, record: Record, stage: str = "admission", reason: str = "unreadable") -> None:
        """A stage gives a record up."""
        self.now_ms += 1_000
        await bury(self.log, [dead_letter(record, HERE, stage, DeadLetter(reason, "because"))])

    async def dead(self, value: bytes | None = b"bad") -> Record:
        """A record that died."""
        record = await self.write(CHAT_REQUESTS, b"acme", value, [("event-id", b"e1"), ("own", b"x")])
        await self.die(record)
        return record

    async def redrive(
        self, capsys: pytest.CaptureFixture[str], wanted: Wanted | None = None, *, yes: bool = True, **policy: Any
    ) -> list[dict[str, Any]]:
        """What the command says, letter by letter; the counts come last."""
        capsys.readouterr()
        self.now_ms += 1_000
        self.code = await run(self.log, HERE, wanted or Wanted(), Policy(**policy), Voice(as_json=True), yes=yes)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def back(self, topic: Topic = CHAT_REQUESTS) -> list[Record]:
        """The records of a topic that were redriven."""
        return [one for one in self.records(HERE.of(topic)) if one.header("dead-redriven")]


@pytest.fixture
def yard() -> Yard:
    return Yard()


Said = pytest.CaptureFixture[str]


def states(said: Sequence[dict[str, Any]]) -> list[str]:
    return [one["state"] for one in said if "state" in one]


async def test_nothing_is_written_unless_yes_is_said(yard: Yard, capsys: Said) -> None:
    await yard.dead()
    before = len(yard.records(HERE.of(DEAD_LETTERS)))
    said = await yard.redrive(capsys, yes=False)
    assert states(said) == ["ready"]
    assert said[-1] == {"letters": 1, "ready": 1, "dry_run": True}
    assert said[0]["source"] == "t.chat.requests/0/0"
    assert (said[0]["stage"], said[0]["reason"], said[0]["error"], said[0]["attempts"]) == (
        "admission",
        "unreadable",
        "because",
        1,
    )
    assert not yard.back()
    assert len(yard.records(HERE.of(DEAD_LETTERS))) == before


async def test_a_record_goes_back_as_it_was_and_its_letter_gets_a_receipt(yard: Yard, capsys: Said) -> None:
    first = await yard.dead()
    said = await yard.redrive(capsys)
    assert said[-1] == {"letters": 1, "redriven": 1, "dry_run": False}
    [back] = yard.back()
    assert (back.partition, back.key, back.value) == (first.partition, first.key, first.value)
    assert back.headers[:2] == (("event-id", b"e1"), ("own", b"x"))
    assert (back.header("dead-redriven"), back.header("dead-first-seen")) == (b"1", b"1000000")
    assert states(await yard.redrive(capsys)) == ["redriven"]
    assert len(yard.back()) == 1
    assert states(await yard.redrive(capsys, again=True)) == ["redriven"]
    assert len(yard.back()) == 2


async def test_a_record_that_dies_again_is_one_letter_and_left_when_it_came_back_too_often(
    yard: Yard, capsys: Said
) -> None:
    await yard.dead()
    for times in range(3):
        [letter, _] = await yard.redrive(capsys)
        assert (letter["state"], letter["redriven"], letter["attempts"]) == ("redriven", times, times + 1)
        await yard.die(yard.back()[-1])
    [letter, counts] = await yard.redrive(capsys)
    assert (letter["state"], letter["attempts"]) == ("guarded", 4)
    assert counts == {"letters": 1, "guarded": 1, "dry_run": False}
    assert len(yard.back()) == 3
    assert states(await yard.redrive(capsys, max_redrives=4)) == ["redriven"]


async def test_a_record_that_two_stages_gave_up_is_found_by_either_and_put_back_once(yard: Yard, capsys: Said) -> None:
    record = await yard.dead()
    await yard.die(record, "screening")
    for stage in ("admission", "screening"):
        said = await yard.redrive(capsys, Wanted(stages=[stage]), yes=False)
        assert [one["stage"] for one in said[:-1]] == [stage]
    assert states(await yard.redrive(capsys, yes=False)) == ["ready"]
    assert states(await yard.redrive(capsys, Wanted(stages=["admission"]))) == ["redriven"]
    assert states(await yard.redrive(capsys, Wanted(stages=["screening"]))) == ["redriven"]
    assert len(yard.back()) == 1
    # What died again, died again in one stage: the other has taken it.
    await yard.die(yard.back()[0], "screening")
    assert states(await yard.redrive(capsys, Wanted(stages=["admission"]), yes=False)) == []
    assert states(await yard.redrive(capsys, Wanted(stages=["screening"]), yes=False)) == ["ready"]


async def test_a_letter_that_was_written_twice_after_a_crash_is_redriven_once(yard: Yard, capsys: Said) -> None:
    await yard.die(await yard.dead())
    assert states(await yard.redrive(capsys)) == ["redriven"]
    assert len(yard.back()) == 1


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Wanted(stages=["admission"]), {"a"}),
        (Wanted(stages=["admission", "memory"]), {"a", "m"}),
        (Wanted(reasons=["failed"]), {"g"}),
        (Wanted(topics=["chat.turns", "chat.admitted"]), {"m", "g"}),
        (Wanted(tenants=["acme"]), {"a", "g"}),
        (Wanted(keys=["c2"]), {"m"}),
        (Wanted(stages=["admission"], reasons=["failed"]), set[str]()),
        (Wanted(since_ms=1_002_000), {"g", "m"}),
        (Wanted(until_ms=1_002_000), {"a"}),
        (Wanted(since_ms=1_002_000, until_ms=1_003_000), {"g"}),
    ],
)
async def test_filters_of_one_kind_widen_and_of_several_narrow(
    yard: Yard, capsys: Said, wanted: Wanted, found: set[str]
) -> None:
    await yard.die(await yard.write(CHAT_REQUESTS, b"acme", b"a"), "admission", "unreadable")
    await yard.die(await yard.write(CHAT_ADMITTED, b"c1", b"g", [("tenant", b"acme")]), "generation", "failed")
    await yard.die(await yard.write(CHAT_TURNS, b"c2", b"m"), "memory", "unreadable")
    said = await yard.redrive(capsys, wanted)
    assert len(states(said)) == len(found)
    back = [one.value for topic in (CHAT_REQUESTS, CHAT_ADMITTED, CHAT_TURNS) for one in yard.back(topic)]
    assert set(back) == {name.encode() for name in found}


async def test_the_oldest_go_first_and_no_more_than_the_limit(yard: Yard, capsys: Said) -> None:
    for number in range(5):
        await yard.dead(value=b"%d" % number)
    await yard.redrive(capsys, limit=2)
    await yard.redrive(capsys, limit=2)
    assert [one.value for one in yard.back()] == [b"0", b"1", b"2", b"3"]


async def test_many_letters_go_in_their_order(yard: Yard, capsys: Said) -> None:
    for number in range(250):
        await yard.dead(value=b"%d" % number)
    said = await yard.redrive(capsys)
    assert said[-1]["redriven"] == 250
    assert [one.value for one in yard.back()] == [b"%d" % number for number in range(250)]


@pytest.mark.parametrize(
    ("topic", "state"),
    [
        *((topic, "redriven") for topic in (CHAT_REQUESTS, CHAT_ADMITTED, TRUST_VERDICTS, CHAT_TURNS)),
        (CHAT_STREAM, "refused"),
        (TENANTS, "refused"),
    ],
    ids=lambda said: getattr(said, "name", said),
)
async def test_only_what_means_the_same_when_it_comes_late_is_redriven(
    yard: Yard, capsys: Said, topic: Topic, state: str
) -> None:
    await yard.die(await yard.write(topic, b"k", b"bad"))
    [letter, _] = await yard.redrive(capsys)
    assert letter["state"] == state
    assert len(yard.back(topic)) == (state == "redriven")


async def test_an_older_limit_never_undoes_a_newer_one(yard: Yard, capsys: Said) -> None:
    limit = QuotaLimitSet(tenant=Tenant("acme"), limits=Limits())
    await yard.dead(value=codec.encode(limit))
    [letter, _] = await yard.redrive(capsys)
    assert letter["state"] == "refused"
    assert "`klatch tenants apply FILE --again`" in letter["why"]
    assert not yard.back()


async def test_what_stands_for_records_that_nobody_could_unpack_is_not_put_back(yard: Yard, capsys: Said) -> None:
    await yard.dead(value=codec.lost(3, 5, 700, "UnsupportedCodecError"))
    [letter, _] = await yard.redrive(capsys)
    assert (letter["state"], "write them again" in letter["why"]) == ("refused", True)
    assert not yard.back()


async def test_a_record_that_is_too_large_with_its_new_headers_is_left_whole_where_it_is(capsys: Said) -> None:
    yard = Yard(largest=100_000)
    await yard.dead(value=b"x" * 99_970)
    [letter, _] = await yard.redrive(capsys)
    assert (letter["state"], letter["cut"], letter["size"], yard.code) == ("failed", True, 99_970, 1)
    assert "too large" in letter["why"]
    assert not yard.back()


async def test_a_cut_letter_is_read_from_where_it_stands_or_said_to_be_gone(yard: Yard, capsys: Said) -> None:
    record = await yard.write(CHAT_REQUESTS, b"acme", b"z" * 90_000)
    small = MemoryLog({HERE.of(DEAD_LETTERS): 1}, max_record_bytes=80_000)
    await bury(small, [dead_letter(record, HERE, "admission", DeadLetter("too-large"))])
    [letter] = small.records(HERE.of(DEAD_LETTERS))
    await yard.log.append([Draft(letter.partition.topic, letter.key, letter.value, letter.headers)])
    assert len(letter.value or b"") == 65_536
    assert states(await yard.redrive(capsys)) == ["redriven"]
    assert [one.value for one in yard.back()] == [record.value]
    yard.log.truncate_before(record.partition, record.offset + 1)
    [said, _] = await yard.redrive(capsys, again=True)
    assert (said["state"], yard.code) == ("failed", 1)
    assert "no longer there" in said["why"]
    assert len(yard.back()) == 1


async def answered(yard: Yard, tenant: str, *, end: bool = True, cancel: bool = False) -> ChatRequested:
    """A request whose record died, and that has an answer all the same."""
    names: dict[str, Any] = {"request": RequestId("r1"), "conversation": Conversation("c1")}
    request = ChatRequested(**names, tenant=Tenant("acme"), body={"model": "m"})
    await yard.dead(value=codec.encode(request))
    said: list[Event] = [StreamAttempt(**names, tenant=Tenant(tenant), attempt=1, writer=Writer("w"))]
    said += [StreamCancel(**names, tenant=Tenant(tenant), by="me")] * cancel
    said += [StreamEnd(**names, tenant=Tenant(tenant), attempt=1, writer=Writer("w"), status="completed")] * end
    await yard.log.append([codec.draft(HERE.of(CHAT_STREAM), "c1", one) for one in said])
    return request


@pytest.mark.parametrize(
    ("tenant", "end", "cancel", "state", "why"),
    [
        ("acme", True, False, "answered", "completed"),
        ("acme", True, True, "answered", "cancelled"),
        ("acme", False, False, "ready", ""),
        ("acme", False, True, "ready", ""),
        ("rival", True, False, "ready", ""),
    ],
)
async def test_a_request_that_was_answered_is_known_by_its_stream(
    yard: Yard, capsys: Said, tenant: str, end: bool, cancel: bool, state: str, why: str
) -> None:
    await answered(yard, tenant, end=end, cancel=cancel)
    [letter, _] = await yard.redrive(capsys, yes=False)
    assert (letter["state"], letter["request"], letter["tenant"]) == (state, "r1", "acme")
    assert why in letter["why"]
    assert states(await yard.redrive(capsys, yes=False, again=True)) == ["ready"]


async def test_a_log_that_fails_is_told_and_the_rest_is_redriven_next_time(yard: Yard, capsys: Said) -> None:
    for number in range(150):
        await yard.dead(value=b"%d" % number)
    # A hundred records and their receipts; then the log fails, and what was written stands all the same.
    yard.appends_left = 2
    with pytest.raises(CommandFailed, match="100 of 150 letters were redriven") as caught:
        await yard.redrive(capsys)
    assert caught.value.exit_code == 3
    said = await yard.redrive(capsys)
    assert said[-1] == {"letters": 150, "redriven": 150, "dry_run": False}
    assert [one.value for one in yard.back()[:150]] == [b"%d" % number for number in range(150)]
    assert len(yard.back()) == 200


async def test_whatever_fails_in_the_log_what_was_done_by_then_is_told(yard: Yard, capsys: Said) -> None:
    for number in range(150):
        await yard.dead(value=b"%d" % number)
    yard.closes_after = 2
    with pytest.raises(CommandFailed, match="closed; 100 of 150 letters were redriven") as caught:
        await yard.redrive(capsys)
    assert caught.value.exit_code == 3


async def test_a_table_for_people_says_what_would_be_done_and_quotes_no_value(yard: Yard, capsys: Said) -> None:
    await yard.dead(value=b"a secret text")
    await run(yard.log, HERE, Wanted(), Policy(), Voice(as_json=False), yes=False)
    said = capsys.readouterr()
    assert "t.chat.requests/0/0" in said.out
    assert "ready: because" in said.out
    assert "secret" not in said.out
    assert "--yes" in said.err


async def test_without_letters_it_says_so(yard: Yard, capsys: Said) -> None:
    assert await run(yard.log, HERE, Wanted(), Policy(), Voice(as_json=False), yes=True) == 0
    assert "no dead letters" in capsys.readouterr().err


def test_a_time_that_is_none_is_refused() -> None:
    said = CliRunner().invoke(redrive, ["--since", "yesterday-ish"])
    assert said.exit_code == 2
    assert "2h or 7d" in said.output
