"""`klatch up`: one command, one terminal, everything.

When it serves, it says so: on a terminal with one chat event led through the pipeline and snippets that are ready to
paste, with `--json` with one object a line, first among them `{"event": "ready", …}`. SIGTERM and Ctrl-C drain and
end with 0; a second one does not wait.
"""

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from klatch_schemas.topics import Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.log import LogError
from klatch_workers.kafka import KafkaChildError
from klatch_workers.logs import configure_logs
from klatch_workers.models_file import ModelsFileError
from klatch_workers.settings import Settings, read_settings, what_is_wrong
from klatch_workers.tenants import TenantsFileError
from klatch_workers.up.children import ChildFailed
from klatch_workers.up.everything import LOCAL_TENANT, AlreadyUp, Everything, Wanted, everything, keep_broker
from klatch_workers.up.showcase import showcase

_QUESTION = "In one short sentence: what is a klatch?"


@click.command()
@click.option("--http", metavar="HOST:PORT", help="Where the HTTP door listens.  [default: 127.0.0.1:8080]")
@click.option("--kafka", metavar="HOST:PORT", help="Use this cluster instead of starting one.")
@click.option("--model-url", metavar="URL", help="Use this OpenAI-compatible server instead of the local model.")
@click.option("--model", metavar="NAME", help="Ask it for this model, whatever requests name; not of routes.")
@click.option(
    "--model-key", metavar="KEY", help="The server's API key. Better set KLATCH_MODEL_KEY: others see options."
)
@click.option("--data", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), help="Klatch's data folder.")
@click.option("--namespace", metavar="NAME", help="Prefix of all topics and groups.")
@click.option(
    "--tenants",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Tenants, their keys and limits (TOML or JSON); see docs/operations.md.",
)
@click.option(
    "--models",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Routes of model names, as `klatch models apply` takes them; see docs/operations.md.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def up(kafka: str | None, tenants: Path | None, models: Path | None, as_json: bool, **options: Any) -> None:
    """Run everything on this machine: Kafka, all stages, the HTTP door, a local model.

    Data is kept in the data folder; Ctrl-C ends everything.
    """
    try:
        settings = read_settings(**options)
    except ValueError as error:
        raise click.UsageError(what_is_wrong(error)) from error
    configure_logs("warning")
    # What it would log over and over while a broker is away is said once, by what fails for good.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        asyncio.run(_up(settings, Wanted(kafka, tenants, models), _Voice(as_json)))
    except* (AlreadyUp, TenantsFileError, ModelsFileError) as errors:
        _fail(errors, 2)
    except* (ChildFailed, KafkaChildError, LogError, OSError) as errors:
        _fail(errors, 1)


async def _up(settings: Settings, wanted: Wanted, voice: "_Voice") -> None:
    stop = asyncio.Event()
    starting = asyncio.current_task()

    def ask_to_stop() -> None:
        if stop.is_set() or not voice.serving:
            # Asked twice, or before anything serves: whatever is on a leash goes when we go.
            assert starting  # noqa: S101 - inside asyncio.run
            starting.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ask_to_stop)
    try:
        async with everything(settings, wanted, voice.say) as running:
            voice.serve(running)
            keeping = asyncio.create_task(keep_broker(running, voice.say))
            if voice.shows:
                await _show(running, voice)
            await _first(stop, keeping)
            voice.say("stopping", {})
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    voice.say("stopped", {})


async def _first(stop: asyncio.Event, keeping: "asyncio.Task[None]") -> None:
    stopping = asyncio.create_task(stop.wait())
    watched = {stopping} if keeping.done() and not keeping.exception() else {stopping, keeping}
    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    if keeping.done() and not stopping.done():
        keeping.result()
        await stopping
    for task in (stopping, keeping):
        task.cancel()


async def _show(running: Everything, voice: "_Voice") -> None:
    kafka = await KafkaLog.open(KafkaOptions(running.bootstrap))
    try:
        voice.line(click.style(f"\nOne chat event, through the pipeline: {_QUESTION!r}\n", bold=True))
        async for step in showcase(kafka, Namespace.named(running.settings.namespace), LOCAL_TENANT, _QUESTION):
            place = f"{step.topic}/{step.partition} @{step.offset}"
            said = click.style(repr(step.text), fg="green") if step.text else ""
            voice.line(f"  {step.after_ms:8.1f} ms  {place:<26} {step.what} {said}".rstrip())
    except TimeoutError:
        voice.line("  (no answer within a minute; `klatch doctor` says what is wrong)")
    finally:
        await kafka.close()
    voice.snippets(running)


class _Voice:
    """Says things to a person, or as JSON lines to a program."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self.shows = not as_json and sys.stdout.isatty()
        self.serving = False

    def say(self, event: str, facts: Mapping[str, Any]) -> None:
        """An event with its facts; before `ready`, JSON readers hear nothing."""
        if self._json:
            if self.serving:
                self.line(json.dumps({"event": event, **facts}))
        else:
            self._tell(event, facts)

    def serve(self, running: Everything) -> None:
        """Everything serves."""
        self.serving = True
        if self._json:
            self.line(json.dumps({"event": "ready", **running.facts()}))
        elif not self.shows:
            self.snippets(running)

    def line(self, text: str) -> None:
        """A line on stdout."""
        click.echo(text)
        sys.stdout.flush()

    def snippets(self, running: Everything) -> None:
        """What to paste next."""
        facts = running.facts()
        self.line(_SNIPPETS.format(**facts, data=running.settings.data))

    def _tell(self, event: str, facts: Mapping[str, Any]) -> None:
        match event:
            case "fetching":
                done, size = facts["jars"] == facts["of"], facts["bytes"] / 1e6
                # Only a terminal can have a line written over.
                if done or self.shows:
                    said = f"  fetching Kafka, once: {facts['jars']} of {facts['of']} jars, {size:.0f} MB"
                    click.echo(said + ("\n" if done else "\r"), nl=False)
            case "started":
                click.echo(f"  {facts['process']:<11} up in {facts['seconds']:.1f} s")
            case "died":
                click.echo(f"  {facts['process']} died; starting it again", err=True)
            case "restarted":
                click.echo(f"  {facts['process']} is back (pid {facts['pid']})", err=True)
            case "stopping":
                click.echo("\n  draining; once more Ctrl-C to end at once")
            case _:
                pass
        sys.stdout.flush()


_SNIPPETS = """
klatch serves at {http}, Kafka at {bootstrap}. Data and logs: {data}

  curl {http}/v1/chat/completions -H "Authorization: Bearer {api_key}" \\
    -H "Content-Type: application/json" -N \\
    -d '{{"model": "local", "stream": true, "messages": [{{"role": "user", "content": "Say hello."}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{http}/v1", api_key="{api_key}")
  reply = client.chat.completions.create(model="local", messages=[{{"role": "user", "content": "Say hello."}}])
  print(reply.choices[0].message.content)

Or `klatch chat` in another terminal. Ctrl-C ends everything."""


def _fail(errors: BaseExceptionGroup[BaseException], code: int) -> None:
    for error in _leaves(errors):
        click.echo(f"klatch up: {error}", err=True)
    sys.exit(code)


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    within = cast("BaseExceptionGroup[BaseException]", error).exceptions
    return [leaf for one in within for leaf in _leaves(one)]
