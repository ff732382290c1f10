"""Everything on one machine, in order: Kafka and the local model, topics and ledgers, the stages, the door.

1. Take the data folder, so that no two of us use it. 2. Start Kafka, the model server and the stages side by side; the
stages import what they need, and wait. 3. Make the topics, and write tenants and the default prompt into their ledgers.
4. Let the stages begin. Stopping goes the other way: the door first, so that streams finish, Kafka last, so that
everything written is kept.
"""

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from klatch_schemas.events import Limits, ModelRouted, PromptPublished, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import PROMPTS, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.ledger import Ledger, publish
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.books import prompt_key
from klatch_workers.kafka import Cluster, Fetched
from klatch_workers.kafka.folder import free_ports
from klatch_workers.models_file import read_models, write_models
from klatch_workers.settings import PREFIX, Settings, host_port
from klatch_workers.tenants import read_tenants, tenant_configured, write_tenants
from klatch_workers.up.children import Child
from klatch_workers.up.keys import Keys, load_keys, write_private

log = structlog.get_logger(__name__)

STAGES: Final = ("admission", "screening", "generation", "memory", "views", "http")
LOCAL_TENANT: Final = Tenant("local")
PARTITIONS: Final = 8

Begin = Callable[[], Awaitable[Mapping[str, Any]]]

Say = Callable[[str, Mapping[str, Any]], None]
"""Told what happens: an event's name and its facts."""


class AlreadyUp(Exception):
    """Another `klatch up` has the data folder, or something else has the door's address."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `klatch up` was asked for, beside the settings."""

    kafka: str | None = None
    """An existing cluster; None: one of our own."""
    tenants: Path | None = None
    models: Path | None = None


class _Ledgers(NamedTuple):
    """What files say."""

    tenants: list[TenantConfigured]
    routes: list[ModelRouted]


@dataclass(slots=True)
class Everything:
    """What runs."""

    settings: Settings
    keys: Keys
    bootstrap: str
    local_model: bool
    cluster: Cluster | None = None
    children: dict[str, Child] = field(default_factory=dict[str, Child])

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, the broker among them."""
        broker = self.cluster.nodes[0].pid if self.cluster and self.cluster.nodes else None
        return {**({"broker": broker} if broker else {}), **{name: child.pid for name, child in self.children.items()}}

    def facts(self) -> dict[str, Any]:
        """What a user of this klatch needs to know, secrets included."""
        return {
            "http": f"http://{self.settings.http}",
            "bootstrap": self.bootstrap,
            "namespace": self.settings.namespace,
            "tenant": LOCAL_TENANT,
            "api_key": self.keys.api,
            "views_url": self.settings.views_url,
            "pids": self.pids,
        }


@asynccontextmanager
async def everything(settings: Settings, wanted: Wanted, say: Say) -> AsyncGenerator[Everything, None]:
    """Start all there is and stop it again. Raises AlreadyUp, ChildFailed, KafkaChildError, LogError, ValueError."""
    tenants = read_tenants(wanted.tenants) if wanted.tenants else []
    routes = read_models(wanted.models, by="klatch up") if wanted.models else []
    data = settings.data
    data.mkdir(parents=True, exist_ok=True)
    (data / "logs").mkdir(exist_ok=True)
    with (data / "up.lock").open("w") as lock:
        _take(lock, data)
        _see_whether_free(settings.http)
        keys = load_keys(data)
        running = Everything(_complete(settings, wanted, keys), keys, wanted.kafka or "", settings.model_url is None)

        def tell(event: str, facts: Mapping[str, Any]) -> None:
            if event == "restarted":
                _renew_run_file(running)
            say(event, facts)

        try:
            await _start(running, wanted, _Ledgers(tenants, routes), tell)
            yield running
        finally:
            await _stop(running)


async def _start(running: Everything, wanted: Wanted, ledgers: _Ledgers, say: Say) -> None:
    furnished: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    async def begin() -> Mapping[str, Any]:
        return await asyncio.shield(furnished)

    async with asyncio.TaskGroup() as starting:
        # Most of a stage's start is imports, so stages start beside Kafka, and begin when there is something to read.
        for stage in STAGES:
            starting.create_task(_start_child(running, _stage(running, stage, begin, say), say))
        if running.local_model:
            starting.create_task(_start_child(running, _model(running, say), say))
        if wanted.kafka is None:
            await _start_kafka(running, say)
        running.settings = running.settings.model_copy(update={"kafka": running.bootstrap})
        await _furnish(running, ledgers)
        furnished.set_result({"kafka": running.bootstrap})
        say("furnished", {})
    _write_run_file(running)


async def _stop(running: Everything) -> None:
    # The door goes first: while it drains, the stages still finish what its clients are reading.
    patience_s = running.settings.drain_s + 7.0
    (running.settings.data / "run.json").unlink(missing_ok=True)
    if door := running.children.pop("http", None):
        await door.stop(patience_s)
    stages = [running.children.pop(name) for name in STAGES if name in running.children]
    await asyncio.gather(*(child.stop(patience_s) for child in stages))
    await asyncio.gather(*(child.stop(5.0) for child in running.children.values()))
    if running.cluster:
        await running.cluster.stop()


async def _start_kafka(running: Everything, say: Say) -> None:
    def fetched(progress: Fetched) -> None:
        say("fetching", {"jars": progress.jars, "of": progress.total, "bytes": progress.bytes})

    running.cluster = Cluster(running.settings.data / "kafka", progress=fetched)
    await running.cluster.start()
    running.bootstrap = running.cluster.bootstrap
    say("started", {"process": "broker", "seconds": running.cluster.started_in})


async def _start_child(running: Everything, child: Child, say: Say) -> None:
    running.children[child.name] = child
    began = asyncio.get_running_loop().time()
    await child.start()
    say("started", {"process": child.name, "seconds": asyncio.get_running_loop().time() - began})


async def keep_broker(running: Everything, say: Say) -> None:
    """Start the broker again whenever it ends by itself. Returns only where the cluster is not ours."""
    while running.cluster:
        failure = await running.cluster.failed()
        say("died", {"process": "broker", "reason": str(failure).splitlines()[0]})
        for node in running.cluster.nodes:
            await node.stop()
            await node.start()
        _renew_run_file(running)
        say("restarted", {"process": "broker", "pid": running.cluster.nodes[0].pid})


# --- what is given to each


def _complete(settings: Settings, wanted: Wanted, keys: Keys) -> Settings:
    """The settings with everything that was left open filled in."""
    memory, views, model = _free_addresses(3)
    update: dict[str, Any] = {
        "kafka": wanted.kafka or "",
        "memory": memory,
        "memory_url": f"http://{memory}",
        "views": views,
        "views_url": f"http://{views}",
        "internal_key": keys.internal,
        # One process a stage, started again when it dies: it need not wait until the group has missed it.
        "instance": "up",
    }
    if settings.model_url is None:
        update |= {"model_url": f"http://{model}/v1", "model_key": keys.model, "model_continues": "prefill"}
    given = settings.model_dump(exclude={"internal_key"})
    return Settings(**{**given, **update})


def _model(running: Everything, say: Say) -> Child:
    url = running.settings.model_url or ""
    _, port = host_port(url.removeprefix("http://").removesuffix("/v1"))
    return Child(
        name="model",
        module="klatch_workers.local_model",
        arguments=("--port", str(port)),
        environment={**_environment(running.settings), f"{PREFIX}LOCAL_API_KEY": running.keys.model},
        log_file=running.settings.data / "logs" / "model.log",
        said=say,
    )


def _stage(running: Everything, stage: str, begin: Begin, say: Say) -> Child:
    return Child(
        name=stage,
        module="klatch_workers",
        arguments=("worker", stage, "--json", "--wait"),
        begin=begin,
        environment=_environment(running.settings),
        log_file=running.settings.data / "logs" / f"{stage}.log",
        said=say,
    )


def _environment(settings: Settings) -> dict[str, str]:
    """Ours, with every setting spelt out."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    for name, value in settings:
        if value is not None:
            plain = value.get_secret_value() if hasattr(value, "get_secret_value") else value
            ours[PREFIX + name.upper()] = str(plain)
    return ours


