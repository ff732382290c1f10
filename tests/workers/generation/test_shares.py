"""A tenant's weight and class on their way, from its settings through admission and screening to a model's place."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.fidelity.conftest import running
from tests.workers.generation.conftest import Generation

from klatch_agents.gateway.port import Gateway, ModelCall, ModelReply
from klatch_agents.gateway.router import Router
from klatch_agents.trust.policy import load_policy
from klatch_agents.trust.rules import RulesJudge
from klatch_schemas.events import ChatRequested, Deployment, Limits, ModelRouted, QuotaLimitSet, StreamCancel
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, MODELS, Namespace
from klatch_streams.admission import Admission
from klatch_streams.decider_owner import DeciderStage
from klatch_streams.ledger import publish
from klatch_workers.screening import ScreeningStage


class Turnstile:
    """Stands between workers and their router: it counts who has come for a place, holds whoever has one until it is
    opened, and lets a second pass with each call."""

    def __init__(self) -> None:
        self.at = 0.0
        self.opened = asyncio.Event()
        self._came = 0
        self._coming = asyncio.Condition()

    def now(self) -> float:
        """Seconds."""
        return self.at

    def before(self, router: Router) -> Gateway:
        """The gateway that workers call."""
        self.router = router
        return self

    async def until_came(self, count: int) -> None:
        """Until so many wait for a place, or have one."""
        async with self._coming, asyncio.timeout(30):
            await self._coming.wait_for(lambda: self._came >= count)

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[ModelReply]:
        """A place is asked for before anybody hears of it: entering the router does so at once."""
        async with self._coming:
            self._came += 1
            self._coming.notify_all()
        async with self.router.stream(call) as reply:
            await self.opened.wait()
            yield reply
            self.at += 1.0

    def continues(self, call: ModelCall) -> bool:
        return self.router.continues(call)

    async def close(self) -> None:
        await self.router.close()


class Town:
    """Tenants who ask for the one place at a model, and the order in which they were served."""

    def __init__(self, generation: Generation, turnstile: Turnstile) -> None:
        self._generation = generation
        self._turnstile = turnstile
        self._asked = list[Any]()

    async def configure(self, tenant: str, **settings: Any) -> None:
        """Set a tenant's weight or class."""
        said = QuotaLimitSet(tenant=Tenant(tenant), limits=Limits(), **settings)
        await self._generation.write(CHAT_REQUESTS, tenant, said)

    async def asks(self, tenant: str, **envelope: Any) -> None:
        """Ask, and come for the place."""
        conversation = f"c{len(self._asked)}"
        request = self._generation.request("one", tenant=tenant, conversation=conversation, **envelope)
        self._asked.append(request)
        await self._generation.write(CHAT_REQUESTS, tenant, request)
        await self._turnstile.until_came(len(self._asked))

    async def served(self, name: Callable[[Any], Any]) -> list[Any]:
        """Everybody who asked, by `name`, as the model met them; the first of all had the place before anybody came."""
        self._turnstile.opened.set()
        for request in self._asked:
            await self._generation.ended(request)
        asked = {request.request: request for request in self._asked}
        return [name(asked[call.headers["x-request-id"]]) for call in self._generation.upstream.calls][1:]


def tenant(request: Any) -> str:
    return str(request.tenant)


def asked_class(request: Any) -> int:
    return int(request.priority)


@pytest.fixture
async def town(generation: Generation) -> AsyncIterator[Town]:
    turnstile, judge = Turnstile(), RulesJudge()
    generation.between, generation.wall = turnstile.before, turnstile.now
    one = Deployment(name="one", url=generation.upstream.url, model="fake?text=served", concurrency=1)
    await publish(generation.log, MODELS, "one", ModelRouted(alias="one", deployments=(one,)), Namespace())
    admission = DeciderStage(Admission(), generation.log, Namespace())
    screening = ScreeningStage(generation.log, Namespace(), judge, load_policy())
    async with running(generation.log, admission), running(generation.log, screening), generation.worker():
        yield Town(generation, turnstile)
        turnstile.opened.set()
    await judge.close()


async def test_a_tenant_of_three_times_the_weight_is_served_three_times_as_often(town: Town) -> None:
    await town.configure("acme", weight=3)
    await town.asks("acme")
    for _ in range(16):
        await town.asks("globex")
        await town.asks("acme")
    served = await town.served(tenant)
    # Who was quiet may catch up by a few calls, and in the end only one has any left.
    assert Counter(served[7:23]) == {"acme": 12, "globex": 4}


