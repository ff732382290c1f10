"""The state of a decider's partition, key by key, in a compacted topic: written by its owner, read by its successor.

A key's state is in parts, of which only those that changed are written, and a *head* that names the offset applied
and the version (the offset applied when it was last written) of every part. Restoring takes the highest head whose
parts are all there, so neither a batch that was torn nor a zombie that wrote late can make a state that never was.

Record keys are JSON, for kcat: `["acme"]` is the head of `acme`, `["acme","ids/7"]` a part. A key whose state has no
parts is forgotten: its head is written empty, and taken away only once the offset it applied has been committed, since
a successor that re-read that offset would otherwise decide it on the wrong state.

Limit: nobody watches for foreign snapshots while it runs. What a zombie writes late is put right by the next restore,
and only there; compaction waits 60 s (`min.compaction.lag.ms`), and a zombie that writes later than that before a
restore can hide a newer head. Then the restore goes back to the older one, or fails where that can be seen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, NamedTuple

import msgspec
import structlog

from klatch_schemas import codec
from klatch_schemas.events import Snapshot
from klatch_schemas.records import Draft, Partition, Record
from klatch_streams.catch_up import catch_up
from klatch_streams.log import Log

logger: Final = structlog.stdlib.get_logger()

_APPLIED: Final = "applied"
"""Header of a head's tombstone: the offset that the forgotten state had applied."""
_HEADERS: Final = ((codec.KIND, Snapshot.KIND.encode()), (codec.CONTENT_TYPE, b"application/json"))
_APPEND_BYTES: Final = 256 * 1024
"""An append holds whole keys up to about this size, well below what a broker takes as one batch."""
_VERSIONS: Final = 16
"""How many records of a part a restore remembers: more than a zombie writes before its commit fails."""

Parts = Mapping[str, object]


class StateLost(Exception):
    """A key's snapshot cannot be put together any more."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A state as it stands in the topic."""

    applied: int
    parts: Parts
    versions: Mapping[str, int]


class Snapshots:
    """The snapshots of one partition, by their owner."""

    def __init__(self, log: Log, partition: Partition, saved: dict[str, Saved]) -> None:
        self.saved = saved
        self._log = log
        self._partition = partition
        self._empty = {key: one.applied for key, one in saved.items() if not one.parts}
        self._handed_over: tuple[str, ...] = ()

    @classmethod
    async def open(cls, log: Log, partition: Partition, committed: int) -> "Snapshots":
        """Read what stands and put right what a zombie left. Raises LogError, StateLost.

        `committed` is the offset from which the input will be read again.
        """
        restoring = await _read(log, partition)
        snapshots = cls(log, partition, restoring.result(committed))
        await snapshots._append(restoring.repairs())
        return snapshots

    async def write(self, states: Iterable[tuple[str, int, Parts]]) -> None:
        """Make states (key, offset applied, parts) durable; only parts that differ are written. Raises AppendFailed."""
        pending, written, size = list[Draft](), dict[str, Saved](), 0
        for key, applied, parts in states:
            drafts, saved = self._changes(key, applied, parts)
            weight = sum(len(draft.value or b"") for draft in drafts)
            if pending and size + weight > _APPEND_BYTES:
                await self._flush(pending, written)
                pending, written, size = [], {}, 0
            pending += drafts
            written[key] = saved
            size += weight
        await self._flush(pending, written)

    async def forget(self, committed: int) -> Mapping[str, int]:
        """Take away empty heads whose offset lies before `committed`; returns them with what they had applied."""
        gone = {key: applied for key, applied in self._empty.items() if applied < committed}
        await self._append([self._tombstone(key, applied) for key, applied in gone.items()])
        for key in gone:
            del self._empty[key], self.saved[key]
        return gone

    def hand_over(self, prefix: str) -> list[tuple[str, Saved]]:
        """The states whose keys begin so: from now on they are their owner's to remember, who has many of them.

        Such a state is written whole each time, its parts must always have the same names, and `take_away` ends it.
        """
        self._handed_over += (prefix,)
        given = [(key, saved) for key, saved in self.saved.items() if key.startswith(prefix)]
        # Anew, since a dict that is emptied stays as large as it was.
        self.saved = {key: saved for key, saved in self.saved.items() if not key.startswith(prefix)}
        return given

    async def take_away(self, states: Iterable[tuple[str, int, Sequence[str]]]) -> None:
        """End states that were handed over (key, offset applied, names of parts). Raises AppendFailed.

        The offset must have been committed, for the reason that `forget` waits for it.
        """
        drafts = list[Draft]()
        for key, applied, names in states:
            drafts.append(self._tombstone(key, applied))
            drafts += [_gone(self._partition, _key(key, name)) for name in names]
        await self._append(drafts)

    async def _flush(self, drafts: Sequence[Draft], written: Mapping[str, Saved]) -> None:
        await self._append(drafts)
        for key, saved in written.items():
            if key.startswith(self._handed_over):
                continue
            self.saved[key] = saved
            if saved.parts:
                self._empty.pop(key, None)
            else:
                self._empty[key] = saved.applied

    async def _append(self, drafts: Sequence[Draft]) -> None:
        if drafts:
            await self._log.append(drafts)

    def _changes(self, key: str, applied: int, parts: Parts) -> tuple[list[Draft], Saved]:
        old = self.saved.get(key, Saved(-1, {}, {}))
        versions = {
            name: old.versions[name] if name in old.parts and _same(old.parts[name], part) else applied
            for name, part in parts.items()
        }
        saved = Saved(applied, parts, versions)
        drafts = list(_drafts(self._partition, key, saved, lambda version: version == applied))
        # After the head that no longer names them: a torn append leaves every head with its parts.
        drafts += [_gone(self._partition, _key(key, name)) for name in old.parts if name not in parts]
        return drafts, saved

    def _tombstone(self, key: str, applied: int) -> Draft:
        return _gone(self._partition, _key(key), ((_APPLIED, b"%d" % applied),))


