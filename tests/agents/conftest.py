"""What tests of the router share: two real servers that fail as told, a ledger in memory, and a clock."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from klatch_agents.gateway.dialect import Dialect
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.port import Chunk, ModelCall
from klatch_agents.gateway.router import Router
from klatch_agents.gateway.routing import how_it_continues
from klatch_agents.testing.upstream import Upstream
from klatch_agents.testing.upstream.http import Connection, Request
from klatch_schemas.events import Deployment, ModelRouted


@dataclass
class Book:
    """Routes, as a ledger would hold them."""

    routes: dict[str, ModelRouted] = field(default_factory=dict[str, ModelRouted])
    _change: asyncio.Event = field(default_factory=asyncio.Event)

    def find(self, alias: str) -> ModelRouted | None:
        return self.routes.get(alias)

    def aliases(self) -> list[str]:
        return list(self.routes)

    async def changed(self) -> None:
        await self._change.wait()

    def put(self, routed: ModelRouted | None) -> None:
        """Route the model `m`, or have no route of it any more."""
        self.routes = {**self.routes, "m": routed} if routed else {}
        self._change.set()
        self._change = asyncio.Event()


@dataclass
class Clock:
    """Seconds that pass when somebody sleeps, and the naps that were taken."""

    at: float = 0.0
    naps: list[float] = field(default_factory=list[float])
    _moves: asyncio.Event | None = None
    _napped: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self._napped.set()
        until = self.at + seconds
        if self._moves:
            await self._moves.wait()
        else:
            await asyncio.sleep(0)
        self.at = max(self.at, until)

    def stands_still(self) -> "Clock":
        """No time passes by sleeping, until it `moves_on`."""
        self._moves = asyncio.Event()
        return self

    def moves_on(self) -> None:
        """Let everybody wake, and time pass by sleeping again."""
        if self._moves:
            self._moves.set()
        self._moves = None

    async def sleeping(self, naps: int) -> None:
        """Wait until so many have gone to sleep."""
        while len(self.naps) < naps:
            self._napped.clear()
            await self._napped.wait()


@dataclass
class World:
    """Two servers, a ledger, a clock, and a router over them."""

    a: Upstream
    b: Upstream
    book: Book
    clock: Clock
    router: Router

    def route(self, *deployments: Deployment, **fields: Any) -> None:
        """Route the model `m`."""
        self.book.put(ModelRouted(alias="m", deployments=deployments, **fields))

    def on_a(self, script: str = "", **fields: Any) -> Deployment:
        """A deployment whose server does as told from now on; it stays the same one, whatever it does."""
        return _scripted(self.a, script, {"name": "a", **fields})

    def on_b(self, script: str = "text=from b", **fields: Any) -> Deployment:
        return _scripted(self.b, script, {"name": "b", "tier": 1, **fields})


def _scripted(server: Upstream, script: str, fields: dict[str, Any]) -> Deployment:
    server.instead = lambda _: f"fake?{script}" if script else None
    return Deployment.model_validate({"url": server.url, "model": "fake", **fields})


def open_server(one: Deployment) -> OpenAICompatible:
    dialect = Dialect(one.kind) if one.kind != "local" else Dialect()
    return OpenAICompatible(Endpoint(one.url, dialect=dialect, continues=how_it_continues(one)))


def call(model: str = "m", **fields: Any) -> ModelCall:
    """A call of a model."""
    return ModelCall({"model": model, "messages": [{"role": "user", "content": "hello"}]}, **fields)


def text_in(batch: list[Chunk]) -> str:
    """The text of a batch."""
    choices = [choice for chunk in batch for choice in json.loads(chunk.raw).get("choices", [])]
    return "".join(choice.get("delta", {}).get("content") or "" for choice in choices)


async def ask(router: Router, asked: ModelCall | None = None) -> tuple[str, str]:
    """The deployment and the text."""
    async with router.stream(asked or call()) as reply:
        said = "".join([text_in(batch) async for batch in reply])
        assert reply.finished is not None
        return reply.deployment, said


@asynccontextmanager
async def answering(answer: Callable[[Connection, Request], None]) -> AsyncGenerator[str]:
    """The URL of a server that answers as no model server does."""
    open_ones = set[Connection]()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answer, open_ones), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for one in list(open_ones):
            one.drop()


@asynccontextmanager
async def routed(
    a: Upstream, b: Upstream, default: ModelRouted | None = None, jitter: Callable[[], float] = lambda: 0.5
) -> AsyncGenerator[World]:
    book, clock = Book(), Clock()
    async with Router(book, open_server, default, now=clock.now, sleep=clock.sleep, jitter=jitter) as router:
        yield World(a, b, book, clock, router)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with Upstream() as a, Upstream() as b, routed(a, b) as made:
        yield made
