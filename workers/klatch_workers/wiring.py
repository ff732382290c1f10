"""The one place where parts are put together: each stage as a function of the settings that runs until it is told.

`run_stage(name, begin, stop, ready)` opens what the stage needs, calls `ready` once it serves, and when `stop` is
set drains and closes everything in the reverse order. A failure of any part ends the stage and is raised: whoever
runs it starts it anew. Imports are where they are used, since each stage has its own heavy parts.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from math import inf
from typing import Any, Final, TypeVar

import structlog

from klatch_schemas.events import Event
from klatch_schemas.topics import MODELS, PROMPTS, TENANTS, Namespace, Topic
from klatch_streams.kafka.options import KafkaOptions, rebalance_ms_for
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.ledger import Ledger
from klatch_streams.log import Log, LogError
from klatch_streams.owner import Stage
from klatch_streams.runner import Runner, RunnerSettings
from klatch_streams.supervise import supervise
from klatch_streams.topic_admin import check_topics
from klatch_workers.settings import Settings, host_port

log = structlog.get_logger(__name__)

E = TypeVar("E", bound=Event)

Begin = Callable[[], Awaitable[Settings]]
"""Gives the settings once the stage may begin: a stage imports its parts before it asks, since that takes a second."""

Ready = Callable[[dict[str, Any]], None]
"""Told once that a stage serves, and what there is to know about it, such as its URL."""

COLLECTION: Final = "klatch-memories"


class WrongSetup(Exception):
    """Trying again will not help: an operator has to change something, as the message says."""


class MissingSetting(WrongSetup):
    """A stage needs a setting that nobody gave."""


class TopicsDiffer(WrongSetup):
    """The cluster's topics are not those of the table: starting on them would break promises."""


async def run_stage(name: str, begin: Begin, stop: asyncio.Event, ready: Ready) -> None:
    """Run one stage until `stop` is set. Raises what made it fail; KeyError for a stage that does not exist."""
    await STAGES[name](begin, stop, ready)


async def run_admission(begin: Begin, stop: asyncio.Event, ready: Ready) -> None:
    """Quotas, deadlines, and each request once."""
    from klatch_streams.admission import Admission
    from klatch_streams.decider_owner import DeciderStage

    settings = await begin()
    async with _log(settings) as kafka:
        admission = Admission()
        stage = DeciderStage(admission, kafka, Namespace.named(settings.namespace), admission.give_up)
        await _run(stage, kafka, settings, stop, ready)


async def run_screening(begin: Begin, stop: asyncio.Event, ready: Ready) -> None:
    """Trust verdicts on what was asked."""
    from klatch_agents.trust.policy import load_policy
    from klatch_agents.trust.rules import RulesJudge
    from klatch_workers.screening import ScreeningStage

    settings = await begin()
    policy = load_policy(settings.trust_policy)
    async with _log(settings) as kafka, _closing(RulesJudge()) as judge:
        stage = ScreeningStage(kafka, Namespace.named(settings.namespace), judge, policy)
        await _run(stage, kafka, settings, stop, ready)


async def run_generation(begin: Begin, stop: asyncio.Event, ready: Ready) -> None:
    """Answers admitted requests."""
    from klatch_schemas.events import ModelRouted, PromptPublished
    from klatch_workers.books import PromptBook, RouteBook
    from klatch_workers.generation.prepare import Preparer
    from klatch_workers.generation.stage import GenerationStage

    settings = await begin()
    async with AsyncExitStack() as open_parts:
        kafka = await open_parts.enter_async_context(_log(settings))
        namespace = Namespace.named(settings.namespace)
        prompts = await open_parts.enter_async_context(await _ledger(kafka, PROMPTS, settings, PromptPublished))
        routes = await open_parts.enter_async_context(await _ledger(kafka, MODELS, settings, ModelRouted))
        gateway = await open_parts.enter_async_context(_router(settings, routes))
        recaller = await open_parts.enter_async_context(_memory_client(settings))
        preparer = Preparer(PromptBook(prompts), recaller, verdict_patience_s=settings.verdict_patience_s)
        stage = await open_parts.enter_async_context(
            _closing(
                GenerationStage(
                    kafka,
                    namespace,
                    gateway,
                    preparer,
                    max_in_flight=settings.max_in_flight,
                    prices=RouteBook(routes).prices,
                )
            )
        )
        await _run(stage, kafka, settings, stop, ready, prompts.failed(), routes.failed(), stage.follower.failure())


