"""Stage boundaries: the records at which a process is killed the moment they can be read.

Klatch has no hook for it. Between two of a stage's writes there is a crash that only a kill between them shows, so the
kit reads the topic as any consumer does, and strikes the stage that owns the record's partition when the record
appears: some milliseconds after it was written, while what follows it is on its way.
"""

from collections.abc import Callable
from struct import unpack_from
from typing import Final, NamedTuple

import msgspec

from klatch_schemas import codec
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRequested,
    Snapshot,
    StreamAttempt,
    StreamEnd,
    TrustVerdict,
    TurnFinished,
    UsageSettled,
)
from klatch_schemas.records import Cause, Partition, Record
from klatch_schemas.topics import (
    ADMISSION_STATE,
    CHAT_ADMITTED,
    CHAT_REQUESTS,
    CHAT_STREAM,
    CHAT_TURNS,
    GENERATION_STATE,
    TRUST_VERDICTS,
    Namespace,
)
from klatch_streams.log import Log

OFFSETS: Final = "__consumer_offsets"
"""Kafka's own topic of committed offsets."""
_OFFSET_COMMIT: Final = (0, 1)
"""Versions of its keys that name a committed offset: group, topic, partition (Kafka's OffsetCommitKey)."""

Appeared = Callable[[Record], bool]


class Boundary(NamedTuple):
    """When which stage is killed."""

    stage: str
    topic: str
    """Bare: without the namespace. Of Kafka's own, its name."""
    appeared: Appeared
    input: str
    """What the stage's group reads: partitions of other topics belong to whoever owns the same number of it."""

    def partition(self, record: Record) -> int:
        """Whose partition the record comes from: its cause's where that is the stage's input."""
        if record.partition.topic == OFFSETS and (committed := _committed(record)):
            return committed[1].number
        header = record.header(codec.CAUSE)
        cause = Cause.parse(header.decode()) if header else None
        if cause and cause.partition.topic.endswith(self.input):
            return cause.partition.number
        return record.partition.number


def _kind(*kinds: str) -> Appeared:
    wanted = {kind.encode() for kind in kinds}
    return lambda record: record.header(codec.KIND) in wanted


def _delta(true: Callable[[Delta], bool]) -> Appeared:
    def appeared(record: Record) -> bool:
        try:
            said = codec.decode(record.value)
        except Unreadable:
            return False
        return isinstance(said, Delta) and true(said)

    return appeared


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


def _finished(said: Delta) -> bool:
    return any(choice.finish_reason for choice in msgspec.json.decode(bytes(said.chunk), type=_Chunk).choices)


def _committed(record: Record) -> tuple[str, Partition] | None:
    """The group, and the partition whose offset it committed; None for what else stands in that topic."""
    key = record.key or b""
    if record.value is None or len(key) < 2 or unpack_from(">h", key)[0] not in _OFFSET_COMMIT:
        return None
    group, at = _string(key, 2)
    topic, at = _string(key, at)
    return group, Partition(topic, unpack_from(">i", key, at)[0])


def _string(data: bytes, at: int) -> tuple[str, int]:
    length = unpack_from(">h", data, at)[0]
    return data[at + 2 : at + 2 + length].decode(), at + 2 + length


def _commit_of(stage: str) -> Appeared:
    def appeared(record: Record) -> bool:
        committed = _committed(record)
        return committed is not None and committed[0].endswith(Namespace().group(stage))

    return appeared


def _admission(topic: str, appeared: Appeared) -> Boundary:
    return Boundary("admission", topic, appeared, CHAT_REQUESTS.name)


def _screening(topic: str, appeared: Appeared) -> Boundary:
    return Boundary("screening", topic, appeared, CHAT_REQUESTS.name)


def _generation(topic: str, appeared: Appeared) -> Boundary:
    return Boundary("generation", topic, appeared, CHAT_ADMITTED.name)


def _http(topic: str, appeared: Appeared) -> Boundary:
    return Boundary("http", topic, appeared, "")


_FIRST: Final = _delta(lambda said: said.seq == 0)
_FINISH: Final = _delta(_finished)

BOUNDARIES: Final[dict[str, Boundary]] = {
    # accepted, and nobody has decided
    "requested/http": _http(CHAT_REQUESTS.name, _kind(ChatRequested.KIND)),
    "requested/admission": _admission(CHAT_REQUESTS.name, _kind(ChatRequested.KIND)),
    "requested/screening": _screening(CHAT_REQUESTS.name, _kind(ChatRequested.KIND)),
    # decided, and nothing of it is committed
    "admitted/admission": _admission(CHAT_ADMITTED.name, _kind(ChatAdmitted.KIND)),
    "verdict/screening": _screening(TRUST_VERDICTS.name, _kind(TrustVerdict.KIND)),
    # half of what generation joins; both
    "admitted/generation": _generation(CHAT_ADMITTED.name, _kind(ChatAdmitted.KIND)),
    "verdict/generation": _generation(TRUST_VERDICTS.name, _kind(TrustVerdict.KIND)),
    # opened; spoke; has said all; ended
    "attempt/generation": _generation(CHAT_STREAM.name, _kind(StreamAttempt.KIND)),
    "first-delta/generation": _generation(CHAT_STREAM.name, _FIRST),
    "first-delta/http": _http(CHAT_STREAM.name, _FIRST),
    "last-delta/generation": _generation(CHAT_STREAM.name, _FINISH),
    "last-delta/http": _http(CHAT_STREAM.name, _FINISH),
    "end/generation": _generation(CHAT_STREAM.name, _kind(StreamEnd.KIND)),
    "end/http": _http(CHAT_STREAM.name, _kind(StreamEnd.KIND)),
    # billed; kept
    "settled/generation": _generation(CHAT_REQUESTS.name, _kind(UsageSettled.KIND)),
    "turn/generation": _generation(CHAT_TURNS.name, _kind(TurnFinished.KIND)),
    # a snapshot without its offset; an offset, and what was in flight
    "snapshot/admission": _admission(ADMISSION_STATE.name, _kind(Snapshot.KIND)),
    "snapshot/generation": _generation(GENERATION_STATE.name, _kind(Snapshot.KIND)),
    "commit/admission": _admission(OFFSETS, _commit_of("admission")),
    "commit/screening": _screening(OFFSETS, _commit_of("screening")),
    "commit/generation": _generation(OFFSETS, _commit_of("generation")),
}
"""Every boundary by its name: the record that appears, and the stage that is killed then."""

TAKEN_OVER: Final[dict[str, str]] = {
    "admission": "admitted/admission",
    "screening": "verdict/screening",
    "generation": "attempt/generation",
}
"""By stage with partitions, the boundary whose record is the first that a successor writes."""


async def appears(log: Log, namespace: Namespace, boundary: Boundary) -> Record:
    """The first such record that is written from now on. Raises LogError."""
    topic = boundary.topic if boundary.topic == OFFSETS else namespace.prefix + boundary.topic
    tail = await log.tail()
    try:
        for number in range(await log.partitions(topic)):
            partition = Partition(topic, number)
            tail.follow(partition, (await log.bounds(partition))[1])
        while True:
            for record in await tail.read(1000):
                if boundary.appeared(record):
                    return record
    finally:
        await tail.close()
