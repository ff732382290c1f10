"""Two generation processes are restarted in turn under load: what is finished stays, what is not goes on elsewhere.

The test trusts the log and the model server's own record of its calls. It turns red where processes drain for 0.05 s
instead of 8. Processes come back under new names in the group, or as `klatch up` starts them, under their old ones.
"""
# pyright: basic

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest
from tests.broker.generation_process import Generation, ask, generation

from klatch_agents.testing.upstream import Call, Upstream
from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import StreamAttempt, StreamEnd
from klatch_schemas.records import Partition, partition_of
from klatch_schemas.topics import CHAT_STREAM, Namespace
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_streams.topic_admin import Partitions, create_topics
from klatch_workers.kafka import Cluster

pytestmark = pytest.mark.broker

PARTITIONS = 4
DRAIN_S = 8.0
SHORT = "fake?reply=unique&tokens=10&rate=20"
"""Half a second of text: it can be finished while its worker drains."""
LONG = "fake?reply=unique&tokens=28&rate=20&held=1"
"""It cannot: the model does not come to the end before it is released, once all are restarted."""


class Told:
    """All that the log tells of the streams."""

    def __init__(self, log: KafkaLog, namespace: Namespace) -> None:
        self.openings = defaultdict[str, int](int)
        self.ends = defaultdict[str, list[int]](list)
        """When each end was written, in ms since 1970."""
        self.folds = defaultdict[str, Assembly](Assembly)
        self._log, self._topic = log, namespace.of(CHAT_STREAM)
        self._news = asyncio.Condition()

    async def follow(self) -> None:
        tail = await self._log.tail()
        for number in range(PARTITIONS):
            tail.follow(Partition(self._topic, number), 0)
        try:
            while True:
                records = await tail.read(500)
                async with self._news:
                    for record in records:
                        said = codec.decode(record.value)
                        name = str(getattr(said, "request", ""))
                        self.openings[name] += isinstance(said, StreamAttempt)
                        self.ends[name] += [record.timestamp_ms] if isinstance(said, StreamEnd) else []
                        self.folds[name].hear(record.offset, said)
                    self._news.notify_all()
        finally:
            await tail.close()

    async def until_ended(self, names: set[str]) -> None:
        async with asyncio.timeout(90), self._news:
            await self._news.wait_for(lambda: all(self.folds[name].state.status for name in names))

    def text_of(self, name: str) -> str:
        chunks = [codec.loads(bytes(said.chunk)) for said in self.folds[name].standing]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class Load:
    """Short requests, eight a second, and now and then a long one."""

    def __init__(self, log: KafkaLog, namespace: Namespace) -> None:
        self.asked = list[str]()
        self._log, self._namespace = log, namespace

    async def long(self, partition: int) -> str:
        """Ask for a long reply in this partition."""
        names = (f"long-{len(self.asked)}-{salt}" for salt in count())
        return await self._ask(
            next(name for name in names if partition_of(name.encode(), PARTITIONS) == partition), LONG
        )

    async def _ask(self, name: str, model: str) -> str:
        self.asked.append(name)
        await ask(self._log, self._namespace, name, model, PARTITIONS)
        return name

    async def go_on(self) -> None:
        while True:
            await self._ask(f"short-{len(self.asked)}", SHORT)
            await asyncio.sleep(0.125)  # the load's own pace


async def reached(upstream: Upstream, name: str) -> None:
    """Return once the model speaks to this request."""
    await upstream.changed(lambda: any(user_of(call) == name and call.outcome == "open" for call in upstream.calls), 60)


def user_of(call: Call) -> str:
    return str(call.body["messages"][-1]["content"])  # type: ignore[index]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic-members", "static-members"])
async def test_two_processes_restarted_in_turn_finish_redo_nothing_and_hand_over_the_rest(
    kafka: Cluster, tmp_path: Path, *, static: bool
) -> None:
    name = f"roll-{uuid4().hex[:8]}"
    namespace = Namespace.named(name)
    await create_topics(kafka.bootstrap, namespace, Partitions(PARTITIONS, PARTITIONS))
    log = await KafkaLog.open(KafkaOptions(kafka.bootstrap))
    told, load = Told(log, namespace), Load(log, namespace)
    async with AsyncExitStack() as running:
        upstream = await running.enter_async_context(Upstream())

        async def start(number: int) -> Generation:
            settings = {"drain_s": str(DRAIN_S)} | ({"instance": f"place-{number % 2}"} if static else {})
            worker = generation(kafka.bootstrap, name, upstream.url, tmp_path / f"{number}.log", **settings)
            return await running.enter_async_context(worker)

        workers = await asyncio.gather(start(0), start(1))
        following, asking = asyncio.create_task(told.follow()), asyncio.create_task(load.go_on())
        took, rounds = list[float](), list[list[str]]()
        try:
            for number, worker in enumerate(workers):
                # Whoever is stopped has one of these: there is one in each partition.
                rounds.append([await load.long(partition) for partition in range(PARTITIONS)])
                await asyncio.gather(*[reached(upstream, name) for name in rounds[-1]])
                took.append(await worker.stop())
                await start(2 + number)
            for name in rounds[0] + rounds[1]:
                upstream.release(name)
            asking.cancel()
            await told.until_ended(set(load.asked))
        finally:
            for task in (following, asking):
                task.cancel()
            ended = await asyncio.gather(following, asking, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended

    # Drained within `drain_s`, not until the model's silence was too long, a minute; what it takes to end a process on
    # a machine under load comes on top.
    assert all(seconds < DRAIN_S + 30 for seconds in took), took
    calls = defaultdict[str, list[Call]](list)
    for call in upstream.calls:
        calls[user_of(call)].append(call)
    for request in load.asked:
        state, said = told.folds[request].state, told.text_of(request)
        assert (state.status, len(told.ends[request])) == ("completed", 1), request
        *given_up, last = calls[request]
        # Nothing is called again that has ended, or that was still going on.
        assert all(call.outcome == "left" and call.ended < last.started + 0.5 for call in given_up), (request, given_up)
        assert last.started * 1000 < told.ends[request][0]
        tokens = 10 if request.startswith("short") else 28
        assert said == "".join(f"<<{last.id}:{n}>>" for n in range(tokens)), request
        if request.startswith("short"):
            assert not given_up, "half a second of work was not finished in the time to drain"
    for longs in rounds:
        assert any(told.openings[request] > 1 for request in longs), "nothing was handed over: the run proves nothing"
    assert len(load.asked) > 40
    await log.close()
