# pyright: basic
# Faust's tables are `Any` inside.
"""The Faust tables of views, without a broker: what is counted, written, and restored from their changelog."""

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
ACME = Group("acme", "m")


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
    assert list(views.since(MINUTE)) == [(ACME, Tally(requests=5))]
    assert len(list(views.since(MINUTE - 60))) == 2


async def test_restored_minutes_are_forgotten_too(views: Views) -> None:
    table_of(views).apply_changelog_batch([change(5, 9), change(2, 4, began=MINUTE - 60)])
    table_of(views).forget(before_s=MINUTE)
    assert [tally for _, tally in views.since(0)] == [Tally(requests=5)]


async def test_what_was_not_assigned_yet_counts_as_recovering(views: Views) -> None:
    assert views.recovering


async def test_what_is_counted_is_read_at_once_and_written_once_for_all_since_the_last_write(views: Views) -> None:
    table = table_of(views)
    table.apply_changelog_batch([change(5, 9)])
    for offset in (10, 11):
        table.count(0, ACME, MINUTE + offset, offset, Tally(requests=1))
    assert list(views.since(0)) == [(ACME, Tally(requests=7))]

    assert [(group, added) for group, added, _ in table.write()] == [(ACME, Tally(requests=2))]
    assert [decode_row(value) for value in table.data.values()] == [Row(11, Tally(requests=7))]
    assert list(table.write()) == []


async def test_a_record_that_a_restored_row_holds_is_not_counted_again(views: Views) -> None:
    table = table_of(views)
    table.apply_changelog_batch([change(5, 9)])
    table.count(0, ACME, MINUTE, 9, Tally(requests=1))
    table.count(1, ACME, MINUTE, 9, Tally(requests=1))
    assert sorted(tally.requests for _, tally in views.since(0)) == [1, 5], "another partition has a row of its own"


async def test_what_was_not_written_can_be_dropped(views: Views) -> None:
    table = table_of(views)
    table.apply_changelog_batch([change(5, 9)])
    table.count(0, ACME, MINUTE, 10, Tally(requests=1))
    table.drop_unwritten()
    assert list(views.since(0)) == [(ACME, Tally(requests=5))]


async def test_a_change_goes_to_the_partition_that_it_counts(views: Views) -> None:
    table = table_of(views)
    table.count(1, ACME, MINUTE, 3, Tally(requests=1))
    change: Any
    (change,) = [change for *_, change in table.write()]
    assert change.message.partition == 1


async def test_resuming_streams_that_flow_drops_nothing_that_they_hold(views: Views) -> None:
    flow = views.app.flow_control
    held = views.app.FlowControlQueue(maxsize=1, clear_on_resume=True)
    flow.resume()
    held.put_nowait("a record")
    flow.resume()
    assert held.qsize() == 1

    flow.suspend()
    flow.resume()
    assert held.empty(), "a rebalance hands the partition over: its owner reads it again"
