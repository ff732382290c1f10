# pyright: basic, reportMissingTypeStubs=false
# Faust's streams and events are `Any` inside.
"""A worker on faust-streaming 0.15.3, as its documentation shows one, at the safest settings that are documented.

Where each setting is documented (https://faust-streaming.github.io/faust):

processing_guarantee       userguide/settings: `exactly_once`, whose producers are idempotent and wait for all replicas.
                           Records to topics that the app does not read itself are not in its transactions (issue 177)
noack, event.ack           userguide/streams: an event is acknowledged by hand, when its reply is written; Faust itself
                           acknowledges an event whose agent failed, too
isolated_partitions        reference/faust.agents: one agent a partition, so that replies are made side by side and a
                           conversation's stay in order; plain `concurrency` is out of order (userguide/agents)
send                       userguide/agents: what `send` returns is awaited until the broker has the record
stream_wait_empty          userguide/settings: events in progress may end before partitions are given away
broker_commit_*            userguide/settings: acknowledged events are committed at once, so that few are done again
broker_session_timeout     userguide/settings: 10 s, as all systems here have it; its default of 60 s only takes longer

Faust is started as the service that it is (reference/faust.app): its worker program would own the command line.
"""

import asyncio
import signal
from typing import Any

import aiohttp
import click
import faust

from klatch_workers.torture.baselines.protocol import REQUESTS, STREAM, answer
from klatch_workers.torture.baselines.ready import say_ready


def app(kafka: str, model_url: str, partitions: int) -> faust.App:
    """The application, not yet connected."""
    application = faust.App(
        "faust",
        broker=[f"kafka://{server}" for server in kafka.split(",")],
        processing_guarantee="exactly_once",
        stream_wait_empty=True,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=10.0,
        broker_heartbeat_interval=3.0,
        broker_commit_every=1,
        broker_commit_interval=0.5,
        topic_partitions=partitions,
        topic_disable_leader=True,
        store="memory://",
        web_enabled=False,
        autodiscover=False,
    )
    requests = application.topic(REQUESTS, key_type=bytes, value_serializer="json", partitions=partitions)
    streams = application.topic(STREAM, key_type=bytes, value_serializer="json", partitions=partitions)

    @application.agent(requests, isolated_partitions=True)
    async def reply(stream: Any) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            async for event in stream.noack().events():
                async for record in answer(session, model_url, event.value):
                    written = await streams.send(key=event.value["conversation"].encode(), value=record)
                    await written
                event.ack()

    return application


async def _run(application: faust.App, drain_s: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await application.start()
    say_ready()
    waiting = {asyncio.create_task(application.wait_until_stopped()), asyncio.create_task(stop.wait())}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait({asyncio.create_task(application.stop())}, timeout=drain_s)
    if application.crash_reason:
        raise application.crash_reason


@click.command()
@click.option("--kafka", required=True)
@click.option("--model-url", required=True)
@click.option("--partitions", type=int, required=True)
@click.option("--drain-s", type=float, required=True)
def main(kafka: str, model_url: str, partitions: int, drain_s: float) -> None:
    """Answer requests until SIGTERM."""
    asyncio.run(_run(app(kafka, model_url, partitions), drain_s))


if __name__ == "__main__":
    main()
