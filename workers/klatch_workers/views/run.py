"""Views as a process: Faust and the reading side in one event loop, from start to an ordered stop.

Faust is started as the service that it is, without its worker, which would own the loop, the signals and the logs.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from aiohttp import web

from klatch_schemas.topics import Namespace
from klatch_workers.settings import Settings, host_port
from klatch_workers.views.app import SOURCES, Views
from klatch_workers.views.http import reading_side
from klatch_workers.views.lenient import read_whatever_was_written
from klatch_workers.views.shapes import shapes_of

log = structlog.get_logger(__name__)


class ViewsFailed(RuntimeError):
    """Faust stopped by itself; the process should end and be started again."""


async def run_views(settings: Settings, stop: asyncio.Event, ready: Callable[[dict[str, Any]], None]) -> None:
    """Count until `stop` is set. `ready` is told `{"url": …}` once the tables are restored.

    Raises UnknownTopic and LogError before anything runs, OSError if the address is taken, ViewsFailed.
    """
    read_whatever_was_written()
    namespace = Namespace.named(settings.namespace)
    found = await shapes_of(settings.kafka, [namespace.of(topic) for topic in SOURCES.values()])
    views = Views(settings.kafka, namespace, dict(zip(SOURCES, found, strict=True)), settings.data / "views")
    async with _serving(views, settings) as url:
        await _count(views, stop, lambda: ready({"url": url}), settings.drain_s)


async def _count(views: Views, stop: asyncio.Event, ready: Callable[[], None], drain_s: float) -> None:
    starting = asyncio.create_task(views.app.start())
    starting.add_done_callback(lambda done: ready() if not done.cancelled() and not done.exception() else None)
    stopping = asyncio.create_task(stop.wait())
    ended = asyncio.create_task(views.app.wait_until_stopped())
    try:
        await asyncio.wait({starting, stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await asyncio.wait({stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _end(views, drain_s)
        for task in (starting, stopping, ended):
            task.cancel()
    if reason := views.app.crash_reason:
        raise ViewsFailed(f"counting stopped: {reason}") from reason


async def _end(views: Views, drain_s: float) -> None:
    # Without a broker the last commit would wait for ever; what could not be committed is counted once anyway.
    ending = asyncio.create_task(views.stop())
    await asyncio.wait({ending}, timeout=drain_s)
    if ending.done():
        ending.result()
    else:
        log.warning("views.stopped_without_commit", waited_s=drain_s)
        ending.cancel()


@asynccontextmanager
async def _serving(views: Views, settings: Settings) -> AsyncGenerator[str]:
    key = settings.internal_key.get_secret_value() if settings.internal_key else None
    host, port = host_port(settings.views)
    runner = web.AppRunner(reading_side(views, key), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
