"""`klatch up` as its users run it: real processes on a real Kafka, a scripted model server, and the log to check by.

`stack` is one for the whole session; tests share it, so they name their conversations uniquely and leave every
process running. What is asserted is read from the log, from HTTP answers and from the JSON lines of `up`.
"""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import aiohttp
import psutil
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from tests.broker.story import Story, of_request, read

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.client import Client
from klatch_schemas.codec import Delta
from klatch_schemas.events import Event, StreamEnd, TurnFinished, UsageSettled
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS, Namespace, Topic
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_workers import leash
from klatch_workers.up.everything import free_address

KEYS = {name: f"key-of-{name}-{uuid4().hex}" for name in ("acme", "zeta", "slow", "changed")}
TENANTS = "".join(f'[tenants.{name}]\nkeys = ["{key}"]\n' for name, key in KEYS.items())
LIMITS = "[tenants.slow.limits]\nrequests_per_minute = 1\n"


def plain_environment(**more: str) -> dict[str, str]:
    """Ours without klatch's settings."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("KLATCH_")}, **more}


async def refused(*options: str, **environment: str) -> tuple[int | None, str]:
    """The exit code and the words on stderr of a `klatch up` that does not come up."""
    argv = [sys.executable, "-m", "klatch_workers", "up", "--json", *options]
    process = await leash.spawn(argv, env=plain_environment(**environment), stdout=PIPE, stderr=PIPE)
    said, why = await asyncio.wait_for(process.communicate(), 60)
    assert said == b""
    return process.returncode, why.decode()


def running(pids: Collection[int]) -> set[int]:
    """Those of `pids` that still do something; a zombie is only waiting to be counted."""
    return {pid for pid in pids if _runs(pid)}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it may end while it is looked at
        return False


async def outlived(pids: Collection[int], seconds: float = 30) -> set[int]:
    """Those of `pids` that still run after `seconds`; returns as soon as all have ended."""
    return await asyncio.to_thread(_outlived, pids, seconds)


def _outlived(pids: Collection[int], seconds: float) -> set[int]:
    until = time.monotonic() + seconds
    while (left := running(pids)) and time.monotonic() < until:
        time.sleep(0.05)  # most are no children of ours: nothing tells of their end
    return left


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


async def appears(path: Path, seconds: float = 60) -> None:
    """Return once there is a file of that name."""
    async with asyncio.timeout(seconds):
        while not os.access(path, os.F_OK):  # noqa: ASYNC110 - a file system tells nobody
            await asyncio.sleep(0.05)  # so it is asked again and again


@dataclass(slots=True)
class Up:
    """A `klatch up --json` under way, and all that it has said."""

    process: Process
    data: Path
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _listening: asyncio.Task[None] | None = None

    @classmethod
    async def launch(cls, data: Path, *options: str, **environment: str) -> Self:
        argv = [sys.executable, "-m", "klatch_workers", "up", "--data", str(data), "--json", *options]
        with data.with_suffix(".stderr").open("ab") as stderr:
            process = await leash.spawn(argv, env=plain_environment(**environment), stdout=PIPE, stderr=stderr)
        up = cls(process, data)
        up._listening = asyncio.create_task(up._listen())
        return up

    async def ready(self) -> dict[str, Any]:
        """Its first line. Raises AssertionError with what it said on stderr."""
        return await self.heard("ready")

    async def heard(self, event: str, *, after: int = 0, seconds: float = 120, **facts: Any) -> dict[str, Any]:
        """The first line from line `after` on that tells of `event` with these facts."""

        def found() -> dict[str, Any] | None:
            wanted = {"event": event, **facts}.items()
            return next((line for line in self.lines[after:] if wanted <= line.items()), None)

        await self.until(lambda: found() is not None, seconds)
        line = found()
        assert line, f"no {event!r}; stderr: {self.data.with_suffix('.stderr').read_text()}"
        return line

    async def until(self, told: Callable[[], bool], seconds: float = 120) -> None:
        """Return once it has said what there is to say, or has ended."""
        async with asyncio.timeout(seconds), self._news:
            await self._news.wait_for(lambda: told() or self.process.returncode is not None)

    async def kill(self, name: str) -> None:
        """SIGKILL a child; returns when `up` says that it serves again."""
        at = len(self.lines)
        os.kill(self.pids[name], signal.SIGKILL)
        await self.heard("restarted", after=at, process=name)

    @property
    def pids(self) -> dict[str, int]:
        """By name, as `up` told them last."""
        pids: dict[str, int] = dict(self.lines[0]["pids"])
        return pids | {line["process"]: line["pid"] for line in self.lines if line["event"] == "restarted"}

    async def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        return await self.ended()

    async def ended(self, seconds: float = 40) -> int:
        """The exit code, once it has ended and all it said was heard."""
        assert self._listening
        async with asyncio.timeout(seconds):
            await self._listening
            return await self.process.wait()

    async def _listen(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            async with self._news:
                self.lines.append(json.loads(line))
                self._news.notify_all()
        await self.process.wait()
        async with self._news:
            self._news.notify_all()


@dataclass(slots=True)
class Stack:
    """A running `klatch up` with its model server, its log, and its clients."""

    up: Up
    upstream: Upstream
    http: str
    bootstrap: str
    log: KafkaLog
    namespace: Namespace
    keys: dict[str, str]
    """API keys by tenant."""
    connections: DefaultAsyncHttpxClient
    """Of the stock clients."""

    # --- asking

    def openai(self, tenant: str = "acme") -> AsyncOpenAI:
        return AsyncOpenAI(
            base_url=f"{self.http}/v1", api_key=self.keys[tenant], max_retries=0, http_client=self.connections
        )

    def session(self, tenant: str = "acme") -> aiohttp.ClientSession:
        return aiohttp.ClientSession(self.http, headers={"authorization": f"Bearer {self.keys[tenant]}"})

    def client(self, tenant: str = "acme") -> Client:
        return Client(self.bootstrap, tenant=tenant, namespace=self.namespace.prefix.rstrip("."))

    @asynccontextmanager
    async def ask(
        self, model: str, text: str = "hi", *, tenant: str = "acme", stream: bool = True, user: str = "", **klatch: Any
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """A chat completion as bare HTTP; `klatch` are klatch's own fields."""
        said = {"role": "user", "content": text}
        body = {"model": model, "messages": [said], "stream": stream, "user": user, "klatch": klatch}
        async with self.session(tenant) as session, session.post("/v1/chat/completions", json=body) as answer:
            yield answer

    async def text(self, model: str, text: str = "hi", **options: Any) -> str:
        """The whole reply to one message."""
        async with self.ask(model, text, stream=False, **options) as answer:
            said = await answer.json()
            assert answer.status == 200, said
            return str(said["choices"][0]["message"]["content"])

    @staticmethod
    def digest(key: str) -> str:
        return sha256(key.encode()).hexdigest()

    # --- the log

    async def records(self, topic: Topic) -> list[Record]:
        """All that the topic holds now, in order by partition."""
        name = self.namespace.of(topic)
        places = [Partition(name, number) for number in range(await self.log.partitions(name))]
        ends = {place: bounds for place in places if (bounds := await self.log.bounds(place))[0] < bounds[1]}
        tail = await self.log.tail()
        found = list[Record]()
        try:
            for place, (start, _) in ends.items():
                tail.follow(place, start)
            left = set(ends)
            while left:
                for record in await tail.read(1000):
                    found.append(record)
                    if record.offset + 1 >= ends[record.partition][1]:
                        left.discard(record.partition)
        finally:
            await tail.close()
        return sorted(found, key=lambda record: (record.partition.number, record.offset))

    async def until(self, topic: Topic, wanted: Callable[[Event | Delta], bool]) -> Record:
        """The first event of the topic, old or new, that is `wanted`."""
        return await self.until_record(topic, lambda record: bool((event := read(record)) and wanted(event)))

    async def until_record(self, topic: Topic, wanted: Callable[[Record], bool], seconds: float = 120) -> Record:
        """The first record of the topic, old or new, that is `wanted`."""
        name = self.namespace.of(topic)
        tail = await self.log.tail()
        try:
            for number in range(await self.log.partitions(name)):
                place = Partition(name, number)
                tail.follow(place, (await self.log.bounds(place))[0])
            async with asyncio.timeout(seconds):
                while True:
                    for record in await tail.read(1000):
                        if wanted(record):
                            return record
        finally:
            await tail.close()

    async def story(self, request: str) -> Story:
        """All that the log tells of a request, once its usage is settled."""
        [story] = await self.stories([request])
        return story

    async def stories(self, requests: Collection[str]) -> list[Story]:
        """All that the log tells of requests, once the usage of all is settled."""
        left = set(requests)

        def settled(event: Event | Delta) -> bool:
            if isinstance(event, UsageSettled):
                left.discard(event.request)
            return not left

        await self.until(CHAT_REQUESTS, settled)
        stories = await self._stories(requests)
        # What is written beside a settlement may come into its own topic after it.
        late = {story.request for story in stories if story.leaves_a_turn and not story.told}
        if not late:
            return stories
        await self._until_remembered(late)
        return await self._stories(requests)

    async def _until_remembered(self, left: set[str]) -> None:

        def told(event: Event | Delta) -> bool:
            if isinstance(event, TurnFinished):
                left.discard(event.request)
            return not left

        await self.until(CHAT_TURNS, told)

    async def story_of_end(self, request: str) -> Story:
        """The same once its stream has ended: a refused request settles nothing."""
        await self.until(CHAT_STREAM, lambda event: isinstance(event, StreamEnd) and event.request == request)
        [story] = await self._stories([request])
        return story

    async def _stories(self, requests: Collection[str]) -> list[Story]:
        told = [await self.records(topic) for topic in _TOLD]
        return [Story(request, *[of_request(request, records) for records in told]) for request in requests]


