"""`klatch chat`: a conversation in the terminal, streamed, that can be come back to.

Ctrl-C while a reply comes cancels that reply, Ctrl-D ends. Without a terminal on stdin, or with `--once`, it takes one
turn and ends with 0, or with 1 if the reply was not completed. `--json` prints each piece of text and then the outcome.
"""

import asyncio
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import click

from klatch_workers.cli.chat_turn import Happening, Notice, Outcome, StartsOver, Text, Turn, first_model, open_session
from klatch_workers.cli.context import (
    FAILED,
    CommandFailed,
    Context,
    ServerAddress,
    door_options,
    outcomes,
    say_json,
    shared_options,
)

_PROMPT: Final = "assistant"
_HISTORY_LINES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Manner:
    """How every turn of this chat is asked and shown."""

    conversation: str
    person: str | None
    model: str
    prompt: str
    system: str | None
    quiet: bool
    as_json: bool

    def body(self, text: str) -> dict[str, Any]:
        """The request for one turn; the conversation's earlier ones come from the log."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        # A broken connection is resumed, so it must not cancel; Ctrl-C does, in so many words.
        ours: dict[str, Any] = {"conversation": self.conversation, "on_disconnect": "continue"}
        if self.person:
            ours["person"] = self.person
        if self.prompt and not self.system:
            ours["prompt"] = {"name": self.prompt}
        return {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "klatch": ours,
        }


@click.command()
@click.option("--conversation", metavar="NAME", help="Come back to a conversation.  [default: a new one]")
@click.option("--person", metavar="NAME", help="Who speaks: memories are recalled for them.")
@click.option("--model", metavar="NAME", help="The model.  [default: the first on offer]")
@click.option("--prompt", metavar="NAME", default=_PROMPT, show_default=True, help="Of the ledger; '' for none.")
@click.option("--system", metavar="TEXT", help="A system message instead of the prompt.")
@click.option("--once", metavar="TEXT", help="One turn, then end; - reads it from stdin.")
@click.option("--quiet", is_flag=True, help="The reply alone.")
@door_options
@shared_options
def chat(conversation: str | None, model: str | None, once: str | None, as_json: bool, **options: Any) -> None:
    """Chat in the terminal. Ctrl-C cancels a reply, Ctrl-D ends."""
    manner = {name: options.pop(name) for name in ("person", "prompt", "system", "quiet")}
    with outcomes(as_json=as_json), asyncio.Runner() as runner:
        context = Context.read(**options)
        door = context.door()
        single = _single(once)
        if single is None and as_json:
            raise click.UsageError("--json takes one turn: add --once, or give it on stdin")
        name = conversation or f"chat-{time.strftime('%Y%m%d')}-{secrets.token_hex(3)}"
        session = runner.run(open_session(door))
        try:
            named = model or context.settings.model or runner.run(first_model(session, door))
            said = Manner(conversation=name, model=named, as_json=as_json, **manner)
            if single is not None:
                sys.exit(runner.run(_turn(session, door, said, single)).exit_code)
            _converse(runner, session, door, said, history=context.settings.data / "chat_history")
        finally:
            runner.run(session.close())


def _single(once: str | None) -> str | None:
    """The one turn that is asked for; None for a conversation."""
    if once not in {None, "-"}:
        return once
    if once is None and sys.stdin.isatty():
        return None
    text = sys.stdin.read().strip()
    if not text:
        raise click.UsageError("there is nothing on stdin to say: add --once TEXT")
    return text


def _converse(
    runner: asyncio.Runner, session: aiohttp.ClientSession, door: ServerAddress, manner: Manner, history: Path
) -> None:
    """Turn after turn, until Ctrl-D."""
    if not manner.quiet:
        _dim(f"{manner.model}, conversation {manner.conversation}. Ctrl-C cancels a reply, Ctrl-D ends.\n")
    with _history(history):
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                click.echo()
                break
            except KeyboardInterrupt:
                click.echo()
                continue
            if not text:
                continue
            try:
                runner.run(_turn(session, door, manner, text))
            except CommandFailed as error:
                click.secho(str(error), fg="red", err=True)
    if not manner.quiet:
        _dim(f"come back with: klatch chat --conversation {manner.conversation}")


async def _turn(session: aiohttp.ClientSession, door: ServerAddress, manner: Manner, text: str) -> Outcome:
    """Ask, and show the reply. Raises CommandFailed when it never began."""
    turn, view = Turn(session, door, manner.body(text)), _View(manner)
    with _on_interrupt(lambda: view.notice("cancelling; Ctrl-C again leaves at once"), turn) as cancelling:
        try:
            async for one in turn.happenings():
                view.show(one)
        except CommandFailed as error:
            if not cancelling:
                raise
            turn.outcome.status, turn.outcome.error = "cancelled", str(error)
        except asyncio.CancelledError:
            if not cancelling or not (task := asyncio.current_task()):
                raise
            task.uncancel()
            turn.outcome.status, turn.outcome.error = "left", "left; the reply goes on without you"
        if turn.outcome.status != "completed":
            turn.outcome.exit_code = FAILED
    for task in cancelling:
        task.cancel()
        with suppress(asyncio.CancelledError, CommandFailed):
            await task
    view.end(turn.outcome)
    return turn.outcome


@contextmanager
def _on_interrupt(say: Callable[[], None], turn: Turn) -> "Generator[list[asyncio.Task[None]]]":
    """The first Ctrl-C cancels the turn, the second leaves it; the tasks that cancel it."""
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    cancelling = list["asyncio.Task[None]"]()

    def interrupt() -> None:
        if cancelling and main:
            main.cancel()
        else:
            say()
            cancelling.append(loop.create_task(turn.cancel()))

    # Python gives signals to the main thread alone; whoever runs us elsewhere has no Ctrl-C to give.
    listening = threading.current_thread() is threading.main_thread()
    if listening:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield cancelling
    finally:
        if listening:
            loop.remove_signal_handler(signal.SIGINT)


class _View:
    """A turn on the screen, or as JSON lines."""

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._spoke = False

    def show(self, one: Happening) -> None:
        """Something happened."""
        match one:
            case Text(text) if self._manner.as_json:
                say_json({"event": "text", "text": text})
            case Text(text):
                click.echo(text, nl=False)
                sys.stdout.flush()
                self._spoke = True
            case StartsOver() if self._manner.as_json:
                say_json({"event": "starts_over"})
            case StartsOver():
                self.notice("that is void; the reply starts over")
            case Notice(text):
                self.notice(text)

    def notice(self, text: str) -> None:
        """A word to the person who waits."""
        if not self._manner.as_json:
            self._end_line()
            _dim(f"({text})")

    def end(self, outcome: Outcome) -> None:
        """The turn is over."""
        if self._manner.as_json:
            facts = {name: value for name, value in asdict(outcome).items() if name not in {"exit_code", "error"}}
            error = {"error": outcome.error} if outcome.error else {}
            say_json({"event": "end", "conversation": self._manner.conversation, **facts, **error})
            return
        self._end_line()
        if outcome.error:
            click.secho(outcome.error, fg="yellow" if outcome.status in {"cancelled", "left"} else "red", err=True)
        if outcome.finish_reason == "length":
            self.notice("cut off: the reply reached its limit of tokens")
        if not self._manner.quiet:
            _dim(_facts(outcome))

    def _end_line(self) -> None:
        if self._spoke:
            click.echo()
        self._spoke = False


def _facts(outcome: Outcome) -> str:
    tokens = (outcome.usage or {}).get("completion_tokens")
    parts = [f"{tokens} tokens" if tokens is not None else ""]
    parts += [f"first after {outcome.first_token_ms} ms" if outcome.first_token_ms is not None else ""]
    parts += [f"request {outcome.request}" if outcome.request else ""]
    return " · ".join(part for part in parts if part) + "\n"


def _dim(text: str) -> None:
    # To stderr: what is piped on is the reply alone.
    click.secho(text, dim=True, err=True)


@contextmanager
def _history(path: Path) -> Generator[None]:
    """Lines typed earlier, on the arrow keys, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # It holds what people wrote.
            path.touch(mode=0o600)
            readline.write_history_file(path)
