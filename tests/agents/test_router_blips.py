"""A server that is ill for a moment, and a queue before it: on a clock of its own, with the breaker's own terms."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.agents.conftest import Book, ask, call
from tests.streams.test_batches_clocked import clocked

from klatch_agents.gateway.errors import ConnectError, UnroutableError
from klatch_agents.gateway.port import Chunk, Finished, ModelCall, Timeouts
from klatch_agents.gateway.router import Router
from klatch_schemas.events import CircuitBreaker, Deployment, ModelRouted

MANY = 100


class Reply:
    """A word, some time after the call."""

    model, deployment, upstream_request_id = "m", "", None
    finished: Finished | None = None

    def __init__(self, takes_s: float) -> None:
        self._takes_s = takes_s

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        await asyncio.sleep(self._takes_s)  # the clock jumps
        self.finished = Finished({0: "stop"}, None, "done")
        yield [Chunk(json.dumps({"choices": [{"delta": {"content": "well"}}]}).encode(), speaks=True, choices=(0,))]


class Server:
    """Takes no connection until it is well."""

    def __init__(self, takes_s: float = 0.2) -> None:
        self.takes_s = takes_s
        self.well_at = 0.0
        self.served = list[str]()
        """The tenants, in the order of their calls."""
        self.failures = 0

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[Reply]:
        await self._connect()
        self.served.append(call.tenant)
        yield Reply(self.takes_s)

    async def embed(
        self,
        body: Mapping[str, object],
        timeouts: Timeouts | None = None,  # noqa: ARG002 - the port's
        before_send: Callable[[], Awaitable[None]] | None = None,  # noqa: ARG002 - the port's
    ) -> bytes:
        await self._connect()
        self.served.append(str(body.get("user")))
        await asyncio.sleep(self.takes_s)  # the clock jumps
        return b"{}"

    async def models(self, timeouts: Timeouts | None = None) -> list[str]:  # noqa: ARG002 - the port's
        return ["m"]

    def continues(self, call: ModelCall) -> bool:  # noqa: ARG002 - the port's
        return False

    async def close(self) -> None:
        pass

    async def _connect(self) -> None:
        await asyncio.sleep(0.05)  # the clock jumps
        if asyncio.get_running_loop().time() < self.well_at:
            self.failures += 1
            raise ConnectError("refused")


def router(server: Server, places: int, **terms: Any) -> Router:
    deployment = Deployment(name="a", url="http://a/v1", concurrency=places)
    routed = ModelRouted(alias="m", deployments=(deployment,), **terms)
    now = asyncio.get_running_loop().time
    return Router(Book({"m": routed}), lambda _: server, now=now, wall=now)


async def streamed(at: Router, tenant: str = "t") -> None:
    await ask(at, call(tenant=tenant))


async def embedded(at: Router, tenant: str = "t") -> None:
    await at.embed(ModelCall({"model": "m", "user": tenant}, tenant=tenant))


BOTH = pytest.mark.parametrize("asking", [streamed, embedded], ids=["stream", "embedding"])


@BOTH
@pytest.mark.parametrize("takes_s", [0.2, 5.0])
def test_a_blip_refuses_nobody_of_a_queue(asking: Any, takes_s: float) -> None:
    """Not those who failed and look at a probe with no patience left, nor those who waited for a place meanwhile."""

    async def story() -> None:
        server = Server(takes_s)
        at = router(server, places=8)
        server.well_at = asyncio.get_running_loop().time() + 0.3
        await asyncio.gather(*(asking(at) for _ in range(MANY)))
        assert (len(server.served), server.failures) == (MANY, 8)

    clocked(story())


@BOTH
def test_where_the_probe_fails_too_all_are_told_at_once_when_to_come_back(asking: Any) -> None:
    async def story() -> None:
        server = Server()
        at = router(server, places=8)
        now = asyncio.get_running_loop().time
        began, server.well_at = now(), now() + 15
        ended = await asyncio.gather(*(asking(at) for _ in range(MANY)), return_exceptions=True)
        uncalled = [one for one in ended if isinstance(one, UnroutableError)]
        assert len(uncalled) + sum(isinstance(one, ConnectError) for one in ended) == MANY
        assert len(uncalled) >= MANY - 9
        assert all(18 < (one.retry_after or 0) <= 20 for one in uncalled)
        assert now() - began < 12.5, "the cool-down, and a look or two"
        assert server.failures == 9, "eight at once, and the probe"

    clocked(story())


@BOTH
def test_a_place_in_which_a_call_was_made_is_paid_for(asking: Any) -> None:
    async def story() -> None:
        server = Server()
        at = router(server, places=1)
        flood = [asyncio.create_task(asking(at, "flood")) for _ in range(20)]
        await asyncio.sleep(1)  # the clock jumps; most of the flood waits by then
        await asking(at, "quiet")
        assert server.served.index("quiet") < 10
        await asyncio.gather(*flood)

    clocked(story())


@BOTH
def test_places_that_were_had_in_vain_make_no_call_seem_short(asking: Any) -> None:
    """`light` has used less than `busy`, which is remembered for as long as a few calls take."""

    async def story() -> None:
        server = Server(takes_s=20.0)
        at = router(server, places=1, breaker=CircuitBreaker(failures=1, cool_down_s=5))
        for tenant in ("light", "busy", "busy", "busy", "busy"):
            await asking(at, tenant)
        server.well_at = asyncio.get_running_loop().time() + 1
        waiting = [asyncio.create_task(asking(at, f"t{number}")) for number in range(MANY)]
        await asyncio.sleep(1)  # the clock jumps: the first has failed, and the others have had the place in vain
        assert server.failures == 1
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)
        await asyncio.sleep(5)  # the cool-down; the clock jumps
        await asking(at, "probe")
        await asyncio.gather(asking(at, "first"), asking(at, "busy"), asking(at, "light"))
        assert server.served[-3:] == ["first", "light", "busy"]

    clocked(story())
