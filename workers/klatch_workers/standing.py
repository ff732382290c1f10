"""What stands in the ledger of tenants for those who change it: of some who write at once, one after the other.

Each record names itself and the one that it was made of. One that was made of another than the last that counts does
not count: its writer, who finds it so, writes again, of what stands by then. So no change is lost, and of some who
write at once one is done with every turn. Whoever only reads the ledger takes the last record; once all are done,
it is the same. A record without a name overwrites whatever stands, as one whose base is nowhere in the ledger.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from uuid import uuid4

from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_schemas.events import TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import TENANTS, Namespace
from klatch_streams.catch_up import catch_up
from klatch_streams.log import Log

_NAME: Final = "name"
_MADE_OF: Final = "made-of"
_NOTHING: Final = b"nothing"


class _Counting(NamedTuple):
    name: bytes
    said: TenantConfigured | None


@dataclass(slots=True)
class Standing:
    """The tenants that stand, as of a call of `read`."""

    refused: set[int] = field(default_factory=set[int])
    """The offsets of the records that do not count."""
    _counts: dict[bytes, _Counting] = field(default_factory=dict[bytes, _Counting])
    _names: set[bytes] = field(default_factory=set[bytes])
    _overwritten: set[bytes] = field(default_factory=set[bytes])

    @classmethod
    async def read(cls, log: Log, namespace: Namespace) -> "Standing":
        """Read the ledger to its end. Raises LogError."""
        topic, standing = Partition(namespace.of(TENANTS), 0), cls()
        first, end = await log.bounds(topic)
        tail = await log.tail()
        try:
            async for records in catch_up(tail, topic, first, end):
                for record in records:
                    standing._apply(record)
        finally:
            await tail.close()
        return standing

    def get(self, tenant: Tenant) -> TenantConfigured | None:
        """What counts of a tenant."""
        held = self._counts.get(tenant.encode())
        return held.said if held else None

    def values(self) -> Collection[TenantConfigured]:
        """Every tenant that stands."""
        return [held.said for held in self._counts.values() if held.said]

    def says(self, said: TenantConfigured) -> bool:
        """Whether that counts of a tenant, and is the last that the ledger says of it too."""
        return self.get(said.tenant) == said and said.tenant.encode() not in self._overwritten

    def headers(self, tenant: Tenant) -> list[tuple[str, bytes]]:
        """For a record that is made of what counts."""
        held = self._counts.get(tenant.encode())
        return [(_NAME, uuid4().hex.encode()), (_MADE_OF, held.name if held else _NOTHING)]

    def _apply(self, record: Record) -> None:
        key = record.key or b""
        try:
            said = None if record.value is None else codec.decode_as(TenantConfigured, record.value)
        except Unreadable:
            return
        if said and said.tenant.encode() != key:
            return
        held, base = self._counts.get(key), record.header(_MADE_OF)
        if held and base != held.name and (base in self._names or base == _NOTHING):
            self.refused.add(record.offset)
            self._overwritten.add(key)
            return
        name = record.header(_NAME) or b"@%d" % record.offset
        # Its base too, which compaction may have taken: what else was made of that does not count either.
        self._names |= {name, base} if base else {name}
        self._counts[key] = _Counting(name, said)
        self._overwritten.discard(key)