_TOLD = (CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS)


@asynccontextmanager
async def opened(up: Up, upstream: Upstream, keys: Mapping[str, str] = KEYS) -> AsyncGenerator[Stack]:
    """The stack of an `up` that is ready."""
    facts = await up.ready()
    log = await KafkaLog.open(KafkaOptions(facts["bootstrap"]))
    known = {**keys, facts["tenant"]: facts["api_key"]}
    namespace = Namespace.named(facts["namespace"])
    try:
        async with DefaultAsyncHttpxClient(timeout=60) as connections:
            yield Stack(up, upstream, facts["http"], facts["bootstrap"], log, namespace, known, connections)
    finally:
        await log.close()


class Kit:
    """The functions above, for tests: they cannot import a conftest."""

    up = Up
    opened = staticmethod(opened)
    refused = staticmethod(refused)
    running = staticmethod(running)
    outlived = staticmethod(outlived)
    children = staticmethod(children)
    appears = staticmethod(appears)
    free_address = staticmethod(free_address)
    read = staticmethod(read)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="session")
def tenants_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    path.write_text(TENANTS + LIMITS)
    return path


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def upstream() -> AsyncIterator[Upstream]:
    """The model server: a request's script comes with its model name."""
    async with Upstream() as serving:
        yield serving


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stack(
    tmp_path_factory: pytest.TempPathFactory, upstream: Upstream, tenants_file: Path
) -> AsyncIterator[Stack]:
    """One `klatch up` for the whole session, with its own Kafka; it must end with 0 however it was treated."""
    options = ("--http", free_address(), "--model-url", upstream.url, "--tenants", str(tenants_file))
    up = await Up.launch(tmp_path_factory.mktemp("stack") / "data", *options)
    async with opened(up, upstream) as stack:
        yield stack
    pids = up.pids.values()
    assert await up.terminate() == 0
    assert running(pids) == set()
