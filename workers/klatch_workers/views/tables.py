# pyright: basic, reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
# Faust's types stop at its tables (`Any` keys, values and events).
"""A Faust table that says when a change is durable, and that a late writer cannot take back.

Faust 0.15.3 hands changes of a table to its producer and forgets them: a commit may pass one that is still on its
way, which a kill then loses. And it restores the last record of a key, where a stopped process that wakes up may
have written after its successor. Values are encoded `Row`s.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import faust
import msgspec

from klatch_workers.views.aggregate import Row

MINUTE_S = 60
KEPT_S = 24 * 3600

encode_row = msgspec.json.Encoder().encode
decode_row = msgspec.json.Decoder(Row).decode


class DurableTable(faust.Table[Any, Any]):
    """A table whose `written` is the future of its last change's changelog record."""

    written: "asyncio.Future[Any]"

    def send_changelog(self, *args: Any, **kwargs: Any) -> Any:
        self.written = super().send_changelog(*args, **kwargs)
        return self.written

    def apply_changelog_batch(self, batch: Iterable[Any]) -> None:
        # The store reads the batch one by one while it takes it in, so `newer` sees all that came before.
        super().apply_changelog_batch(event for event in batch if self._newer(event))

    def _verify_source_topic_partitions(self, source_topic: str) -> None:
        """Faust would compare with what it knew of the changelog before it made it, and stop at the first event.

        A changelog is made with the partitions of its input, whose count never changes.
        """

    def _newer(self, event: Any) -> bool:
        held, value = self.data.get(self._to_key(event.key)), event.value
        return held is None or value is None or decode_row(value).offset >= decode_row(held).offset

    def forget(self, before_s: float) -> None:
        """Drop windows that began before: Faust never expires those that it restored."""
        for key in [key for key in self.data if key[1][0] < before_s]:
            self.data.pop(key, None)
