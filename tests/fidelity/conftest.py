"""Everything between a model server and a client, in one process; once for the whole session for the tests here.

A server whose bytes a test chooses (`wire.py`), and the stages as `wiring.py` puts them together: the router with the
servers that deployments of routes name, admission, screening by the default policy, generation, and the HTTP door on a
socket. Only the log is not Kafka, and the routes are no ledger. Most tests look at how the last attempt ends, and have
one (`stack`); others have as many as klatch makes (`trying`).
Numbers in brackets in docstrings name the traps of `docs/fidelity.md`.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio
from tests.fidelity.wire import Script, Talk, Wire, sends
from tests.workers.generation.conftest import Book
from tests.workers.http.conftest import KEYS, Answer, Kit, Sse, Stages

from klatch_agents.gateway.router import Router
from klatch_agents.trust.policy import load_policy
from klatch_agents.trust.rules import RulesJudge
from klatch_schemas import codec
from klatch_schemas.events import ChatAdmitted, Deployment, Event, ModelRouted, RouteTimeouts, StreamEnd, UsageSettled
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, TOPICS, Namespace, Topic
from klatch_streams.admission import Admission
from klatch_streams.decider_owner import DeciderStage
from klatch_streams.generation import TRIES
from klatch_streams.log import Log
from klatch_streams.memory_log import MemoryLog
from klatch_streams.owner import Stage
from klatch_streams.runner import Runner, RunnerSettings
from klatch_workers.generation.prepare import Preparer
from klatch_workers.generation.stage import GenerationStage
from klatch_workers.http.app import serve
from klatch_workers.http.door import Door, Terms
from klatch_workers.model_servers import ModelServers
from klatch_workers.screening import ScreeningStage
from klatch_workers.settings import Settings

E = TypeVar("E", bound=Event)

PARTITIONS = 4
PATIENCE = RouteTimeouts(connect_s=60, first_token_s=60, idle_s=60)
"""Longer than any pause of a busy machine; a test that waits for an end of it brings a shorter one."""
KEY = "sk-of-the-model-server"
"""What the keys file holds under the name `vendor`."""
IMPATIENT = Terms(hold_s=0.1, keepalive_s=0.1, write_timeout_s=1.0)


class Routes:
    """The routes of models that tests make; the models that have none go to the server of the settings."""

    def __init__(self) -> None:
        self._routes = dict[str, ModelRouted]()

    def find(self, alias: str) -> ModelRouted | None:
        """The route of a model name."""
        return self._routes.get(alias)

    def aliases(self) -> list[str]:
        """The model names that have routes."""
        return list(self._routes)

    async def changed(self) -> None:
        """Tests make their routes before they call."""
        await asyncio.Event().wait()

    def add(self, alias: str, deployment: Deployment, patience: RouteTimeouts | None = None) -> None:
        """Route a model to one deployment more, with other time-outs if some are given."""
        known = self._routes.get(alias)
        deployments = (*(known.deployments if known else ()), deployment)
        timeouts = patience or (known.timeouts if known else PATIENCE)
        self._routes[alias] = ModelRouted(alias=alias, deployments=deployments, timeouts=timeouts)


@dataclass
class Stack:
    """Doors, the log behind them, and the model server."""

    log: MemoryLog
    wire: Wire
    routes: Routes
    door: Kit
    """With the usual terms."""
    impatient: Kit
    """On the same log; sends headers, comments and write timeouts early."""

    def model(self, script: Script | bytes, patience: RouteTimeouts | None = None, **deployment: Any) -> str:
        """A model that answers by a script, or with these bytes; its route has one deployment, of this kind."""
        name = self.wire.model(script if callable(script) else sends(script))
        self.routes.add(name, self._deployment(name, **deployment), patience)
        return name

    def spare(self, model: str, script: Script | bytes, **deployment: Any) -> str:
        """A second deployment of a model, for when the first fails; what the server calls it."""
        name = self.wire.model(script if callable(script) else sends(script))
        self.routes.add(model, self._deployment(name, model=name, tier=1, **deployment))
        return name

    def _deployment(self, name: str, **fields: Any) -> Deployment:
        url = self.wire.url.removesuffix("/v1") if fields.get("kind") == "azure" else self.wire.url
        return Deployment.model_validate({"name": name, "url": url, **fields})

    async def chat(self, script: Script | bytes, door: Kit | None = None, **fields: Any) -> Answer:
        """Ask for a streamed reply; the answer is read as far as its headers."""
        asked: dict[str, Any] = {"model": self.model(script), **fields}
        return await (door or self.door).chat(**asked)

    async def stream(self, script: Script | bytes, **fields: Any) -> list[Sse]:
        """The events of a streamed reply, with its end."""
        answer = await self.chat(script, **fields)
        assert answer.status == 200, await answer.body()
        return await answer.events()

    async def whole(self, script: Script | bytes, **fields: Any) -> Any:
        """A reply that was not asked for as a stream."""
        asked: dict[str, Any] = {"stream": False, **fields}
        answer = await self.chat(script, **asked)
        assert answer.status == 200, await answer.body()
        return await answer.json()

    async def told(self, answer: Answer, kind: type[E]) -> E:
        """The event of this kind about an answer's request, once it stands in the log."""
        return (await self.all_told(answer, kind, 1))[0]

    async def all_told(self, answer: Answer, kind: type[E], least: int) -> list[E]:
        """The events of this kind, once there are so many."""
        return await self.all_about(answer.headers["x-request-id"], kind, least)

    async def all_about(self, request: str, kind: type[E], least: int) -> list[E]:
        """The events of this kind about a request, once there are so many."""
        topic = _TOPICS[kind]
        async with asyncio.timeout(20):
            while len(found := self._said(kind, topic, request)) < least:
                await self.log.changed.wait(lambda: bool(self._said(kind, topic, request)), 200)
        return found

    def asking_for(self, model: str) -> str:
        """The id of the request that was admitted for a model."""
        said = [codec.decode(record.value) for record in self.log.records(CHAT_ADMITTED.name)]
        admitted = [one.request for one in said if isinstance(one, ChatAdmitted)]
        [request] = [one.request for one in admitted if one.body["model"] == model]
        return request

    def _said(self, kind: type[E], topic: Topic, request: str) -> list[E]:
        said = [codec.decode(record.value) for record in self.log.records(topic.name)]
        return [one for one in said if isinstance(one, kind) and _request_of(one) == request]

    @asynccontextmanager
    async def another_door(self, drain_s: float) -> AsyncGenerator[Kit]:
        """A door on the same log, which closes at the end of the block."""
        async with serving(self.log, Terms(), drain_s) as kit:
            yield kit