# --- topics and ledgers


async def _furnish(running: Everything, ledgers: _Ledgers) -> None:
    namespace = Namespace.named(running.settings.namespace)
    await create_topics(running.bootstrap, namespace, Partitions(PARTITIONS, PARTITIONS))
    kafka = await KafkaLog.open(KafkaOptions(running.bootstrap))
    try:
        # Without a file that says otherwise, what `klatch quota set` has set stands.
        keep = {LOCAL_TENANT} - {tenant.tenant for tenant in ledgers.tenants}
        await write_tenants(kafka, namespace, _with_local(ledgers.tenants, running.keys), by="klatch up", keep=keep)
        await write_models(kafka, namespace, ledgers.routes)
        await _write_prompt(kafka, namespace)
    finally:
        await kafka.close()


def _with_local(tenants: list[TenantConfigured], keys: Keys) -> list[TenantConfigured]:
    given = next((tenant for tenant in tenants if tenant.tenant == LOCAL_TENANT), None)
    local = tenant_configured(LOCAL_TENANT, [keys.api], Limits())
    if given:
        local = given.model_copy(update={"keys": (*local.keys, *given.keys)})
    return [local, *(tenant for tenant in tenants if tenant.tenant != LOCAL_TENANT)]


async def _write_prompt(kafka: KafkaLog, namespace: Namespace) -> None:
    template = (files("klatch_workers.up") / "assistant.jinja").read_text()
    prompt = PromptPublished(name="assistant", version=1, template=template, by="klatch up")
    async with await Ledger[PromptPublished].open(kafka, PROMPTS, namespace, PromptPublished) as ledger:
        if ledger.get(prompt_key(prompt)) is None:
            await publish(kafka, PROMPTS, prompt_key(prompt), prompt, namespace)


# --- small change


def _write_run_file(running: Everything) -> None:
    settings = running.settings
    facts = {
        **running.facts(),
        "internal_key": running.keys.internal,
        "memory_url": settings.memory_url,
        "model_url": settings.model_url,
        "model_key": settings.model_key.get_secret_value() if settings.model_key else None,
        "keys_file": str(settings.keys_file.absolute()) if settings.keys_file else None,
    }
    write_private(running.settings.data / "run.json", json.dumps(facts, indent=1))


def _renew_run_file(running: Everything) -> None:
    """Name the processes that run now, for commands beside us; not while we start or stop."""
    if (running.settings.data / "run.json").exists():
        _write_run_file(running)


def _take(lock: Any, data: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise AlreadyUp(f"another `klatch up` uses {data}: end it, or give --data another folder") from error


def _see_whether_free(listen: str) -> None:
    host, port = host_port(listen)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AlreadyUp(
                f"{listen} is taken ({error.strerror}): end what listens there, or give --http another address"
            ) from error


# Where systems take none from for outgoing connections, or for who listens at any port: it takes a stage seconds until
# it has its own. Nor does our Kafka (`kafka/folder.py`).
_PORTS: Final = range(14_000, 20_000)


def free_address() -> str:
    """`127.0.0.1` with a port that was free a moment ago."""
    return _free_addresses(1)[0]


def _free_addresses(count: int) -> list[str]:
    """So many that differ. Raises DataFolderError."""
    return [f"127.0.0.1:{port}" for port in free_ports(count, among=_PORTS)]
