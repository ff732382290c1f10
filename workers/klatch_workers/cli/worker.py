"""`klatch worker STAGE`: runs a stage on a Kafka that exists, until SIGTERM or SIGINT; then it drains and ends with 0.

A stage that fails is started anew, later and later, inside the same process, so that a broker that is away for a
while costs no operator; `--once` ends with 1 instead. With `--json` facts are printed as one object a line, first
`{"event": "ready", …}` for each stage.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click
import structlog

from klatch_streams.log import LogError
from klatch_streams.supervise import supervise
from klatch_workers import event_loop
from klatch_workers.logs import configure_logs
from klatch_workers.settings import Settings, read_settings, what_is_wrong
from klatch_workers.wiring import STAGES, Begin, MissingSetting, WrongSetup, run_stage

log = structlog.get_logger(__name__)

NICENESS = {"views": 10}
"""Of stages that nobody waits for once they serve: where all share a machine, requests come first."""


@click.command()
@click.argument("stage", type=click.Choice([*STAGES, "all"]))
@click.option("--kafka", metavar="HOST:PORT", help="Bootstrap servers.  [KLATCH_KAFKA]")
@click.option("--namespace", metavar="NAME", help="Prefix of topics and groups.  [KLATCH_NAMESPACE]")
@click.option("--http", metavar="HOST:PORT", help="Where the HTTP door listens.  [KLATCH_HTTP]")
@click.option("--model-url", metavar="URL", help="An OpenAI-compatible model server, with /v1.  [KLATCH_MODEL_URL]")
@click.option("--model", metavar="NAME", help="Asked for models without a route.  [KLATCH_MODEL]")
@click.option("--data", metavar="DIR", help="Klatch's data folder.  [KLATCH_DATA]")
@click.option("--once", is_flag=True, help="End when the stage fails instead of starting it anew.")
@click.option("--json", "as_json", is_flag=True, help="Print facts as one JSON object a line.")
@click.option("--wait", is_flag=True, hidden=True, help="Begin when stdin says so, with a JSON object of settings.")
def worker(stage: str, once: bool, as_json: bool, wait: bool, **options: Any) -> None:
    """Run one STAGE, or all of them, on a Kafka that exists.

    Several processes on several machines may run the same stage: they share its partitions.
    """
    try:
        settings = read_settings(**options)
    except ValueError as error:
        raise click.UsageError(what_is_wrong(error)) from error
    configure_logs(settings.log_level)
    names = list(STAGES) if stage == "all" else [stage]

    def ready(name: str, facts: dict[str, Any]) -> None:
        _say_ready(name, facts, as_json)
        # Not before: while everything starts, who is nicer than the others serves a second after them.
        os.nice(max(0, NICENESS.get(stage, 0) - os.nice(0)))

    try:
        begin = _told(settings) if wait else _at_once(settings)
        event_loop.run(_work(names, begin, ready, settings.drain_s, once=once))
    except* MissingSetting as errors:
        _fail(stage, errors, 2)
    except* WrongSetup as errors:
        _fail(stage, errors, 1)


def _at_once(settings: Settings) -> Begin:
    async def begin() -> Settings:
        return settings

    return begin


def _told(settings: Settings) -> Begin:
    """The settings, and what a line on stdin says over them, once it says it."""
    told: list[Settings] = []
    asking = asyncio.Lock()

    async def begin() -> Settings:
        async with asking:
            if not told:
                told.append(settings.model_copy(update=json.loads(await _line_of_stdin())))
        return told[0]

    return begin


async def _line_of_stdin() -> bytes:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    line = await reader.readline()
    if not line:
        raise WrongSetup("stdin was closed before it said that this may begin")
    return line


async def _work(
    names: list[str], begin: Begin, ready: Callable[[str, dict[str, Any]], None], drain_s: float, *, once: bool
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run_until(stop, names, begin, ready, drain_s, once=once)


async def run_until(
    stop: asyncio.Event,
    names: list[str],
    begin: Begin,
    ready: Callable[[str, dict[str, Any]], None],
    drain_s: float,
    *,
    once: bool,
) -> None:
    """Run stages until `stop` is set. Raises a group of what they failed with for good."""

    async def run(name: str) -> None:
        if stop.is_set():
            return
        try:
            await run_stage(name, begin, stop, lambda facts: ready(name, facts))
        except LogError as error:
            if not stop.is_set():
                raise
            # A log that is away takes nothing over from a stage that ends: its successors find what stands there.
            log.warning("stage.stopped_without_log", stage=name, error=type(error).__name__)

    async def keep_running(name: str) -> None:
        await supervise(lambda: run(name), name=name, gives_up=gives_up)

    def gives_up(error: Exception) -> bool:
        return once or stop.is_set() or isinstance(error, WrongSetup)

    async with asyncio.TaskGroup() as stages:
        for name in names:
            stages.create_task(_until_stopped(keep_running(name), stop, drain_s), name=name)


async def _until_stopped(work: Any, stop: asyncio.Event, drain_s: float) -> None:
    """Await `work`; once `stop` is set it has `drain_s` and a little more to end by itself."""
    running = asyncio.ensure_future(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done():
        await asyncio.wait({running}, timeout=drain_s + 5.0)
    if not running.done():
        running.cancel()
        await asyncio.wait({running})
        return
    running.result()


def _fail(stage: str, errors: BaseExceptionGroup[BaseException], code: int) -> None:
    for error in errors.exceptions:
        click.echo(f"klatch worker {stage}: {error}", err=True)
    sys.exit(code)


def _say_ready(stage: str, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "ready", "stage": stage, **facts}), flush=True)  # noqa: T201 - that is its output
    else:
        log.info("stage.ready", stage=stage, **facts)
    sys.stdout.flush()
