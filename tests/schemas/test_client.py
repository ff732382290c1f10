"""The Python client shows every reader what stands, also of a reply that was cut short before the reader came.

What needs a Kafka is in tests/broker; here is what the client makes of what a reader heard.
"""

import msgspec
import pytest

from klatch_schemas.assembly import Ended, Standing
from klatch_schemas.client import Client, Shown, shown_of
from klatch_schemas.errors import Cancelled, RequestTooLarge
from klatch_schemas.events import StreamEnd, StreamError
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.topics import MAX_RECORD_BYTES

CHUNK = {"choices": [{"index": 0, "delta": {"content": "so far"}}]}


def test_a_late_reader_of_a_cancelled_reply_is_shown_what_stands_and_then_the_error() -> None:
    shown = shown_of([Standing(7, 1, 0, msgspec.Raw(msgspec.json.encode(CHUNK))), Ended("cancelled", None)])
    first = next(shown)
    assert first == Shown(7, CHUNK)
    assert first.text == "so far"
    with pytest.raises(Cancelled):
        next(shown)


def test_an_end_that_a_cancel_came_before_tells_a_late_reader_of_no_other_outcome() -> None:
    meant = StreamEnd(
        request=RequestId("r"),
        tenant=Tenant("acme"),
        conversation=Conversation("c"),
        writer=Writer("w"),
        status="expired",
        error=StreamError(code="deadline_exceeded", message="too late"),
    )
    with pytest.raises(Cancelled):
        next(shown_of([Ended("cancelled", meant)]))


async def test_what_fits_no_record_is_refused_with_the_limit() -> None:
    client = Client("nobody-is-asked:1", tenant="acme")
    request = client.request({"model": "m", "messages": [{"role": "user", "content": "x" * MAX_RECORD_BYTES}]})
    with pytest.raises(RequestTooLarge, match=r"10,000,\d\d\d bytes .* chat.requests, .* up to 10,000,000"):
        await client.publish(request)
