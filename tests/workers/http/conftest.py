"""A real door on a socket, a `MemoryLog` behind it, and a writer that answers requests as the stages would.

The writer is no mock: it follows `chat.requests`, takes each request id once, and appends the same events, by the
same codec, that generation appends. A test hands it a script: what to say, when, and how to end.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest_asyncio
from openai import AsyncOpenAI

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatRequested,
    EmbeddingAdmitted,
    EmbeddingRequested,
    Event,
    Status,
    StreamAttempt,
    StreamCancel,
    StreamEnd,
    StreamError,
    Usage,
)
from klatch_schemas.ids import Tenant, Writer
from klatch_schemas.records import Draft, Partition, Record, partition_of
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM
from klatch_streams.log import LogError, Tail
from klatch_streams.memory_log import MemoryLog
from klatch_workers.http.app import serve
from klatch_workers.http.door import Door, Terms

KEYS = {Tenant("acme"): "key-of-acme", Tenant("globex"): "key-of-globex"}
Mode = Literal["restart", "continue"]
USAGE = Usage(prompt_tokens=7, completion_tokens=3)


class Teller:
    """Writes the stream of one request."""

    def __init__(self, log: MemoryLog, asked: ChatRequested, partitions: int) -> None:
        self.log, self.asked = log, asked
        self.cancelled = asyncio.Event()
        self.attempt = self.seq = 0
        self.writer = Writer("none")
        self.deployment = ""
        self.partition = partition_of(asked.conversation.encode(), partitions)

    async def open(self, attempt: int = 1, writer: str = "writer", mode: Mode = "restart") -> None:
        """Open an attempt."""
        self.attempt, self.seq, self.writer = attempt, 0, Writer(f"{writer}-{attempt}")
        await self.append(StreamAttempt(**self.names(), attempt=attempt, writer=self.writer, mode=mode))

    def names(self) -> dict[str, Any]:
        """What the events of this stream have in common."""
        return {
            "request": self.asked.request,
            "tenant": self.asked.tenant,
            "conversation": self.asked.conversation,
        }

    async def append(self, event: Event) -> None:
        """Append any event to the stream."""
        await self.log.append([codec.draft("chat.stream", self.asked.conversation, event)])

    @staticmethod
    def chunk(**delta: Any) -> bytes:
        """A chunk of choice 0."""
        return chunk(delta)

    async def raw(self, *chunks: bytes) -> None:
        """Append deltas, in one batch."""
        prefix = codec.delta_prefix(self.asked.request, self.attempt, self.writer)
        drafts = list[Draft]()
        for chunk in chunks:
            value = codec.encode_delta(prefix, self.seq, chunk, "" if self.seq else self.deployment)
            key = self.asked.conversation.encode()
            drafts.append(codec.delta_draft("chat.stream", key, self.partition, value))
            self.seq += 1
        await self.log.append(drafts)

    async def delta(self, index: int = 0, finish: str | None = None, **delta: Any) -> None:
        """Append a delta of one choice."""
        await self.raw(chunk(delta, index, finish))

    async def say(self, *words: str) -> None:
        """Append a text delta for each word, one by one."""
        for word in words:
            await self.delta(content=word)

    async def end(self, status: Status = "completed", error: StreamError | None = None, **fields: Any) -> None:
        """End the stream."""
        names = {**self.names(), "attempt": self.attempt, "writer": self.writer, "seq": self.seq, "usage": USAGE}
        await self.append(StreamEnd.model_validate({**names, "status": status, "error": error, **fields}))


def chunk(delta: dict[str, Any], index: int = 0, finish: str | None = None) -> bytes:
    """A `chat.completion.chunk` as a model server writes it, with a field nobody knows."""
    said = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "tiny",
        "vendor_extra": {"x": 1},
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
    }
    return json.dumps(said).encode()


Script = Callable[[Teller], Awaitable[None]]


async def hello(teller: Teller) -> None:
    """The script of a model that says hello."""
    await teller.open()
    await teller.delta(role="assistant", content="")
    await teller.say("Hel", "lo ", "wörld")
    await teller.delta(finish="stop")
    await teller.end()


async def _read(tail: Tail) -> Sequence[Record]:
    try:
        return await tail.read(1000)
    except LogError:
        return ()  # a log that fell silent: it is asked again


@dataclass
class Stages:
    """Everything between `chat.requests` and `chat.stream`, as one task."""

    log: MemoryLog
    partitions: int
    script: Script = hello
    admits: Callable[[dict[str, Any]], Event] = EmbeddingAdmitted.model_validate
    tellers: list[Teller] = field(default_factory=list[Teller])
    tasks: list["asyncio.Task[None]"] = field(default_factory=list["asyncio.Task[None]"])
    asked: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self) -> None:
        """Follow requests and cancels."""
        tail = await self.log.tail()
        for topic, count in (("chat.requests", 2), ("chat.stream", self.partitions)):
            for number in range(count):
                tail.follow(Partition(topic, number), 0)
        while True:
            for record in await _read(tail):
                said = codec.decode(record.value)
                if isinstance(said, ChatRequested) and self.of(said.request) is None:
                    await self._begin(said)
                elif isinstance(said, EmbeddingRequested):
                    await self.log.append([self.embedding(said)])
                elif isinstance(said, StreamCancel) and (teller := self.of(said.request)):
                    teller.cancelled.set()

    def embedding(self, said: EmbeddingRequested) -> Draft:
        """What admission answers to a request for embeddings."""
        names = {"request": said.request, "tenant": said.tenant, "conversation": said.conversation}
        return codec.draft("chat.stream", said.conversation, self.admits(names))

    async def _begin(self, said: ChatRequested) -> None:
        async with self.asked:
            self.tellers.append(teller := Teller(self.log, said, self.partitions))
            self.tasks.append(asyncio.create_task(self._tell(teller)))
            self.asked.notify_all()

    async def _tell(self, teller: Teller) -> None:
        await self.script(teller)

    def of(self, request: str) -> Teller | None:
        """The teller of a request."""
        return next((teller for teller in self.tellers if teller.asked.request == request), None)

    async def first(self) -> Teller:
        """The teller of the first request, once it was asked."""
        async with self.asked:
            await self.asked.wait_for(lambda: self.tellers)
        return self.tellers[0]


@dataclass
class Answer:
    """An HTTP answer read from a bare socket."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def body(self) -> bytes:
        """The whole body, without its chunked framing."""
        if "content-length" in self.headers:
            return await self.reader.readexactly(int(self.headers["content-length"]))
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncIterator[bytes]:
        """Each HTTP chunk as it comes: one write of the door, one chunk."""
        while size := int(await self.reader.readline(), 16):
            part = await self.reader.readexactly(size)
            await self.reader.readline()
            yield part

    async def part(self) -> bytes:
        """The next HTTP chunk."""
        return await anext(aiter(self.parts()))

    async def json(self) -> Any:
        """The body as JSON."""
        return json.loads(await self.body())

    async def events(self) -> list["Sse"]:
        """The events of an event stream."""
        return sse(await self.body())

    async def close(self) -> None:
        """Hang up."""
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@dataclass(frozen=True)
class Sse:
    """One event."""

    id: str | None
    data: str

    @property
    def json(self) -> Any:
        """Its data."""
        return json.loads(self.data)


