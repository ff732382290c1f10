"""`klatch publish FILE`: chat requests from JSON lines into Kafka, as fast as Kafka takes them.

Prints a line for each request once it stands in the log. Lines that are no requests are named on stderr, and the rest
goes on; the exit code is 1 then, and also when `--wait` saw a reply that was not completed.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import click

from klatch_schemas.events import ChatRequested
from klatch_streams.log import AppendFailed, Log
from klatch_workers.cli.context import (
    FAILED,
    UNREACHABLE,
    CommandFailed,
    Context,
    kafka_options,
    opened_log,
    perform,
    say_json,
    shared_options,
)
from klatch_workers.cli.input_lines import lines_of
from klatch_workers.cli.publishing import Line, Published, Publishing
from klatch_workers.cli.replies import Finished, Replies
from klatch_workers.cli.request_lines import Defaults

_EXAMPLE: Final = '{"messages": [{"role": "user", "content": "Hello"}], "conversation": "c1"}'


@click.command(
    epilog=f'A line: {_EXAMPLE}. Also taken: a Chat Completions body with klatch\'s fields under "klatch", and whole '
    "chat.requested events."
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), default="-")
@click.option("--tenant", help="Whose requests these are, where a line does not say.  [KLATCH_TENANT]")
@click.option("--model", help="The model, where a line names none.")
@click.option("--batch", metavar="NAME", help="Name the file: published again, none of its lines asks twice.")
@click.option("--wait", is_flag=True, help="Wait for the replies and print them.")
@click.option("--patience", type=click.FloatRange(0.1), default=300.0, show_default=True, help="Of --wait: seconds.")
@kafka_options
@shared_options
def publish(
    file: str, model: str | None, batch: str | None, wait: bool, patience: float, as_json: bool, **options: Any
) -> None:
    """Publish chat requests from FILE, one JSON object a line (- for stdin)."""

    async def work() -> int:
        context = Context.read(**options)
        defaults = Defaults(context.tenant, model or context.settings.model, batch)
        async with opened_log(context) as log:
            voice = Voice(file, as_json=as_json)
            waiting = await Replies.open(log, context.namespace, voice.finished, patience) if wait else None
            return await _publish(log, context, defaults, voice, waiting)

    perform(work, as_json=as_json)


async def _publish(log: Log, context: Context, defaults: Defaults, voice: "Voice", waiting: Replies | None) -> int:
    voice.waiting = waiting
    publishing = Publishing(log, context.namespace, defaults, voice)
    reading = asyncio.create_task(waiting.run()) if waiting else None
    try:
        with voice:
            await publishing.run(voice.watched())
        voice.say_counts(publishing.published, publishing.refused)
        if waiting and reading:
            waiting.complete()
            await reading
    except AppendFailed as error:
        raise CommandFailed(
            f"{error}; {publishing.published} requests stand in the log, those on their way may or may not. With "
            "--batch the file can be published again: no line asks twice",
            UNREACHABLE,
        ) from error
    finally:
        if waiting and reading:
            reading.cancel()
            await asyncio.wait([reading])
            await waiting.close()
    return FAILED if publishing.refused or voice.failed else 0


class Voice:
    """Says what becomes of lines: facts to stdout, problems and progress to stderr."""

    def __init__(self, path: str, *, as_json: bool) -> None:
        self._path = path
        self._json = as_json
        self.waiting: Replies | None = None
        self.failed = False
        """Whether a reply was not completed."""
        err, out = click.get_text_stream("stderr"), click.get_text_stream("stdout")
        size = Path(path).stat().st_size if path != "-" else 0
        # Where the results themselves scroll by, a bar would only be in their way.
        shown = size > 0 and err.isatty() and not out.isatty()
        self._bar = click.progressbar(length=max(size, 1), label="Publishing", file=err, hidden=not shown)

    def __enter__(self) -> None:
        self._bar.__enter__()

    def __exit__(self, *raised: object) -> None:
        self._bar.render_finish()

    async def watched(self) -> AsyncIterator[Line]:
        """The lines, with the bar following."""
        try:
            async for line in lines_of(self._path):
                yield line
                self._bar.update(len(line.text) + 1)
        except OSError as error:
            raise CommandFailed(f"cannot read {self._path}: {error}") from error

    def publishing(self, request: ChatRequested) -> None:
        """See `Listener`."""
        if self.waiting:
            self.waiting.expect(request)

    def published(self, published: Published) -> None:
        """See `Listener`."""
        request = published.request
        if self._json:
            say_json(
                {
                    "request": request.request,
                    "conversation": request.conversation,
                    "partition": published.partition.number,
                    "offset": published.offset,
                }
            )
        else:
            click.echo(request.request)

    def refused(self, number: int, reason: str, request: ChatRequested | None) -> None:
        """See `Listener`."""
        if self.waiting and request:
            self.waiting.forget(request)
        click.echo(f"line {number}: {reason}", err=True)

    def finished(self, reply: Finished) -> None:
        """A reply has ended."""
        request, error = reply.request.request, reply.end.error if reply.end else None
        self.failed = self.failed or reply.broken or reply.status != "completed"
        if self._json:
            usage = reply.end.usage.model_dump() if reply.end and reply.end.usage else None
            facts = {"request": request, "conversation": reply.request.conversation, "status": reply.status}
            reason = reply.end.finish_reason if reply.end else None
            said = error.model_dump(exclude_none=True) if error else None
            say_json({**facts, "text": reply.text, "finish_reason": reason, "usage": usage, "error": said})
            return
        click.echo(click.style(f"── {request} {reply.status}", dim=True))
        click.echo(reply.text)
        if error or reply.broken:
            click.echo(f"request {request}: {error.message if error else 'the log lacks a part of its text'}", err=True)

    def say_counts(self, published: int, refused: int) -> None:
        """The last word on publishing, for a person."""
        if not self._json:
            bad = f"; {refused} lines could not be published" if refused else ""
            click.echo(f"{published} requests published{bad}", err=True)
