"""Which records of the tenants ledger count, for those who change it."""
# pyright: reportPrivateUsage=false
# Records are applied by hand: what compaction leaves is not up to a test.

import pytest

from klatch_schemas import codec
from klatch_schemas.events import TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_schemas.records import Partition, Record
from klatch_workers.standing import Standing

ACME = Tenant("acme")


def record(offset: int, name: bytes, made_of: bytes) -> Record:
    value = codec.encode(TenantConfigured(tenant=ACME, weight=offset + 1.0))
    return Record(Partition("tenants", 0), offset, 1, b"acme", value, (("name", name), ("made-of", made_of)))


LEDGER = [record(0, b"a", b"nothing"), record(1, b"b", b"a"), record(2, b"c", b"a"), record(3, b"d", b"b")]
"""`c` was made of `a`, when `b` stood already."""


@pytest.mark.parametrize("compacted", [0, 1])
def test_of_two_that_were_made_of_one_the_second_does_not_count_though_compaction_has_taken_that_one(
    compacted: int,
) -> None:
    standing = Standing()
    for one in LEDGER[compacted:]:
        standing._apply(one)
    assert standing.refused == {2}
    held = standing.get(ACME)
    assert held
    assert held.weight == 4.0
    assert standing.says(held)