def sse(body: bytes) -> list[Sse]:
    """Read an event stream as the standard says: fields to a blank line, comments are nothing."""
    events = list[Sse]()
    for block in body.decode().split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = {name: value for name, _, value in lines}
            events.append(Sse(fields.get("id"), fields["data"]))
    return events


@dataclass
class Kit:
    """A door that serves on `port`, and what stands behind it."""

    log: MemoryLog
    stages: Stages
    port: int
    stop: asyncio.Event
    calls: list[Answer] = field(default_factory=list[Answer])
    clients: list[AsyncOpenAI] = field(default_factory=list[AsyncOpenAI])

    @property
    def url(self) -> str:
        """The base URL for OpenAI's clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, tenant: str = "acme", max_retries: int = 0) -> AsyncOpenAI:
        """The stock client of a tenant."""
        client = AsyncOpenAI(base_url=self.url, api_key=KEYS[Tenant(tenant)], max_retries=max_retries)
        self.clients.append(client)
        return client

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        tenant: str | None = "acme",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Make an HTTP call on a bare socket and read as far as the headers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = {"host": "door", "content-length": str(len(data)), **(headers or {})}
        if tenant:
            sent["authorization"] = f"Bearer {KEYS[Tenant(tenant)]}"
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + data)
        answer = Answer(0, {}, reader, writer)
        self.calls.append(answer)
        answer.status = int((await reader.readline()).split()[1])
        while (line := (await reader.readline()).decode().strip()) != "":
            name, _, value = line.partition(": ")
            answer.headers[name.lower()] = value
        return answer

    async def chat(self, tenant: str | None = "acme", headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        """Ask for a streamed chat completion."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
        return await self.call("POST", "/v1/chat/completions", body, tenant, headers)

    @staticmethod
    def text_of(events: list[Sse]) -> str:
        """The text of choice 0."""
        said = [event.json for event in events if event.data != "[DONE]"]
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in said if c.get("choices"))

    def teller(self, asked: ChatRequested) -> Teller:
        """A writer of one stream, for tests that answer by themselves."""
        return Teller(self.log, asked, self.stages.partitions)

    def said(self, kind: type[Event], topic: str = "chat.stream") -> list[Any]:
        """The events of one kind in a topic."""
        said = [codec.decode(record.value) for record in self.log.records(topic)]
        return [event for event in said if isinstance(event, kind)]

    async def until_said(self, kind: type[Event], topic: str = "chat.stream", *, times: int = 1) -> Any:
        """The event of a kind that was said for this time, once it stands in the log."""
        while len(said := self.said(kind, topic)) < times:
            await self.log.changed.wait(lambda: len(self.said(kind, topic)) >= times, 1000)
        return said[times - 1]


