# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""Views set what aiokafka's consumer reads when it starts, as Faust has no setting for it."""

from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped, unused-ignore]


async def test_aiokafka_still_keeps_how_it_fetches_where_views_set_it() -> None:
    consumer = AIOKafkaConsumer(fetch_min_bytes=7, fetch_max_wait_ms=8)
    assert (consumer._fetch_min_bytes, consumer._fetch_max_wait_ms) == (7, 8)
    await consumer.stop()