async def look(log: Log, partition: Partition) -> dict[str, Saved]:
    """The states that stand, for those who only look: nothing is put right. Raises LogError, StateLost."""
    return (await _read(log, partition)).result(0)


class Stood(NamedTuple):
    """A state that a restore would have found, had it read as far as its head."""

    key: str
    saved: Saved
    at: int
    """The offset of the head."""


def stood(partition: Partition, records: Iterable[Record]) -> Iterator[Stood]:
    """Every state that stood, in log order, for those who look back. What a zombie wrote over a newer one never did."""
    restoring = _Restoring(partition)
    for record in records:
        if found := restoring.read(record):
            yield Stood(*found, record.offset)


async def _read(log: Log, partition: Partition) -> "_Restoring":
    first, end = await log.bounds(partition)
    restoring = _Restoring(partition)
    tail = await log.tail()
    try:
        async for records in catch_up(tail, partition, first, end):
            for record in records:
                restoring.read(record)
    finally:
        await tail.close()
    return restoring


def _same(one: object, other: object) -> bool:
    # What was restored is JSON's idea of what was dumped: lists for tuples.
    return one is other or one == other or codec.dumps(one) == codec.dumps(other)


def _key(*names: str) -> bytes:
    return msgspec.json.encode(names)


_names: Final = msgspec.json.Decoder(Annotated[list[str], msgspec.Meta(min_length=1, max_length=2)]).decode


def _drafts(partition: Partition, key: str, saved: Saved, changed: Callable[[int], bool]) -> Iterator[Draft]:
    for name, part in saved.parts.items():
        version = saved.versions[name]
        if changed(version):
            yield _draft(partition, _key(key, name), version, part)
    yield _draft(partition, _key(key), saved.applied, saved.versions)


def _draft(partition: Partition, key: bytes, applied: int, state: object) -> Draft:
    # Past the model on purpose: it would copy and check plain data that was made here.
    fields = {"kind": Snapshot.KIND, "key": key.decode(), "applied": applied, "state": state}
    return Draft(partition.topic, key, codec.dumps(fields), _HEADERS, partition.number)


