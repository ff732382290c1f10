"""Routes of the ledger in a running worker: in force within a second, and said in what it writes."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import Deployment, ModelRouted
from klatch_schemas.topics import MODELS, Namespace
from klatch_streams.ledger import publish


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


async def route(generation: Any, alias: str, *deployments: Deployment) -> None:
    routed = ModelRouted(alias=alias, deployments=deployments) if deployments else None
    await publish(generation.log, MODELS, alias, routed, Namespace())


async def answered(generation: Any, model: str) -> Assembly:
    ended: Assembly = await generation.ended(await generation.admit(model))
    return ended


async def test_a_change_of_a_route_is_in_force_in_a_running_worker_within_a_second(
    generation: Any, other: Upstream
) -> None:
    async with generation.worker():
        assert (await answered(generation, "fake?text=by default")).state.status == "completed"
        await route(generation, "m", Deployment(name="other", url=other.url, model="fake?text=routed"))
        async with asyncio.timeout(1):
            while not other.calls:
                await answered(generation, "m")
        await route(generation, "m")
        before = len(other.calls)
        async with asyncio.timeout(1):
            while len(other.calls) > before:
                before = len(other.calls)
                await answered(generation, "m")
