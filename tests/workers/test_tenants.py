"""Tenants: from a file into the ledger, and their limits into their own logs."""

import asyncio
import hashlib
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from klatch_schemas import codec
from klatch_schemas.events import LimitRule, Limits, QuotaLimitSet, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import CHAT_REQUESTS, TENANTS, TOPICS, Namespace
from klatch_streams.ledger import Ledger
from klatch_streams.memory_log import MemoryLog
from klatch_workers import tenants
from klatch_workers.books import KeyBook
from klatch_workers.tenants import KeyTaken, TenantsFileError, read_tenants, tenant_configured, write_tenants

KEY = "klatch-0123456789"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.toml", f'[tenants.acme]\nkeys = ["{KEY}"]\n[tenants.acme.limits]\nconcurrent_requests = 2\n'),
        ("t.toml", f'[tenants.acme]\nkeys = ["sha256:{DIGEST}"]\nlimits = {{concurrent_requests = 2}}\n'),
        ("t.toml", f'[tenants.acme]\nkeys = ["sha256:{DIGEST.upper()}"]\nlimits = {{concurrent_requests = 2}}\n'),
        ("t.json", f'{{"tenants": {{"acme": {{"keys": ["{KEY}"], "limits": {{"concurrent_requests": 2}}}}}}}}'),
    ],
)
def test_keys_are_kept_by_their_hash_however_they_are_given(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (tenant,) = read_tenants(tmp_path / name)
    assert [key.sha256 for key in tenant.keys] == [DIGEST]
    assert tenant.limits == Limits(concurrent_requests=2)
    assert KEY not in tenant.model_dump_json()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[tenants.acme]\nkey = []\n", "tenants.acme.key"),
        ('[tenants."no spaces"]\n', "no spaces"),
        ("[tenants.acme.limits]\nrequests_per_minute = -1\n", "requests_per_minute"),
        ("[tenants", "not TOML"),
        ('[tenants.acme]\nkeys = ["klatch-12345", "sha256:9f86"]\n', r"tenants\.acme\.keys\.1: .*64 hex digits"),
        (f'[tenants.acme]\nkeys = ["SHA256:{DIGEST[1:]}g"]\n', r"tenants\.acme\.keys\.0: .*64 hex digits"),
        (
            f'[tenants.acme]\nkeys = ["{KEY}"]\n[tenants.other]\nkeys = ["sha256:{DIGEST}"]\n',
            f"tenants.acme and tenants.other have one key, {DIGEST[:12]}",
        ),
    ],
)
def test_a_file_that_cannot_be_used_names_the_place(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(TenantsFileError, match=named):
        read_tenants(tmp_path / "t.toml")


async def test_what_differs_is_written_and_what_does_not_is_left() -> None:
    log = MemoryLog({topic.name: 1 for topic in TOPICS})
    tenant = tenant_configured(Tenant("acme"), [KEY], Limits(requests_per_minute=60))
    assert await write_tenants(log, Namespace(), [tenant], by="test") == ["acme"]
    assert await write_tenants(log, Namespace(), [tenant], by="test") == []
    (set_limits,) = [codec.decode(record.value) for record in log.records(CHAT_REQUESTS.name)]
    assert set_limits == QuotaLimitSet(tenant=Tenant("acme"), limits=Limits(requests_per_minute=60), by="test")


async def test_what_stands_is_written_again_where_that_is_asked_for() -> None:
    log = MemoryLog({topic.name: 1 for topic in TOPICS})
    tenant = tenant_configured(Tenant("acme"), [KEY], Limits(requests_per_minute=60))
    for _ in range(2):
        assert await write_tenants(log, Namespace(), [tenant], by="test", again=True) == ["acme"]
    said = [codec.decode(record.value) for record in log.records(CHAT_REQUESTS.name)]
    assert said == [QuotaLimitSet(tenant=Tenant("acme"), limits=Limits(requests_per_minute=60), by="test")] * 2


async def test_a_key_of_a_tenant_that_stands_in_the_ledger_is_given_to_no_other() -> None:
    log = MemoryLog({topic.name: 1 for topic in TOPICS})
    acme = tenant_configured(Tenant("acme"), [KEY], Limits())
    other = tenant_configured(Tenant("other"), [KEY], Limits())
    await write_tenants(log, Namespace(), [acme], by="test")
    with pytest.raises(KeyTaken, match=rf"tenants\.other\.keys: the key {DIGEST[:12]}… is acme's"):
        await write_tenants(log, Namespace(), [other], by="test")
    assert len(log.records(CHAT_REQUESTS.name)) == len(log.records(TENANTS.name)) == 1, "nothing was written"
    moved = [acme.model_copy(update={"keys": ()}), other]
    assert await write_tenants(log, Namespace(), moved, by="test") == ["acme", "other"]


@contextmanager
def counted_lines() -> Generator[list[int]]:
    """The lines of `tenants.py` that are run meanwhile, turns of a comprehension too: work, whatever the clock says."""
    count, before = [0], sys.gettrace()

    def step(_frame: FrameType, event: str, _argument: object) -> Any:
        count[0] += event == "line"
        return step

    def called(frame: FrameType, _event: str, _argument: object) -> Any:
        return step if frame.f_code.co_filename == tenants.__file__ else None

    sys.settrace(called)
    try:
        yield count
    finally:
        sys.settrace(before)


async def test_who_has_a_key_already_costs_as_much_a_tenant_however_many_there_are(tmp_path: Path) -> None:
    read, written = list[int](), list[int]()
    for many in (40, 80):
        (tmp_path / "t.toml").write_text(
            "\n".join(f'[tenants.t{number}]\nkeys = ["klatch-{number:09}"]' for number in range(many))
        )
        with counted_lines() as lines:
            named = read_tenants(tmp_path / "t.toml")
        read += lines
        log = MemoryLog({topic.name: 1 for topic in TOPICS})
        standing = [tenant_configured(Tenant(f"s{one.tenant}"), [f"other-{one.tenant}-key"], Limits()) for one in named]
        await write_tenants(log, Namespace(), standing, by="test")
        with counted_lines() as lines:
            await write_tenants(log, Namespace(), named, by="test")
        written += lines
    assert read[0] > 40, "it counts"
    assert read[1] <= 2 * read[0]
    assert written[1] <= 2 * written[0]


def test_of_three_tenants_of_one_key_two_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(
        "".join(f'[tenants.{name}]\nkeys = ["klatch-{name}-key", "{KEY}", "{KEY}"]\n' for name in ("a", "b", "c"))
    )
    with pytest.raises(TenantsFileError, match=r"tenants\.a and tenants\.b have one key"):
        read_tenants(tmp_path / "t.toml")


async def test_a_key_that_is_written_while_a_door_serves_is_known_to_it() -> None:
    log = MemoryLog({topic.name: 1 for topic in TOPICS})
    async with await Ledger[TenantConfigured].open(log, TENANTS, Namespace(), TenantConfigured) as ledger:
        book = KeyBook(ledger)
        assert DIGEST not in book
        tenant = tenant_configured(Tenant("acme"), [KEY], Limits())
        await asyncio.gather(ledger.changed(), write_tenants(log, Namespace(), [tenant], by="test"))
        assert book[DIGEST] == "acme"
        assert list(book) == [DIGEST]


def test_rules_weight_and_priority_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(
        "[tenants.acme]\nweight = 2\npriority = 3\n"
        '[[tenants.acme.rules]]\nperson = "*"\nlimits = {tokens_per_day = 5}\n'
    )
    (tenant,) = read_tenants(tmp_path / "t.toml")
    assert (tenant.weight, tenant.priority) == (2.0, 3)
    assert tenant.rules == (LimitRule(person="*", limits=Limits(tokens_per_day=5)),)


def test_a_rule_that_names_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("[[tenants.acme.rules]]\nlimits = {tokens_per_day = 5}\n")
    with pytest.raises(TenantsFileError, match=r"tenants\.acme\.rules: rule 1 names no use_case, person or model"):
        read_tenants(tmp_path / "t.toml")
