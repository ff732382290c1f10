"""Writes records of dead letters back to where they came from, and a receipt beside each letter.

First the record, then the receipt: a crash in between redrives it once more, and its ids see to it that nothing is
done twice. Letters go in bunches, each acknowledged before the next.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Final

from klatch_schemas.records import Draft, Partition, Record
from klatch_streams import dead_headers as dead
from klatch_streams.log import Log, LogError, OffsetGone, RecordTooLarge, Tail
from klatch_streams.redriving import receipt, redriven, topic_of
from klatch_workers.redrive.letters import Letter
from klatch_workers.redrive.plan import Judgement

_BUNCH: Final = 100
_BUNCH_BYTES: Final = 4_000_000
_SILENT_S: Final = 30


class CannotRedrive(Exception):
    """This letter's record cannot be written again, for the reason said."""


async def redrive(log: Log, letters: Sequence[Letter]) -> AsyncIterator[Judgement]:
    """Redrive `letters`; says of each, in order, whether it was. Raises AppendFailed, LogError."""
    reader = _Reader(log)
    try:
        for bunch in _bunches(letters):
            for judged in await _redrive(log, reader, bunch):
                yield judged
    finally:
        await reader.close()


def _bunches(letters: Sequence[Letter]) -> list[list[Letter]]:
    bunches, size = list[list[Letter]](), 0
    for letter in letters:
        if not bunches or len(bunches[-1]) >= _BUNCH or size + letter.size > _BUNCH_BYTES:
            bunches.append([])
            size = 0
        bunches[-1].append(letter)
        size += letter.size
    return bunches


async def _redrive(log: Log, reader: "_Reader", bunch: Sequence[Letter]) -> list[Judgement]:
    judged, records, drafts = dict[int, Judgement](), list[Record](), list[Draft]()
    for index, letter in enumerate(bunch):
        try:
            record = await reader.at(letter.place, letter.offset)
            whole = await _whole(reader, letter, record)
            draft = redriven(whole, whole.value)
        except (CannotRedrive, OffsetGone) as error:
            judged[index] = Judgement(letter, "failed", _gone(error))
        else:
            records.append(record)
            drafts.append(draft)
    left = [index for index in range(len(bunch)) if index not in judged]
    for index, why in zip(left, await _append(log, records, drafts), strict=True):
        judged[index] = Judgement(bunch[index], "failed" if why else "redriven", why)
    return [judged[index] for index in range(len(bunch))]


async def _append(log: Log, letters: Sequence[Record], drafts: Sequence[Draft]) -> list[str]:
    """Append records, then receipts; returns for each why it could not be, or nothing."""
    if not drafts:
        return []
    try:
        await log.append(drafts)
    except RecordTooLarge as error:
        # Found before anything was sent: one at a time, to know which.
        if len(drafts) == 1:
            return [str(error)]
        alone = [await _append(log, [letter], [draft]) for letter, draft in zip(letters, drafts, strict=True)]
        return [why for whys in alone for why in whys]
    await log.append([receipt(letter) for letter in letters])
    return [""] * len(drafts)


async def _whole(reader: "_Reader", letter: Letter, record: Record) -> Record:
    """The letter, whole: what was cut of one stands in the original topic, until retention takes it."""
    if not letter.cut:
        return record
    where = Partition(topic_of(record), dead.number_in(record, dead.PARTITION))
    try:
        original = await reader.at(where, dead.number_in(record, dead.OFFSET))
    except OffsetGone as gone:
        raise CannotRedrive(f"the letter holds only its beginning, and {letter.source} is no longer there") from gone
    if len(original.value or b"") != letter.size or not _begins(original, record):
        raise CannotRedrive(f"the letter holds only its beginning, and {letter.source} holds another record now")
    ours = [(name, said) for name, said in record.headers if name in dead.OURS]
    theirs = [(name, said) for name, said in original.headers if name not in dead.OURS]
    return record._replace(key=original.key, value=original.value, headers=(*theirs, *ours))


def _begins(original: Record, cut: Record) -> bool:
    key, value = original.key or b"", original.value or b""
    return key.startswith(cut.key or b"") and value.startswith(cut.value or b"")


def _gone(error: Exception) -> str:
    return str(error) if isinstance(error, CannotRedrive) else "retention has taken the letter meanwhile"


class _Reader:
    """Reads records at places, and keeps what came along for the next."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._tail: Tail | None = None
        self._read = dict[tuple[Partition, int], Record]()

    async def at(self, partition: Partition, offset: int) -> Record:
        """The record that stands there. Raises OffsetGone, LogError."""
        if found := self._read.get((partition, offset)):
            return found
        tail = self._tail = self._tail or await self._log.tail()
        first, end = await self._log.bounds(partition)
        if not first <= offset < end:
            raise OffsetGone(partition, offset, first, end)
        tail.follow(partition, offset)
        try:
            records = await self._some(tail, partition)
        finally:
            tail.unfollow(partition)
        self._read = {(record.partition, record.offset): record for record in records}
        if found := self._read.get((partition, offset)):
            return found
        raise OffsetGone(partition, offset, records[0].offset, end)

    async def close(self) -> None:
        if self._tail:
            await self._tail.close()

    async def _some(self, tail: Tail, partition: Partition) -> Sequence[Record]:
        for _ in range(_SILENT_S):
            if records := await tail.read(1000):
                return records
        raise LogError(f"{partition.topic}/{partition.number} cannot be read: is its leader reachable?")
