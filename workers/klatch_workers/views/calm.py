# pyright: basic, reportMissingTypeStubs=false
# Faust's and aiokafka's consumers are `Any` inside.
"""Faust's transport, in no hurry: it fetches twice a second what came meanwhile, not each record as it comes.

And it asks who leads a topic for as long as it writes to it. aiokafka's producer asks about all topics until it meets
one that it does not know, and from then on only about those it was told of: what waits for the others then waits for
ever, while the client asks without a pause (aiokafka 0.14.0; met where a changelog is created after the producer).

Views read nearly everything that a request writes, and nobody waits for them. A fetch for each of these records took
a fifth of a request's way to its first token, in the broker and on the processors that they share
(docs/performance.md). Faust 0.15.3 has no setting for it.
"""

from typing import Any

from faust.transport.drivers import aiokafka as driver

FETCH_WAIT_MS = 500
FETCH_BYTES = 1024 * 1024
"""So much is fetched at once, however soon it is there."""


class _Thread(driver.AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer: Any = super()._create_worker_consumer(transport)
        # Read when the consumer starts.
        consumer._fetch_min_bytes, consumer._fetch_max_wait_ms = FETCH_BYTES, FETCH_WAIT_MS  # noqa: SLF001
        return consumer


class _Consumer(driver.Consumer):
    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)


class _Producer(driver.Producer):
    async def send(self, topic: str, *args: Any, **kwargs: Any) -> Any:
        self._ensure_producer().client.add_topic(topic)
        return await super().send(topic, *args, **kwargs)


class CalmTransport(driver.Transport):
    """See the module."""

    Consumer = _Consumer
    Producer = _Producer
