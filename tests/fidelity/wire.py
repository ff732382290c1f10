"""A model server whose every byte is a test's: what it sends, when, in which writes, and how it breaks off."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from klatch_agents.testing.upstream.http import Connection, Request

DONE = b"data: [DONE]\n\n"


def event(said: Mapping[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return b"data: %b\n\n" % json.dumps(said).encode()


def chunk(
    delta: Mapping[str, Any] | None = None, finish: str | None = None, index: int = 0, **top: Any
) -> dict[str, Any]:
    """A chunk of one choice; `delta=None` leaves the delta out."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-7",
        "object": "chat.completion.chunk",
        "created": 1_790_000_000,
        "model": "tiny-2026-11-01",
        "system_fingerprint": "fp_44709d6fcb",
        "choices": [choice if delta is not None else {n: v for n, v in choice.items() if n != "delta"}],
        "usage": None,
        **top,
    }


def usage(prompt: int = 9, completion: int = 3, **details: Any) -> dict[str, Any]:
    """A usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **details,
    }


def usage_chunk(said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The accounting chunk after the last finish."""
    return chunk({}) | {"choices": [], "usage": said or usage()}


def role(**delta: Any) -> bytes:
    """The opening delta."""
    return event(chunk({"role": "assistant", "content": "", **delta}))


def words(*said: str) -> bytes:
    """A text delta for each word."""
    return b"".join(event(chunk({"content": word})) for word in said)


def finish(reason: str = "stop", *more: Mapping[str, Any]) -> bytes:
    """The finish of choice 0, further chunks, and the marker."""
    return event(chunk({}, reason)) + b"".join(map(event, more)) + DONE


def whole(*said: str, reason: str = "stop") -> bytes:
    """A whole reply of words, with its usage."""
    return role() + words(*said) + finish(reason, usage_chunk())


class Talk:
    """One call that the server was given, and its answer."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self.path, self.query, self.headers = request.path, request.query, request.headers
        self.body: Any = json.loads(request.body)
        self.connection = connection
        self.left = asyncio.Event()
        """Set when the caller hangs up before the answer is over."""
        self.over = False
        connection.on_lost = self._lost

    def _lost(self) -> None:
        if not self.over:
            self.left.set()

    def begin(self, **headers: str) -> Self:
        """The status line and the headers of an event stream."""
        self.connection.begin_events({name.replace("_", "-"): value for name, value in headers.items()})
        return self

    def send(self, *writes: bytes) -> Self:
        """Each as one write."""
        for data in writes:
            self.connection.write(data)
        return self

    def end(self) -> None:
        """The clean end of the body."""
        self._close()
        self.connection.end()

    def drop(self) -> None:
        """Closes the connection in the middle of the body."""
        self._close()
        self.connection.drop()

    def reset(self) -> None:
        """The same by a TCP reset."""
        self._close()
        self.connection.reset()

    def refuse(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """An error status."""
        self._close()
        self.connection.respond(status, json.dumps(body).encode(), headers)

    def _close(self) -> None:
        self.over = True
        self.connection.on_lost = None


Script = Callable[[Talk], Awaitable[None]]


def sends(*writes: bytes) -> Script:
    """The script that sends these writes and ends."""

    async def script(talk: Talk) -> None:
        talk.begin().send(*writes).end()

    return script


@dataclass
class Wire:
    """The server: a script for each model's name, and the calls that it was given."""

    scripts: dict[str, Script] = field(default_factory=dict[str, Script])
    talks: dict[str, list[Talk]] = field(default_factory=dict[str, list[Talk]])
    called: asyncio.Condition = field(default_factory=asyncio.Condition)
    open_ones: set[Connection] = field(default_factory=set[Connection])
    connections: set[Connection] = field(default_factory=set[Connection])
    """All that ever were used."""
    _server: asyncio.Server | None = None
    _telling: set["asyncio.Task[None]"] = field(default_factory=set["asyncio.Task[None]"])

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self._serve, self.open_ones), "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        for connection in list(self.open_ones):
            connection.drop()
        for task in list(self._telling):
            task.cancel()

    @property
    def url(self) -> str:
        """With its `/v1`."""
        assert self._server
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    def model(self, script: Script) -> str:
        """A model that answers by `script`; its name."""
        name = f"model-{len(self.scripts)}"
        self.scripts[name], self.talks[name] = script, []
        return name

    async def talk(self, model: str, number: int = 0) -> Talk:
        """The call of that number to a model, once it was made."""
        async with self.called, asyncio.timeout(20):
            await self.called.wait_for(lambda: len(self.talks[model]) > number)
        return self.talks[model][number]

    def _serve(self, connection: Connection, request: Request) -> None:
        self.connections.add(connection)
        talk = Talk(connection, request)
        task = asyncio.get_running_loop().create_task(self._tell(talk))
        self._telling.add(task)
        task.add_done_callback(self._told)

    async def _tell(self, talk: Talk) -> None:
        model = str(talk.body["model"])
        async with self.called:
            self.talks[model].append(talk)
            self.called.notify_all()
        await self.scripts[model](talk)

    def _told(self, task: "asyncio.Task[None]") -> None:
        self._telling.discard(task)
        if not task.cancelled():
            task.result()