def _gone(partition: Partition, key: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> Draft:
    return Draft(partition.topic, key, None, headers, partition.number)


@dataclass(slots=True)
class _Key:
    """What has been read of one key."""

    best: Saved | None = None
    """The highest head that was whole; None also after a tombstone."""
    applied: int = -1
    """Of `best`, or of the tombstone."""
    highest: int = -1
    """The highest offset applied that any head or tombstone named."""
    parts: dict[str, dict[int, object]] = field(default_factory=dict[str, dict[int, object]])
    """The last records of each part, by version: a zombie's may stand between an owner's part and its head."""
    last_head: int | None = None
    """What the last head or tombstone of the key had applied."""
    unreadable: bool = False
    """Whether something that cannot be read stands where a head should, and no whole head after it."""


class _Restoring:
    """Folds the records of a state partition."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._keys: dict[str, _Key] = {}

    def read(self, record: Record) -> tuple[str, Saved] | None:
        """The key and the state that stands with this record, if it is a head and that one's."""
        try:
            names = _names(record.key or b"")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._skip(record, f"the key names no state: {error}")
            return None
        found = self._keys.setdefault(names[0], _Key())
        before = found.best
        try:
            if len(names) == 2:
                _read_part(found, names[1], record)
            else:
                _read_head(found, record)
        except (codec.Unreadable, msgspec.ValidationError, ValueError) as error:
            found.unreadable |= len(names) == 1
            self._skip(record, str(error))
        return (names[0], found.best) if found.best and found.best is not before else None

    def _skip(self, record: Record, reason: str) -> None:
        logger.error(
            "snapshots.unreadable",
            topic=self._partition.topic,
            partition=self._partition.number,
            offset=record.offset,
            reason=reason,
        )

    def result(self, committed: int) -> dict[str, Saved]:
        """The states that stand. Raises StateLost for one that was committed and cannot be put together."""
        for key, found in self._keys.items():
            if found.unreadable or found.applied < found.highest < committed:
                raise StateLost(
                    f"the snapshot of {key!r} in {self._partition.topic}/{self._partition.number} is incomplete "
                    f"(offset applied: {found.highest}). To rebuild: stop the stage, delete the records of this state "
                    "partition, and set the stage's committed offset to the first of its input"
                )
        return {key: found.best for key, found in self._keys.items() if found.best}

    def repairs(self) -> list[Draft]:
        """What to write so that the last records of every key are those that count."""
        drafts = list[Draft]()
        for key, found in self._keys.items():
            kept: Mapping[str, int] = found.best.versions if found.best else {}
            stands = {name: next(reversed(versions)) for name, versions in found.parts.items()}
            if found.best and (found.last_head != found.applied or any(stands.get(n) != v for n, v in kept.items())):
                drafts += _drafts(self._partition, key, found.best, lambda _: True)
            elif not found.best and found.last_head is not None and found.last_head != found.applied:
                drafts.append(_gone(self._partition, _key(key), ((_APPLIED, b"%d" % found.applied),)))
            drafts += [_gone(self._partition, _key(key, name)) for name in stands if name not in kept]
        return drafts


def _read_part(found: _Key, name: str, record: Record) -> None:
    if record.value is None:
        found.parts.pop(name, None)
    else:
        part = codec.decode_as(Snapshot, record.value)
        versions = found.parts.setdefault(name, {})
        versions.pop(part.applied, None)
        versions[part.applied] = part.state
        if len(versions) > _VERSIONS:
            del versions[next(iter(versions))]


def _read_head(found: _Key, record: Record) -> None:
    if record.value is None:
        applied, versions = int(record.header(_APPLIED) or -1), None
    else:
        head = codec.decode_as(Snapshot, record.value)
        applied, versions = head.applied, msgspec.convert(head.state, dict[str, int])
    found.last_head = applied
    found.highest = max(found.highest, applied)
    if applied < found.applied:
        return
    best = None if versions is None else _whole(found, applied, versions)
    if versions is None or best:
        found.best, found.applied, found.unreadable = best, applied, False


def _whole(found: _Key, applied: int, versions: Mapping[str, int]) -> Saved | None:
    """The state of a head, if all its parts are at hand in the versions that it names."""
    parts = dict[str, object]()
    for name, version in versions.items():
        if version in found.parts.get(name, {}):
            parts[name] = found.parts[name][version]
        elif found.best and found.best.versions.get(name) == version:
            parts[name] = found.best.parts[name]
        else:
            return None
    return Saved(applied, parts, versions)
