"""`klatch chat` and `klatch cancel` as processes, against a real door on a socket."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from klatch_schemas.events import ChatRequested, StreamCancel, StreamError

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit, Teller

KEY = "key-of-acme"


@dataclass
class Said:
    """What a process said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Terminal:
    """Starts `klatch` with a data folder of its own."""

    data: Path
    url: str

    async def start(self, *arguments: str, **environment: str) -> Process:
        return await self.start_on(PIPE, *arguments, **environment)

    async def start_on(self, stdin: int, *arguments: str, **environment: str) -> Process:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("KLATCH_")}
        ours |= {"KLATCH_DATA": str(self.data), "KLATCH_HTTP": self.url, "KLATCH_API_KEY": KEY, **environment}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from klatch_workers.cli import main; main(prog_name='klatch')",
            *arguments,
            stdin=stdin,
            stdout=PIPE,
            stderr=PIPE,
            env={name: value for name, value in ours.items() if value},
        )

    async def run(self, *arguments: str, stdin: str = "", **environment: str) -> Said:
        process = await self.start(*arguments, **environment)
        async with asyncio.timeout(60):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Said(process.returncode, out.decode(), err.decode())


async def ended(process: Process) -> Said:
    """What a process says to its end."""
    assert process.stdout
    assert process.stderr
    async with asyncio.timeout(60):
        out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
        return Said(await process.wait(), out.decode(), err.decode())


async def read(process: Process, text: str) -> None:
    """Wait until a process has said `text` on stdout."""
    assert process.stdout
    async with asyncio.timeout(60):
        await process.stdout.readuntil(text.encode())


@pytest.fixture
def terminal(kit: "Kit", tmp_path: Path) -> Terminal:
    return Terminal(tmp_path, f"http://127.0.0.1:{kit.port}")


async def test_once_says_the_reply_and_nothing_else_on_stdout(terminal: Terminal, kit: "Kit") -> None:
    said = await terminal.run("chat", "--once", "hi", "--conversation", "c1", "--person", "ann", "--model", "tiny")
    assert (said.code, said.out) == (0, "Hello wörld\n")
    asked: ChatRequested = (await kit.stages.first()).asked
    assert f"request {asked.request}" in said.err
    assert "3 tokens · first after" in said.err
    assert (asked.conversation, asked.person, asked.body["model"]) == ("c1", "ann", "tiny")
    assert asked.body["messages"] == [{"role": "user", "content": "hi"}]
    assert asked.prompt
    assert asked.prompt.name == "assistant"


async def test_quiet_is_the_reply_alone(terminal: Terminal) -> None:
    said = await terminal.run("chat", "--once", "hi", "--quiet")
    assert (said.code, said.out, said.err) == (0, "Hello wörld\n", "")


async def test_what_is_piped_in_is_the_turn_and_a_system_message_stands_for_the_prompt(
    terminal: Terminal, kit: "Kit"
) -> None:
    said = await terminal.run("chat", "--system", "Be short.", stdin="two\nlines\n")
    assert said.code == 0
    asked = (await kit.stages.first()).asked
    assert asked.prompt is None
    assert asked.body["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "two\nlines"},
    ]


async def test_json_is_each_piece_of_text_and_then_the_outcome(terminal: Terminal, kit: "Kit") -> None:
    said = await terminal.run("chat", "--once", "hi", "--json", "--conversation", "c1")
    *texts, end = said.objects
    assert [one["text"] for one in texts] == ["Hel", "lo ", "wörld"]
    assert end.items() >= {"event": "end", "status": "completed", "text": "Hello wörld", "conversation": "c1"}.items()
    assert end["request"] == (await kit.stages.first()).asked.request
    assert end["usage"]["completion_tokens"] == 3
    assert end["first_token_ms"] <= end["total_ms"]
    assert said.err == ""


async def test_text_is_shown_while_it_is_made(terminal: Terminal, kit: "Kit") -> None:
    go_on = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("first")
        await go_on.wait()
        await teller.say(" last")
        await teller.end()

    kit.stages.script = script
    process = await terminal.start("chat", "--once", "hi")
    await read(process, "first")
    go_on.set()
    said = await ended(process)
    assert (said.code, said.out) == (0, " last\n")


async def _until_cancelled(teller: "Teller") -> None:
    await teller.open()
    await teller.say("half")
    await teller.cancelled.wait()
    await teller.end("cancelled")


async def test_ctrl_c_cancels_the_reply(terminal: Terminal, kit: "Kit") -> None:
    kit.stages.script = _until_cancelled
    process = await terminal.start("chat", "--once", "hi")
    await read(process, "half")
    process.send_signal(signal.SIGINT)
    said = await ended(process)
    assert said.code == 1
    assert "the request was cancelled" in said.err
    assert (await kit.until_said(StreamCancel)).by


