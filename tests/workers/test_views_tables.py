# pyright: basic
# Faust's tables are `Any` inside.
"""The Faust tables of views, as they are restored from their changelog, without a broker."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klatch_schemas.topics import Namespace
from klatch_workers.views.aggregate import Group, Row, Tally
from klatch_workers.views.app import SOURCES, Views
from klatch_workers.views.shapes import Shape
from klatch_workers.views.tables import DurableTable, decode_row, encode_row

MINUTE = 1_800_000_000.0


@pytest.fixture
async def views(tmp_path: Path) -> Views:
    return Views("127.0.0.1:1", Namespace.named("t"), dict.fromkeys(SOURCES, Shape(2, 1)), tmp_path)


def change(requests: int, offset: int, began: float = MINUTE) -> Any:
    """A changelog record as Faust hands it over."""
    value = encode_row(Row(offset, Tally(requests=requests)))
    key = [[0, "acme", "m"], [began, began + 59.9]]
    return SimpleNamespace(key=key, value=value, message=SimpleNamespace(value=value, partition=0))


def table_of(views: Views) -> DurableTable:
    return views._tables["usage"]


async def test_what_a_stopped_owner_wrote_late_does_not_take_counts_back(views: Views) -> None:
    table_of(views).apply_changelog_batch([change(5, offset=9), change(3, offset=7)])
    table_of(views).apply_changelog_batch([change(4, offset=8)])
    assert [decode_row(value) for value in table_of(views).data.values()] == [Row(9, Tally(requests=5))]


async def test_restored_minutes_are_read_from_the_minute_asked_for(views: Views) -> None:
    table_of(views).apply_changelog_batch([change(5, 9), change(2, 4, began=MINUTE - 60)])
    assert list(views.since(MINUTE)) == [(Group("acme", "m"), Tally(requests=5))]
    assert len(list(views.since(MINUTE - 60))) == 2


async def test_restored_minutes_are_forgotten_too(views: Views) -> None:
    table_of(views).apply_changelog_batch([change(5, 9), change(2, 4, began=MINUTE - 60)])
    table_of(views).forget(before_s=MINUTE)
    assert [tally for _, tally in views.since(0)] == [Tally(requests=5)]


async def test_what_was_not_assigned_yet_counts_as_recovering(views: Views) -> None:
    assert views.recovering
