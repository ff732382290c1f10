"""One run: start, load and strike, let everything come to rest, read back, judge.

The judge is given what the log holds once all stages have ended, what every client saw, and the model server's own
record of its calls; nothing that a stage said about itself.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import aiohttp

from klatch_agents.testing.upstream import Call
from klatch_agents.testing.upstream.answer import prompt_tokens
from klatch_schemas.client import Client
from klatch_schemas.ids import RequestId
from klatch_schemas.topics import (
    ADMISSION_STATE,
    CHAT_ADMITTED,
    CHAT_REQUESTS,
    CHAT_STREAM,
    CHAT_TURNS,
    DEAD_LETTERS,
)
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.log import Log
from klatch_workers.torture.asking import PATIENCE_S, Load
from klatch_workers.torture.evidence import Evidence, ModelCall, Observation, Stall, Struck
from klatch_workers.torture.judge import judge
from klatch_workers.torture.live import LiveLog
from klatch_workers.torture.load import USUAL, Shape, plan
from klatch_workers.torture.readback import entries, read_back, snapshots
from klatch_workers.torture.report import Report
from klatch_workers.torture.rig import REMEMBERS_S, Rig, Say, rig
from klatch_workers.torture.schedule import Fault
from klatch_workers.torture.sizes import Size, by_quarters
from klatch_workers.torture.sizes import watch as watch_sizes
from klatch_workers.torture.stalls import watch as watch_stalls
from klatch_workers.torture.strike import Striker
from klatch_workers.torture.system import Klatch, System
from klatch_workers.up.everything import PARTITIONS

_LATE_READERS: Final = 100
_PROGRESS_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What a run is to be."""

    seed: int
    minutes: float
    faults: Sequence[Fault]
    nodes: int = 1
    requests_per_second: float = 8.0
    static: bool = False
    """Whether workers are static members of their groups."""
    partitions: int = PARTITIONS
    """Of every topic that is keyed by conversation or tenant."""
    shape: Shape = USUAL
    system: System = Klatch()
    patience_s: float = PATIENCE_S
    """How long a client waits for the end of one reply, and everything may take to come to rest."""
    plain: bool = False
    """Whether nothing is asked but what any worker can answer: no cancels, deadlines, repeats, failures or HTTP."""


async def torture(folder: Path, orders: Orders, say: Say) -> Report:
    """Run it. Raises what a part raises that does not start."""
    started = rig(folder, orders.nodes, say, system=orders.system, partitions=orders.partitions, static=orders.static)
    async with started as tortured, _load(tortured, orders.patience_s) as load:
        striker = Striker(tortured, load.log, say)
        plain, shape = orders.plain, orders.shape
        talks = plan(orders.seed, orders.minutes, orders.requests_per_second, plain=plain, shape=shape)
        say(f"asking {sum(len(talk.turns) for talk in talks)} requests in {len(talks)} conversations")
        stalls, sizes = list[Stall](), list[Size]()
        watching = [
            asyncio.create_task(_tell(load, say)),
            asyncio.create_task(watch_stalls(stalls)),
            asyncio.create_task(watch_sizes(tortured.pids, sizes)),
        ]
        async with asyncio.TaskGroup() as going:
            going.create_task(load.run(talks))
            if not plain:
                going.create_task(load.set_quotas(orders.minutes))
            going.create_task(striker.run(orders.faults))
        await _rest(load, say)
        late = await _late_readers(load, orders.seed) if "http" in orders.system.stages else []
        for one in watching:
            one.cancel()
        await tortured.stop()
        say("reading everything back")
        found = await _evidence(load, tortured, striker.struck, late, stalls)
    report, *others = [await asyncio.to_thread(judge, evidence) for evidence in found.values()]
    checked = {
        **report.checked,
        "quotas_set": load.quotas_set,
        **{f"client: {what}": number for what, number in load.troubles.items()},
    }
    readings = dict(zip(list(found)[1:], others, strict=True))
    return replace(report, checked=checked, memory_mb=by_quarters(sizes), readings=readings)