async def run_memory(begin: Begin, stop: asyncio.Event, ready: Ready) -> None:
    """Remembers turns, and answers recall and embeddings over HTTP."""
    from aiohttp import web

    from klatch_agents.memory.recall import Recall
    from klatch_workers.memory.service import application
    from klatch_workers.memory.stage import MemoryStage

    settings = await begin()
    async with AsyncExitStack() as open_parts:
        kafka = await open_parts.enter_async_context(_log(settings))
        embedder = await open_parts.enter_async_context(_closing(await _embedder(settings)))
        index = await open_parts.enter_async_context(_closing(await _index(settings, embedder)))
        recall = Recall(embedder, index)
        serving = web.AppRunner(application(recall, embedder, _internal_key(settings)), access_log=None)
        await serving.setup()
        open_parts.push_async_callback(serving.cleanup)
        site = web.TCPSite(serving, *host_port(settings.memory))
        await site.start()
        url = f"http://{settings.memory}"
        stage = MemoryStage(kafka, Namespace.named(settings.namespace), recall)
        await _run(stage, kafka, settings, stop, lambda facts: ready({**facts, "url": url}))


async def run_views(begin: Begin, stop: asyncio.Event, ready: Ready) -> None:
    """Windowed counts by tenant and model, over HTTP."""
    from klatch_workers.views.run import run_views as run

    await run(await begin(), stop, ready)


async def run_http(begin: Begin, stop: asyncio.Event, ready: Ready) -> None:
    """The OpenAI-compatible door."""
    from klatch_schemas.events import ModelRouted, TenantConfigured
    from klatch_workers.books import KeyBook, RouteBook
    from klatch_workers.http.app import listen, serve
    from klatch_workers.http.closed import closed_until
    from klatch_workers.http.door import Door, Terms
    from klatch_workers.http.embeddings import RoutedEmbeddings, TextEmbeddings

    settings = await begin()
    host, port = host_port(settings.http)
    async with AsyncExitStack() as open_parts:
        listening = open_parts.enter_context(listen(host, port))
        if (kafka := await closed_until(_log_in_time(settings, open_parts, stop), listening)) is None:
            return
        namespace = Namespace.named(settings.namespace)
        # While the log does not answer the door stays, and says so: a client that is refused knows when to come again.
        tenants = await open_parts.enter_async_context(await _ledger(kafka, TENANTS, settings, TenantConfigured, inf))
        routes = await open_parts.enter_async_context(await _ledger(kafka, MODELS, settings, ModelRouted, inf))
        gateway = await open_parts.enter_async_context(_router(settings, routes))
        memory = await open_parts.enter_async_context(_memory_client(settings))
        own = TextEmbeddings(settings.embedder, memory.embed) if memory else None
        door = Door(
            log=kafka,
            keys=KeyBook(tenants),
            namespace=namespace,
            embeddings=RoutedEmbeddings(RouteBook(routes), gateway, own),
            models=gateway,
            prices=RouteBook(routes).prices,
            terms=Terms(idempotency_window_ms=int(settings.idempotency_s * 1000)),
        )
        serving = serve(
            door,
            stop,
            listening=listening,
            drain_s=settings.drain_s,
            ready=lambda bound: ready({"url": f"http://{host}:{bound}"}),
        )
        await _first_of(serving, tenants.failed(), routes.failed())


STAGES: Final[dict[str, Callable[[Begin, asyncio.Event, Ready], Awaitable[None]]]] = {
    "admission": run_admission,
    "screening": run_screening,
    "generation": run_generation,
    "memory": run_memory,
    "views": run_views,
    "http": run_http,
}


async def _run(
    stage: Stage,
    kafka: Log,
    settings: Settings,
    stop: asyncio.Event,
    ready: Ready,
    *watched: Awaitable[None],
) -> None:
    """Run a stage's runner until `stop`, failing with the first of `watched` that fails."""
    group = Namespace.named(settings.namespace).group(stage.name)
    runner = Runner(kafka, stage, group, RunnerSettings(drain_s=settings.drain_s))

    async def run() -> None:
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: runner.stop())
        telling = asyncio.create_task(runner.ready.wait())
        telling.add_done_callback(lambda done: None if done.cancelled() else ready({}))
        try:
            await runner.run()
        finally:
            stopping.cancel()
            telling.cancel()

    await _first_of(run(), *watched)


async def _first_of(main: Awaitable[None], *watched: Awaitable[None]) -> None:
    """Await `main`; a failure of one of `watched` ends it and is raised instead."""
    running = asyncio.ensure_future(main)
    guards = [asyncio.ensure_future(one) for one in watched]
    try:
        await asyncio.wait({running, *guards}, return_when=asyncio.FIRST_COMPLETED)
        for guard in guards:
            if guard.done() and not running.done():
                guard.result()
        await running
    finally:
        for task in (running, *guards):
            task.cancel()
        await asyncio.wait({running, *guards})