@asynccontextmanager
async def _serving(door: Door, stages: Stages, drain_s: float) -> AsyncGenerator[Kit]:
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(door, stop, drain_s=drain_s, ready=port.set_result))
    await asyncio.wait([port, serving], return_when=asyncio.FIRST_COMPLETED)
    kit = Kit(stages.log, stages, port.result(), stop)
    try:
        yield kit
    finally:
        for call in kit.calls:
            await call.close()
        for client in kit.clients:
            await client.close()
        stop.set()
        await serving


@asynccontextmanager
async def _staged(stages: Stages) -> AsyncGenerator[Stages]:
    running = asyncio.create_task(stages.run())
    try:
        yield stages
    finally:
        for task in (running, *stages.tasks):
            task.cancel()
        done = await asyncio.gather(running, *stages.tasks, return_exceptions=True)
        crashed = [error for error in done if isinstance(error, Exception)]
        assert not crashed, crashed


class Kits:
    """Makes doors."""

    def __init__(self) -> None:
        self.door = Door(
            log=MemoryLog({}),
            keys={hashlib.sha256(key.encode()).hexdigest(): tenant for tenant, key in KEYS.items()},
        )
        self.ago_ms = 0
        """How far back the clock of its logs is set."""

    @asynccontextmanager
    async def serving(
        self,
        terms: Terms | None = None,
        partitions: int = 4,
        beside: Kit | None = None,
        drain_s: float = 1.0,
        appending: Callable[[Sequence[Draft]], Awaitable[None]] | None = None,
        **door: Any,
    ) -> AsyncGenerator[Kit]:
        """A door with other terms: on a log of its own, or another door `beside` one, on the same log."""
        made = replace(self.door, terms=terms or Terms(), **door)
        if beside:
            async with _serving(replace(made, log=beside.log), beside.stages, drain_s) as kit:
                yield kit
            return
        topics: dict[str, int] = {CHAT_REQUESTS.name: 2, CHAT_STREAM.name: partitions}
        log = MemoryLog(topics, now_ms=lambda: time.time_ns() // 1_000_000 - self.ago_ms, appending=appending)
        async with _staged(Stages(log, partitions)) as stages, _serving(replace(made, log=log), stages, drain_s) as kit:
            yield kit


@pytest_asyncio.fixture
async def kits() -> Kits:
    """For tests that need a door with other terms, or several."""
    return Kits()


@pytest_asyncio.fixture
async def kit(kits: Kits) -> AsyncGenerator[Kit]:
    """A door with the usual terms."""
    async with kits.serving() as kit:
        yield kit
