# pyright: basic, reportMissingTypeStubs=false
# Faust's and aiokafka's consumers are `Any` inside.
"""Faust's transport, in no hurry: it fetches twice a second what came meanwhile, not each record as it comes.

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


class CalmTransport(driver.Transport):
    """See the module."""

    Consumer = _Consumer
