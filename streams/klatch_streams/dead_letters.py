"""Records that no stage could use go to `dead.letters`: key, value and headers untouched, the reason in headers.

A dead letter is a function of its record, so one that is written twice can be told by its place of origin. Reasons
and errors never repeat what a message says: they name fields, types and lines of code.

What goes back to where it came from is made in `redriving`.
"""

import traceback
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from klatch_schemas.records import Draft, Record
from klatch_schemas.topics import DEAD_LETTERS, Namespace
from klatch_streams.dead_headers import (
    ATTEMPTS,
    CUT,
    ERROR,
    FIRST_SEEN,
    OFFSET,
    ORIGIN,
    OURS,
    PARTITION,
    REASON,
    REDRIVEN,
    STAGE,
    TOPIC,
    number_in,
    origin_of,
    times_redriven,
)
from klatch_streams.log import Log, RecordTooLarge

_REASON_BYTES: Final = 100
_ERROR_BYTES: Final = 1_000
_KEPT_BYTES: Final = 64 * 1024


class DeadLetter(Exception):
    """This record cannot be used; the partition goes on without it.

    `reason` is a short constant to count by (`unreadable`), `error` is for the reader of the letter, `attempts` is how
    often the stage tried.
    """

    def __init__(self, reason: str, error: str = "", attempts: int = 1) -> None:
        super().__init__(f"{reason}: {error}" if error else reason)
        self.reason, self.error, self.attempts = reason, error, attempts


def describe(error: BaseException) -> str:
    """What failed and where, without the error's own words: they may quote the message."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def dead_letter(record: Record, namespace: Namespace, stage: str, why: DeadLetter) -> Draft:
    """The dead letter of `record`. One that was redriven keeps where it first died, since when, and its counts."""
    headers = [
        *((name, value) for name, value in record.headers if name not in OURS),
        (TOPIC, record.partition.topic.encode()),
        (PARTITION, b"%d" % record.partition.number),
        (OFFSET, b"%d" % record.offset),
        (STAGE, stage.encode()),
        (REASON, _bounded(why.reason, _REASON_BYTES)),
        (ERROR, _bounded(why.error, _ERROR_BYTES)),
        (FIRST_SEEN, b"%d" % (number_in(record, FIRST_SEEN) or record.timestamp_ms)),
        (REDRIVEN, b"%d" % times_redriven(record)),
        (ATTEMPTS, b"%d" % (number_in(record, ATTEMPTS) + why.attempts)),
        (ORIGIN, origin_of(record).encode()),
    ]
    return Draft(namespace.of(DEAD_LETTERS), record.key, record.value, headers)


def cut(letter: Draft) -> Draft:
    """The letter with only the beginnings of its key and its value: the whole still stands where `dead-offset` says.

    The record's own headers are kept if there is room for them, all or none.
    """
    value = letter.value or b""
    theirs = [(name, said) for name, said in letter.headers if name not in OURS]
    if sum(len(name.encode()) + len(said or b"") for name, said in theirs) > _KEPT_BYTES:
        theirs = []
    ours = [(name, said) for name, said in letter.headers if name in OURS]
    return letter._replace(
        key=None if letter.key is None else letter.key[:_KEPT_BYTES],
        value=value[:_KEPT_BYTES],
        headers=[*theirs, *ours, (CUT, b"%d" % len(value))],
    )


async def bury(log: Log, letters: Sequence[Draft]) -> None:
    """Append dead letters; of one that is too large, the beginning. Raises AppendFailed."""
    try:
        await log.append(letters)
    except RecordTooLarge:
        # Found before anything was sent: one at a time, to know which.
        for letter in letters:
            await _bury_alone(log, letter)


async def _bury_alone(log: Log, letter: Draft) -> None:
    try:
        await log.append([letter])
    except RecordTooLarge:
        await log.append([cut(letter)])


def _bounded(text: str, size: int) -> bytes:
    return text.encode(errors="replace")[:size].decode(errors="ignore").encode()