_TOPICS: dict[Any, Topic] = {StreamEnd: CHAT_STREAM, UsageSettled: CHAT_REQUESTS, ChatAdmitted: CHAT_ADMITTED}


def _request_of(event: Any) -> str:
    return event.request.request if isinstance(event, ChatAdmitted) else event.request


def said_in(events: list[Sse]) -> list[Any]:
    """The JSON of all events but the marker."""
    return [event.json for event in events if event.data != "[DONE]"]


def deltas(events: list[Sse], index: int = 0) -> list[Any]:
    """The deltas of a choice, in order."""
    choices = [choice for said in said_in(events) for choice in said.get("choices") or ()]
    return [choice["delta"] for choice in choices if choice["index"] == index and "delta" in choice]


def text_of(events: list[Sse], member: str = "content", index: int = 0) -> str:
    """The text of a choice."""
    return "".join(delta.get(member) or "" for delta in deltas(events, index))


def finishes(events: list[Sse]) -> list[tuple[int, str]]:
    """The finish reasons that were told, by choice."""
    choices = [choice for said in said_in(events) for choice in said.get("choices") or ()]
    return [(choice["index"], choice["finish_reason"]) for choice in choices if choice.get("finish_reason")]


def is_cut(events: list[Sse]) -> Any:
    """The error that ends a broken reply, which is no whole one: no marker and no finish reason beside it."""
    assert "[DONE]" not in [event.data for event in events]
    assert finishes(events) == []
    return events[-1].json["error"]