async def test_a_tenant_whose_best_class_is_low_gives_others_a_head_start_whatever_it_asks_for(town: Town) -> None:
    await town.configure("acme", priority=6)
    await town.asks("acme", priority=0)
    for _ in range(10):
        await town.asks("acme", priority=0)
        await town.asks("globex", priority=0)
    served = await town.served(tenant)
    assert served[:6] == ["globex"] * 6


async def test_in_a_tenant_classes_order_requests_and_none_is_better_than_the_tenants_best(town: Town) -> None:
    await town.configure("acme", priority=3)
    await town.asks("acme")
    for priority in (7, 5, 4, 3, 0):
        await town.asks("acme", priority=priority)
    assert await town.served(asked_class) == [3, 0, 4, 5, 7], "the 0 is a 3, and came after one"


# --- behind a tenant's own share

SLOW = "fake?reply=unique&tokens=1000&rate=20"


async def outcome(generation: Generation, request: ChatRequested) -> str:
    """How it ended, which is to be soon."""
    async with asyncio.timeout(30):
        return (await generation.settled(request)).status


async def speaks(generation: Generation) -> ChatRequested:
    """A request that has been answered with a few words, and goes on."""
    speaking = await generation.admit(SLOW)
    await generation.assembled(speaking, lambda assembly: len(assembly.standing) > 3)
    return speaking


@pytest.fixture
async def full(generation: Generation) -> AsyncIterator[ChatRequested]:
    """Of a tenant whose whole share of the room is taken by one request, which speaks in conversation c1."""
    generation.max_in_flight = 2
    async with generation.worker(drain_s=0.1):
        speaking = await speaks(generation)
        yield speaking
        assert len(generation.upstream.calls) == 1, "nobody who waited has called a model"


async def test_who_waits_for_a_share_of_the_room_is_cancelled_at_once(
    generation: Generation, full: ChatRequested
) -> None:
    waiting = await generation.admit(SLOW, conversation="c2")
    cancel = StreamCancel(request=waiting.request, tenant=full.tenant, conversation=waiting.conversation, by="test")
    await generation.write(CHAT_STREAM, "c2", cancel)
    assert await outcome(generation, waiting) == "cancelled"


async def test_who_was_cancelled_before_it_came_to_wait_for_a_share_ends_at_once(
    generation: Generation, full: ChatRequested
) -> None:
    waiting = generation.request(SLOW, conversation="c2")
    cancel = StreamCancel(request=waiting.request, tenant=full.tenant, conversation=waiting.conversation, by="test")
    await generation.write(CHAT_STREAM, "c2", cancel)
    await generation.write_admission(waiting)
    assert await outcome(generation, waiting) == "cancelled"


@pytest.mark.parametrize("left_ms", [-1000, 300])
async def test_who_waits_for_a_share_of_the_room_expires_at_its_deadline(
    generation: Generation, full: ChatRequested, left_ms: int
) -> None:
    deadline_ms = int(time.time() * 1000) + left_ms
    waiting = await generation.admit(SLOW, conversation="c2", tenant=full.tenant, deadline_ms=deadline_ms)
    assert await outcome(generation, waiting) == "expired"


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("conversation", ["c1", "c2"], ids=["where one speaks", "where one waits for a share"])
async def test_who_is_not_to_wait_is_refused_at_once_while_there_is_no_share_for_it(
    generation: Generation, conversation: str
) -> None:
    await generation.admit(SLOW, conversation="c2")
    request = await generation.admit(SLOW, conversation=conversation, if_busy="reject")
    assert await outcome(generation, request) == "rejected"


@pytest.mark.usefixtures("full")
async def test_who_interrupts_cancels_those_that_wait_for_a_share_at_once(generation: Generation) -> None:
    waiting = await generation.admit(SLOW, conversation="c2")
    await generation.admit(SLOW, conversation="c2", if_busy="interrupt")
    assert await outcome(generation, waiting) == "cancelled"


async def test_what_waits_for_its_turn_takes_no_share_of_the_room(generation: Generation) -> None:
    generation.max_in_flight = 4
    async with generation.worker(drain_s=0.1):
        await speaks(generation)
        for _ in range(5):
            await generation.admit(SLOW)
        elsewhere = await generation.admit("fake?text=elsewhere", conversation="c2")
        assert await outcome(generation, elsewhere) == "completed"


async def test_what_waits_for_a_share_is_left_to_the_next_owner(generation: Generation) -> None:
    generation.max_in_flight = 2
    async with generation.worker(drain_s=0.1):
        await speaks(generation)
        waiting = await generation.admit("fake?text=later", conversation="c2")
    assert await generation.held(CHAT_REQUESTS) == []
    generation.max_in_flight = 4
    async with generation.worker(drain_s=0.1):
        assert await outcome(generation, waiting) == "completed"
