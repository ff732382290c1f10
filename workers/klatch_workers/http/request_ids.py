"""Names for requests that tell any door where their stream stands.

A request id made here is a UUIDv7 (RFC 9562): 48 bits of milliseconds, then 12 bits (`rand_a`) that hold the number
of the stream's partition, then 62 random bits. Partition 4095 stands for "the conversation is this id itself".
Ids that others made are as good; their bits are only a first place to look.
"""

import secrets
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from klatch_schemas.ids import RequestId
from klatch_workers.http.clock import now_ms

OWN_CONVERSATION: Final = 0xFFF
MAX_PARTITIONS: Final = OWN_CONVERSATION


def new_request_id(partition: int = OWN_CONVERSATION) -> RequestId:
    """A fresh id for a request whose stream stands in `partition`."""
    bits = now_ms() << 80 | 7 << 76 | partition << 64 | 2 << 62 | secrets.randbits(62)
    return RequestId(str(UUID(int=bits)))


@dataclass(frozen=True, slots=True)
class Birth:
    """What a request id says about itself."""

    milliseconds: int
    partition: int


def birth_of(request: str) -> Birth | None:
    """When a request was named, and where its stream may stand; None if the id is not a UUIDv7."""
    try:
        known = UUID(request)
    except ValueError:
        return None
    if known.version != 7:
        return None
    return Birth(known.int >> 80, known.int >> 64 & 0xFFF)