@asynccontextmanager
async def _log(settings: Settings) -> AsyncGenerator[Log, None]:
    patience_ms = rebalance_ms_for(settings.drain_s)
    options = KafkaOptions(settings.kafka, instance_id=settings.instance, rebalance_ms=patience_ms)
    problems = await check_topics(options, Namespace.named(settings.namespace))
    # Topics that are missing may be made any moment, and are asked for again; those that differ stay so.
    if differing := [problem.says for problem in problems if problem.what != "missing"]:
        raise TopicsDiffer("\n".join(differing))
    kafka = await KafkaLog.open(options)
    try:
        yield kafka
    finally:
        await kafka.close()


async def _log_in_time(settings: Settings, parts: AsyncExitStack, stop: asyncio.Event) -> Log | None:
    """The log, as soon as Kafka answers; None if `stop` was set before. Raises WrongSetup."""
    opened = list[Log]()

    async def open_log() -> None:
        opened.append(await parts.enter_async_context(_log(settings)))

    opening = asyncio.ensure_future(
        supervise(open_log, name="http", gives_up=lambda error: not isinstance(error, LogError))
    )
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            return None
        opening.result()
        return opened[0]
    finally:
        opening.cancel()
        stopping.cancel()
        await asyncio.wait({opening, stopping})


async def _ledger(kafka: Log, topic: Topic, settings: Settings, of: type[E], patience_s: float = 0) -> Ledger[E]:
    return await Ledger[E].open(kafka, topic, Namespace.named(settings.namespace), of, patience_s=patience_s)


@asynccontextmanager
async def _closing(part: Any) -> AsyncGenerator[Any, None]:
    try:
        yield part
    finally:
        await part.close()


@asynccontextmanager
async def _memory_client(settings: Settings) -> AsyncGenerator[Any, None]:
    if settings.memory_url is None:
        yield None
        return
    from klatch_workers.memory.client import MemoryClient

    client = MemoryClient(settings.memory_url, _internal_key(settings))
    try:
        yield client
    finally:
        await client.close()


def _router(settings: Settings, routes: Ledger[Any]) -> Any:
    from klatch_agents.gateway.errors import MisconfiguredError
    from klatch_agents.gateway.router import Router
    from klatch_workers.books import RouteBook
    from klatch_workers.model_servers import ModelServers

    try:
        servers = ModelServers(settings)
    except MisconfiguredError as error:
        raise WrongSetup(str(error)) from error
    default = servers.default_route()
    if default is None and not routes.values():
        raise MissingSetting(
            "no model server is set: give --model-url or KLATCH_MODEL_URL, such as http://host:8000/v1, "
            "or route models to servers with `klatch models`"
        )
    return Router(RouteBook(routes), servers.open, default)


def _internal_key(settings: Settings) -> str:
    if settings.internal_key is None:
        raise MissingSetting("KLATCH_INTERNAL_KEY is not set: klatch's own processes know each other by it")
    return settings.internal_key.get_secret_value()


async def _embedder(settings: Settings) -> Any:
    kind, _, name = settings.embedder.partition(":")
    if kind == "minilm":
        from klatch_agents.embeddings.onnx import OnnxMiniLM

        return await OnnxMiniLM.load()
    if kind == "sentence-transformers" and name:
        from klatch_agents.embeddings.sentence_transformers import SentenceTransformersEmbedder

        return await SentenceTransformersEmbedder.load(name)
    if kind in {"http", "https"}:
        from klatch_agents.embeddings.openai_compatible import OpenAICompatibleEmbedder

        key = settings.embedder_key.get_secret_value() if settings.embedder_key else ""
        if settings.embedder_model is None or settings.embedder_dimension is None:
            raise MissingSetting("an embeddings server needs KLATCH_EMBEDDER_MODEL and KLATCH_EMBEDDER_DIMENSION")
        return OpenAICompatibleEmbedder(
            settings.embedder, settings.embedder_model, settings.embedder_dimension, api_key=key or None
        )
    raise MissingSetting(
        f"KLATCH_EMBEDDER={settings.embedder!r} is none of: minilm, sentence-transformers:NAME, an http(s) URL"
    )


async def _index(settings: Settings, embedder: Any) -> Any:
    if settings.qdrant_url is None:
        from klatch_agents.memory.edge import EdgeIndex

        return await EdgeIndex.open(settings.data / "memory", embedder.model_id, embedder.dimension)
    from klatch_agents.memory.server import ServerIndex

    key = settings.qdrant_key.get_secret_value() if settings.qdrant_key else None
    collection = f"{settings.namespace}-{COLLECTION}" if settings.namespace else COLLECTION
    return await ServerIndex.open(settings.qdrant_url, collection, embedder.model_id, embedder.dimension, api_key=key)
