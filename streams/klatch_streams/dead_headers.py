"""The headers of a dead letter, and of the record that goes back from it: what they are called, and what they say."""

import re
from typing import Final

from klatch_schemas.records import Record

TOPIC: Final = "dead-topic"
PARTITION: Final = "dead-partition"
OFFSET: Final = "dead-offset"
STAGE: Final = "dead-stage"
REASON: Final = "dead-reason"
ERROR: Final = "dead-error"
FIRST_SEEN: Final = "dead-first-seen"
"""When the record was first written, in milliseconds since the epoch: it stays, however often the record dies."""
REDRIVEN: Final = "dead-redriven"
"""How often it was redriven."""
ATTEMPTS: Final = "dead-attempts"
"""How often it was tried, before and after it was redriven."""
ORIGIN: Final = "dead-origin"
"""`topic/partition/offset` of the record that died first: a redriven record has a place of its own."""
CUT: Final = "dead-cut"
"""Only if the record and these headers were too large together: the value's size, of which a beginning is kept."""
RECEIPT: Final = "dead-receipt"
"""A record with this header is no letter: it says that the letter at this offset of its partition was redriven."""

OURS: Final = frozenset(
    {TOPIC, PARTITION, OFFSET, STAGE, REASON, ERROR, FIRST_SEEN, REDRIVEN, ATTEMPTS, ORIGIN, CUT, RECEIPT}
)
_PLACE: Final = re.compile(rb"[A-Za-z0-9._-]{1,249}/[0-9]{1,9}/[0-9]{1,18}")
_DIGITS: Final = 18


def times_redriven(record: Record) -> int:
    """How often `record` was redriven; 0 for any that was not."""
    return number_in(record, REDRIVEN)


def number_in(record: Record, header: str) -> int:
    """The whole number in a header; 0 if there is none, or none that klatch wrote."""
    value = record.header(header) or b""
    return int(value) if value.isdigit() and len(value) <= _DIGITS else 0


def origin_of(record: Record) -> str:
    """`topic/partition/offset` of the record that died first: of `record` itself, unless it was redriven."""
    said = record.header(ORIGIN)
    if said and _PLACE.fullmatch(said):
        return said.decode()
    return f"{record.partition.topic}/{record.partition.number}/{record.offset}"


def history(record: Record) -> list[tuple[str, bytes]]:
    """What the effects of a redriven record carry on, so that receivers look for what was done before."""
    if not times_redriven(record):
        return []
    return [(name, b"%d" % number_in(record, name)) for name in (FIRST_SEEN, REDRIVEN)]