async def test_ctrl_c_before_the_first_token_cancels_too(terminal: Terminal, kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(1)  # a slow model: the first token comes after the signal
        await _until_cancelled(teller)

    kit.stages.script = script
    process = await terminal.start("chat", "--once", "hi")
    said = await ended(process)
    assert said.code == 1
    assert (await kit.until_said(StreamCancel)).request == (await kit.stages.first()).asked.request


class Proxy:
    """A wire between a client and the door that can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = set[asyncio.StreamWriter]()

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, there[1]}
        await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            self._open.discard(writer)
            writer.close()


async def test_a_broken_connection_is_read_on_where_it_stopped(terminal: Terminal, kit: "Kit") -> None:
    proxy, go_on = Proxy(kit.port), asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("one ", "two ")
        await go_on.wait()
        await teller.say("three ", "four")
        await teller.end()

    kit.stages.script = script
    async with proxy.listening() as url:
        process = await terminal.start("chat", "--once", "hi", "--model", "tiny", KLATCH_HTTP=url)
        await read(process, "one two ")
        proxy.cut()
        go_on.set()
        said = await ended(process)
    assert (said.code, said.out) == (0, "three four\n")
    assert len(kit.said(ChatRequested, "chat.requests")) == 1
    assert not kit.said(StreamCancel), "a connection that broke is not a wish to cancel"


async def test_a_reply_that_starts_over_is_said_to_and_its_last_text_counts(terminal: Terminal, kit: "Kit") -> None:
    go_on = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("void")
        await go_on.wait()
        await teller.open(attempt=2)
        await teller.say("stands")
        await teller.end()

    kit.stages.script = script
    process = await terminal.start("chat", "--once", "hi", "--json")
    await read(process, "void")
    go_on.set()
    said = await ended(process)
    *_, over, text, end = said.out.splitlines()
    assert json.loads(over) == {"event": "starts_over"}
    assert json.loads(text) == {"event": "text", "text": "stands"}
    assert json.loads(end)["text"] == "stands"
    assert said.code == 0


async def test_a_model_that_fails_ends_with_1_and_says_what_to_do(terminal: Terminal, kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("half")
        await teller.end("failed", StreamError(code="model_error", message="the model server died"))

    kit.stages.script = script
    said = await terminal.run("chat", "--once", "hi")
    assert (said.code, said.out) == (1, "half\n")
    assert "the model server died; try again" in said.err


async def test_a_limit_says_when_to_try_again(terminal: Terminal, kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        error = StreamError(code="rate_limit_exceeded", message="too many requests", retry_after_ms=2_500)
        await teller.end("rejected", error)

    kit.stages.script = script
    said = await terminal.run("chat", "--once", "hi")
    assert (said.code, said.out) == (1, "")
    assert said.err == "Error: too many requests; try again in 3 s\n"


async def test_a_wrong_key_is_misuse_and_a_door_that_is_away_is_not_reachable(terminal: Terminal) -> None:
    wrong = await terminal.run("chat", "--once", "hi", KLATCH_API_KEY="wrong")
    assert (wrong.code, wrong.out) == (2, "")
    assert "KLATCH_API_KEY" in wrong.err
    away = await terminal.run("chat", "--once", "hi", "--json", KLATCH_HTTP="127.0.0.1:1")
    assert away.code == 3
    assert "start `klatch up`" in away.objects[0]["error"]


async def test_beside_a_running_klatch_up_no_option_is_needed(terminal: Terminal) -> None:
    (terminal.data / "run.json").write_text(json.dumps({"http": terminal.url, "api_key": KEY}))
    said = await terminal.run("chat", "--once", "hi", KLATCH_HTTP="", KLATCH_API_KEY="")
    assert (said.code, said.out) == (0, "Hello wörld\n")


async def test_a_misspelt_setting_is_named(terminal: Terminal) -> None:
    said = await terminal.run("chat", "--once", "hi", KLATCH_API_KEYS="x")
    assert said.code == 2
    assert "did you mean KLATCH_API_KEY?" in said.err


async def test_a_conversation_in_the_terminal_goes_on_until_ctrl_d(terminal: Terminal, kit: "Kit") -> None:
    master, slave = os.openpty()
    try:
        process = await terminal.start_on(slave, "chat")
        for line in (b"first\n", b"second\n"):
            os.write(master, line)
            await read(process, "wörld")
        os.write(master, b"\x04")
        said = await ended(process)
    finally:
        os.close(master)
        os.close(slave)
    assert said.code == 0
    one, two = (teller.asked for teller in kit.stages.tellers)
    assert one.conversation == two.conversation
    assert one.memory.recent, "earlier turns come from the log"
    assert f"klatch chat --conversation {one.conversation}" in said.err
    assert (terminal.data / "chat_history").stat().st_mode & 0o077 == 0


async def test_cancel_over_http_ends_the_request(terminal: Terminal, kit: "Kit") -> None:
    kit.stages.script = _until_cancelled
    process = await terminal.start("chat", "--once", "hi")
    await read(process, "half")
    request = (await kit.stages.first()).asked.request
    said = await terminal.run("cancel", request, "--json")
    assert said.objects == [{"request": request, "cancel": "asked", "over": "http"}]
    assert (await ended(process)).code == 1


async def test_cancelling_what_never_was_fails(terminal: Terminal) -> None:
    said = await terminal.run("cancel", "never-was")
    assert said.code == 1
    assert "never-was" in said.err
