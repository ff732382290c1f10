# pyright: basic, reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
# Faust's types stop at its tables (`Any` keys, values and events).
"""A Faust table that counts into rows, says when they are durable, and that a late writer cannot take back.

Faust 0.15.3 hands changes of a table to its producer and forgets them, and it writes each change at once: here a row
is decoded, encoded and written once for all that was counted since its last write. Faust restores the last record of
a key, where a stopped process that wakes up may have written after its successor. Values are encoded `Row`s.
"""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any, cast

import faust
import msgspec

from klatch_workers.views.aggregate import Group, Row, Tally, count

MINUTE_S = 60
KEPT_S = 24 * 3600

encode_row = msgspec.json.Encoder().encode
decode_row = msgspec.json.Decoder(Row).decode


class Unwritten(msgspec.Struct, frozen=True):
    """What was counted in a row since it was last written."""

    written: Row | None
    added: Row

    @property
    def row(self) -> Row:
        """Both together."""
        return count(self.written, self.added.offset, self.added.tally)


class DurableTable(faust.Table[Any, Any]):
    """Keys are `((partition, tenant, model), (start_s, end_s))`: no two input partitions share a row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unwritten = dict[Any, Unwritten]()

    def count(self, partition: int, group: Group, at_s: float, offset: int, tally: Tally) -> None:
        """Count a record, unless its row holds it already. To be durable it waits for `write`."""
        key = ((partition, *group), cast("Any", self.window).current(at_s))
        known = self._unwritten.get(key)
        written = known.written if known else self._written(key)
        if written is None or offset > written.offset:
            self._unwritten[key] = Unwritten(written, count(known.added if known else None, offset, tally))

    def write(self) -> Iterator[tuple[Group, Tally, "asyncio.Future[Any]"]]:
        """Write the rows that changed: of each its group, what was added, and the future of its changelog record."""
        unwritten, self._unwritten = self._unwritten, {}
        for key, change in unwritten.items():
            self[key] = encode_row(change.row)
            yield Group(*key[0][1:]), change.added.tally, self._sent

    def drop_unwritten(self) -> None:
        """Forget what was counted since the last write: it will come again."""
        self._unwritten.clear()

    def since(self, start_s: float) -> Iterator[tuple[Group, Tally]]:
        """What was counted in the minutes that began at `start_s` or later."""
        for key in self.data.keys() | self._unwritten.keys():
            (_, *group), (began_s, _) = key
            if began_s >= start_s:
                row = self._unwritten[key].row if key in self._unwritten else self._written(key)
                if row is not None:
                    yield Group(*group), row.tally

    def forget(self, before_s: float) -> None:
        """Drop windows that began before: Faust never expires those that it restored."""
        for key in [key for key in self.data if key[1][0] < before_s]:
            self.data.pop(key, None)

    def partition_for_key(self, key: Any) -> int:
        return int(key[0][0])

    def send_changelog(self, *args: Any, **kwargs: Any) -> Any:
        self._sent = super().send_changelog(*args, **kwargs)
        return self._sent

    def apply_changelog_batch(self, batch: Iterable[Any]) -> None:
        # The store reads the batch one by one while it takes it in, so `newer` sees all that came before.
        super().apply_changelog_batch(event for event in batch if self._newer(event))

    def _written(self, key: Any) -> Row | None:
        value = self.data.get(key)
        return decode_row(value) if value else None

    def _newer(self, event: Any) -> bool:
        held, value = self.data.get(self._to_key(event.key)), event.value
        return held is None or value is None or decode_row(value).offset >= decode_row(held).offset
