"""A worker on FastStream 0.7, as its documentation shows one, at the safest settings that are documented.

Where each setting is documented (https://faststream.ag2.ai/latest, docs/docs/en in github.com/ag2ai/faststream):

ack_policy NACK_ON_ERROR   kafka/ack: at least once; the offset is committed after the handler, and read again on errors
max_workers                kafka/Subscriber, "Concurrent processing": with NACK_ON_ERROR "concurrent between topic
                           partitions and sequential within a partition to ensure reliable at-least-once processing"
group_id                   kafka/ack: at least once needs a group
auto_offset_reset          KafkaBroker.subscriber: `earliest`, so that nothing written before the group began is missed
acks, enable_idempotence   KafkaBroker: "the strongest available guarantee", and "exactly one copy of each message"
publish                    kafka/Publisher: waits until the broker has the record (`no_confirm` is left off)
graceful_timeout           KafkaBroker: running handlers may end; shorter than the supervisor's patience
"""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import click
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker

from klatch_workers.torture.baselines.protocol import REQUESTS, STREAM, answer
from klatch_workers.torture.baselines.ready import say_ready


def app(kafka: str, model_url: str, partitions: int, drain_s: float) -> FastStream:
    """The application, not yet connected."""
    broker = KafkaBroker(kafka.split(","), acks="all", enable_idempotence=True, graceful_timeout=drain_s)
    application, open_ = FastStream(broker), AsyncExitStack()
    session: aiohttp.ClientSession

    @application.on_startup
    async def connect() -> None:
        nonlocal session
        session = await open_.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))

    @broker.subscriber(
        REQUESTS,
        group_id="faststream",
        ack_policy=AckPolicy.NACK_ON_ERROR,
        auto_offset_reset="earliest",
        max_workers=partitions,
    )
    async def reply(request: dict[str, Any]) -> None:
        async for record in answer(session, model_url, request):
            await broker.publish(record, topic=STREAM, key=request["conversation"].encode())

    application.after_startup(say_ready)
    application.after_shutdown(open_.aclose)
    return application


@click.command()
@click.option("--kafka", required=True)
@click.option("--model-url", required=True)
@click.option("--partitions", type=int, required=True)
@click.option("--drain-s", type=float, required=True)
def main(kafka: str, model_url: str, partitions: int, drain_s: float) -> None:
    """Answer requests until SIGTERM."""
    asyncio.run(app(kafka, model_url, partitions, drain_s).run())


if __name__ == "__main__":
    main()
