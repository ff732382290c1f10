"""A boundary is met by the record that it names, and by no other; its partition is that of the process in question."""

from pathlib import Path
from struct import pack

import msgspec
import pytest

from klatch_schemas import codec
from klatch_schemas.records import Cause, Draft, Partition, Record
from klatch_schemas.topics import TOPICS
from klatch_workers.torture.boundaries import BOUNDARIES, OFFSETS
from klatch_workers.torture.owners import Owners
from klatch_workers.torture.system import Klatch


def record(topic: str, kind: str, cause: Cause | None = None, number: int = 3) -> Record:
    headers = [(codec.KIND, kind.encode())]
    if cause:
        headers.append((codec.CAUSE, str(cause).encode()))
    return Record(Partition(topic, number), 7, 1_000, b"key", b"{}", tuple(headers))


def delta(seq: int, chunk: dict[str, object]) -> Record:
    prefix = codec.delta_prefix("r", 1, "w")
    draft: Draft = codec.delta_draft(
        "chat.stream", b"key", 3, codec.encode_delta(prefix, seq, msgspec.json.encode(chunk))
    )
    return Record(Partition("chat.stream", 3), 7, 1_000, b"key", draft.value, tuple(draft.headers))


def committed(group: str, topic: str, number: int, version: int = 1) -> Record:
    def string(text: str) -> bytes:
        return pack(">h", len(text)) + text.encode()

    key = pack(">h", version) + string(group) + string(topic) + pack(">i", number)
    return Record(Partition(OFFSETS, 0), 7, 1_000, key, b"value", ())


ADMITTED, ASKED = Cause(Partition("chat.admitted", 5), 40, 0), Cause(Partition("chat.requests", 6), 40, 0)
TALKS: dict[str, object] = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
ENDS: dict[str, object] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}

RECORDS = {
    "requested": record("chat.requests", "chat.requested.v1"),
    "settled": record("chat.requests", "usage.settled.v1", ADMITTED),
    "admitted": record("chat.admitted", "chat.admitted.v1", ASKED),
    "verdict": record("trust.verdicts", "trust.verdict.v1", ASKED),
    "attempt": record("chat.stream", "stream.attempt.v1", ADMITTED),
    "first-delta": delta(0, TALKS),
    "a delta between": delta(1, TALKS),
    "last-delta": delta(9, ENDS),
    "end": record("chat.stream", "stream.end.v1", ADMITTED),
    "turn": record("chat.turns", "chat.turn.v1", ADMITTED),
    "snapshot of admission": record("admission.state", "state.snapshot.v1"),
    "snapshot of generation": record("generation.state", "state.snapshot.v1"),
    "commit of admission": committed("klatch.admission", "chat.requests", 2),
    "commit of screening": committed("klatch.screening", "chat.requests", 2),
    "commit of generation": committed("klatch.generation", "chat.admitted", 2),
    "a group's metadata": committed("klatch.generation", "", 0, version=2),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_boundary_is_met_by_its_own_record_alone(name: str) -> None:
    boundary = BOUNDARIES[name]
    what, stage = name.split("/")
    own = f"{what} of {stage}" if what in {"snapshot", "commit"} else what
    met = {
        named
        for named, record in RECORDS.items()
        if record.partition.topic == boundary.topic and boundary.appeared(record)
    }
    assert met == {own}
    assert boundary.stage == stage
    assert stage in Klatch().stages


def test_every_topic_of_a_boundary_is_in_the_table() -> None:
    assert {boundary.topic for boundary in BOUNDARIES.values()} <= {topic.name for topic in TOPICS} | {OFFSETS}


@pytest.mark.parametrize(
    ("name", "record", "partition"),
    [
        ("requested/admission", RECORDS["requested"], 3),
        ("admitted/admission", RECORDS["admitted"], 6),
        ("admitted/generation", RECORDS["admitted"], 3),
        ("verdict/screening", RECORDS["verdict"], 6),
        ("verdict/generation", RECORDS["verdict"], 3),
        ("first-delta/generation", RECORDS["first-delta"], 3),
        ("settled/generation", RECORDS["settled"], 5),
        ("snapshot/generation", RECORDS["snapshot of generation"], 3),
        ("commit/screening", RECORDS["commit of screening"], 2),
    ],
)
def test_the_process_in_question_owns_the_partition_that_the_record_comes_from(
    name: str, record: Record, partition: int
) -> None:
    assert BOUNDARIES[name].partition(record) == partition


def test_a_worker_owns_what_its_log_says_last(tmp_path: Path) -> None:
    log, owners = tmp_path / "generation-1.log", Owners()
    log.write_text(
        '{"event": "runner.assigned", "partitions": [0, 1]}\nno JSON about runner.assigned\n{"event": "x"}\n'
    )
    assert owners.of(log) == {0, 1}
    with log.open("a") as more:
        more.write('{"event": "runner.revoked", "partitions": [0, 1]}\n{"event": "runner.assigned", "partitions": [4')
    assert owners.of(log) == set()
    with log.open("a") as more:
        more.write("]}\n")
    assert owners.of(log) == {4}