@asynccontextmanager
async def _load(tortured: Rig, patience_s: float) -> AsyncGenerator[Load, None]:
    log = await KafkaLog.open(KafkaOptions(tortured.cluster.bootstrap))
    system = tortured.system
    live = LiveLog(log, tortured.namespace, next(iter(system.readings.values()))(), bare=system.bare)
    await live.locate()
    following = asyncio.create_task(live.follow())
    try:
        async with AsyncExitStack() as opened:
            session = await opened.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            clients = {
                tenant: await opened.enter_async_context(Client(tortured.cluster.bootstrap, tenant=tenant))
                for tenant in tortured.keys
            }
            yield Load(
                log,
                live,
                session,
                tortured.namespace,
                tortured.door,
                tortured.keys,
                clients,
                patience_s,
                system.bare,
            )
    finally:
        following.cancel()
        await asyncio.wait([following])
        await log.close()


async def _tell(load: Load, say: Say) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        say(f"          {len(load.accepted)} accepted, {load.waiting} not concluded")


async def _rest(load: Load, say: Say) -> None:
    """Until every accepted request has its end and its bill; what has none by then is the judge's."""
    say(f"waiting for {load.waiting} requests to be concluded")
    try:
        async with asyncio.timeout(load.patience_s):
            for request in load.accepted:
                reader = load.live.reader(request)
                await reader.until(lambda reader=reader: reader.concluded)  # type: ignore[misc]
    except TimeoutError:
        say(f"{load.waiting} requests have not been concluded")


async def _late_readers(load: Load, seed: int) -> list[Observation]:
    """Some streams once more over HTTP, from their beginnings, by readers that come when all is over."""
    # Of the others a door would have to read more of the log than it is told to.
    since_ms = (time.time() - REMEMBERS_S / 2) * 1000
    recent = [request for request in load.accepted if load.live.reader(request).published_ms > since_ms]
    random.Random(f"late {seed}").shuffle(recent)  # noqa: S311 - no secret
    # Where cancel and end raced there is most to tell wrongly.
    chosen = sorted(recent, key=lambda request: not load.live.reader(request).raced)[:_LATE_READERS]
    readers = [load.reader(load.asked[request], "late http", resumes_only=True) for request in chosen]
    try:
        async with asyncio.timeout(load.patience_s), asyncio.TaskGroup() as reading:
            for reader in readers:
                reading.create_task(reader.read())
    except TimeoutError:
        pass  # Who was told of no end says so itself.
    return [reader.observation() for reader in readers]


async def _evidence(
    load: Load, tortured: Rig, struck: Sequence[Struck], late: Sequence[Observation], stalls: Sequence[Stall]
) -> dict[str, Evidence]:
    """By the way in which streams were read: clients and live readers know only the first."""
    log: Log = load.log
    live = [load.live.reader(request).observation() for request in load.accepted]
    topics = (CHAT_REQUESTS, CHAT_ADMITTED, CHAT_STREAM, CHAT_TURNS, DEAD_LETTERS)
    requests, admitted, stream, turns, dead = [await read_back(log, tortured.namespace, topic) for topic in topics]
    bare = tortured.system.bare
    states = [] if bare else await read_back(log, tortured.namespace, ADMISSION_STATE)
    (first, read), *others = tortured.system.readings.items()
    evidence = Evidence(
        asked=load.asked,
        acknowledged=load.acknowledged,
        requests=entries(requests),
        admitted=entries(admitted),
        stream=entries(stream, read()),
        turns=entries(turns),
        dead=[f"{record.partition.topic}/{record.partition.number}/{record.offset}" for record in dead],
        observations=[*live, *load.seen, *late],
        calls=[_call(call) for call in tortured.upstream.calls],
        struck=struck,
        stalls=stalls,
        snapshots=snapshots(states),
        bare=bare,
    )
    otherwise = {
        name: replace(evidence, stream=entries(stream, reading()), observations=()) for name, reading in others
    }
    return {first: evidence, **otherwise}


def _call(call: Call) -> ModelCall:
    request = RequestId(str(call.body.get("user", "")))
    return ModelCall(call.id, request, call.started * 1000, call.ended * 1000, prompt_tokens(call.body))