async def until_left(talk: Talk) -> None:
    """Until the model server sees that it was hung up on; far below any time-out of the wire."""
    async with asyncio.timeout(5):
        await talk.left.wait()


@asynccontextmanager
async def serving(log: MemoryLog, terms: Terms, drain_s: float = 1.0) -> AsyncGenerator[Kit]:
    """A door on a socket."""
    keys = {hashlib.sha256(key.encode()).hexdigest(): tenant for tenant, key in KEYS.items()}
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    door = Door(log=log, keys=keys, terms=terms)
    running = asyncio.create_task(serve(door, stop, drain_s=drain_s, ready=port.set_result))
    await asyncio.wait([port, running], return_when=asyncio.FIRST_COMPLETED)
    kit = Kit(log, Stages(log, PARTITIONS), port.result(), stop)
    try:
        yield kit
    finally:
        stop.set()
        await running
        await hang_up(kit)


async def hang_up(kit: Kit) -> None:
    """Close what a test left open."""
    for call in kit.calls:
        await call.close()
    for client in kit.clients:
        await client.close()
    kit.calls.clear()
    kit.clients.clear()


@asynccontextmanager
async def running(log: Log, stage: Stage) -> AsyncGenerator[None]:
    """A stage at work."""
    runner = Runner(log, stage, f"klatch.{stage.name}", RunnerSettings(commit_s=0.05, drain_s=1.0))
    work = asyncio.create_task(runner.run())
    ready = asyncio.create_task(runner.ready.wait())
    await asyncio.wait({work, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    try:
        yield
    finally:
        runner.stop()
        await work  # raises what made the stage fail meanwhile


@asynccontextmanager
async def stacked(
    keys_file: Path | None = None, now_ms: Callable[[], int] | None = None, tries: int = 1
) -> AsyncGenerator[Stack]:
    """A stack whose model server's keys are in a file, and whose log has a clock of the test's."""
    counts: dict[str, int] = {topic.name: 1 if topic.partitioning == "ledger" else PARTITIONS for topic in TOPICS}
    log = MemoryLog(counts, now_ms=now_ms) if now_ms else MemoryLog(counts)
    async with AsyncExitStack() as parts:
        wire = await parts.enter_async_context(Wire())
        routes, servers = Routes(), ModelServers(Settings(model_url=wire.url, keys_file=keys_file))
        gateway = await parts.enter_async_context(Router(routes, servers.open, servers.default_route()))
        generation = GenerationStage(log, Namespace(), gateway, Preparer(Book()), tries=tries)
        parts.push_async_callback(generation.close)
        judge = RulesJudge()
        parts.push_async_callback(judge.close)
        for stage in (
            DeciderStage(Admission(), log, Namespace()),
            ScreeningStage(log, Namespace(), judge, load_policy()),
            generation,
        ):
            await parts.enter_async_context(running(log, stage))
        door = await parts.enter_async_context(serving(log, Terms()))
        impatient = await parts.enter_async_context(serving(log, IMPATIENT))
        yield Stack(log, wire, routes, door, impatient)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    keys_file = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys_file.write_text(f'[keys]\nvendor = "{KEY}"\n')
    async with stacked(keys_file) as stack:
        yield stack


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _trying() -> AsyncIterator[Stack]:
    async with stacked(tries=TRIES) as stack:
        yield stack


@pytest_asyncio.fixture
async def stack(_stack: Stack) -> AsyncIterator[Stack]:
    """The stack; what a test leaves open is closed after it."""
    yield _stack
    await _left(_stack)


@pytest_asyncio.fixture
async def trying(_trying: Stack) -> AsyncIterator[Stack]:
    """A stack with the usual number of attempts a request."""
    yield _trying
    await _left(_trying)


async def _left(stack: Stack) -> None:
    for door in (stack.door, stack.impatient):
        await hang_up(door)
