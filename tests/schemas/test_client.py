"""The Python client shows every reader what stands, also of a reply that was cut short before the reader came.

What needs a Kafka is in tests/broker; here is what the client makes of what a reader heard.
"""

import msgspec
import pytest

from klatch_schemas.assembly import Ended, Standing
from klatch_schemas.client import Shown, shown_of
from klatch_schemas.errors import Cancelled

CHUNK = {"choices": [{"index": 0, "delta": {"content": "so far"}}]}


def test_a_late_reader_of_a_cancelled_reply_is_shown_what_stands_and_then_the_error() -> None:
    shown = shown_of([Standing(7, 1, 0, msgspec.Raw(msgspec.json.encode(CHUNK))), Ended("cancelled", None)])
    first = next(shown)
    assert first == Shown(7, CHUNK)
    assert first.text == "so far"
    with pytest.raises(Cancelled):
        next(shown)
