"""What an operator changes by the command line is in force in running workers within a second, without a restart.

Clients ask all the while; how long it took counts from the change's own record in the log to the first answer that
shows it, the whole of a request included, and is printed. A machine that is busy with other tests gets 15 seconds:
what needed a restart would never be in force.
"""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import time
from typing import TYPE_CHECKING

import pytest

from klatch_schemas.codec import KIND
from klatch_schemas.events import QuotaLimitSet
from klatch_schemas.records import Record
from klatch_schemas.topics import CHAT_REQUESTS, MODELS, Topic
from klatch_workers import leash

if TYPE_CHECKING:
    from tests.broker.conftest import Stack

pytestmark = pytest.mark.broker

WITHIN_S = 15.0
ALIAS = "fake?text=by-default"


async def klatch(stack: "Stack", *arguments: str) -> None:
    """Run a command beside the running `klatch up`; it must succeed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("KLATCH_")}
    argv = [sys.executable, "-m", "klatch_workers", *arguments]
    process = await leash.spawn(argv, env={**ours, "KLATCH_DATA": str(stack.up.data)}, stderr=PIPE)
    _, why = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, why


async def until(told: Callable[[], Awaitable[bool]]) -> float:
    """When the first answer has come that tells of the change, in seconds since the epoch."""
    while not await told():
        pass
    return time()


async def in_force(
    stack: "Stack", command: tuple[str, ...], told: Callable[[], Awaitable[bool]], stands: "Stands"
) -> None:
    """The command's change is told by an answer in time, and not before the command was given."""
    assert not await told()
    asking = asyncio.create_task(until(told))
    try:
        await klatch(stack, *command)
        async with asyncio.timeout(WITHIN_S):
            seen = await asking
    finally:
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
    took = seen - (await stands.newest(stack)).timestamp_ms / 1_000
    print(f"in force after {took * 1_000:.0f} ms: klatch {' '.join(command)}")  # noqa: T201 - a measurement


class Stands:
    """Where a change stands."""

    def __init__(self, topic: Topic, wanted: Callable[[Record], bool]) -> None:
        self._topic = topic
        self._wanted = wanted

    async def newest(self, stack: "Stack") -> Record:
        """The record of the last change."""
        return [record for record in await stack.records(self._topic) if self._wanted(record)][-1]


def _sets_limits(record: Record) -> bool:
    return record.key == b"changed" and record.header(KIND) == QuotaLimitSet.KIND.encode()


ROUTE = Stands(MODELS, lambda record: record.key == ALIAS.encode())
LIMITS = Stands(CHAT_REQUESTS, _sets_limits)


async def test_a_route_that_is_set_serves_and_one_that_is_removed_does_not(stack: "Stack") -> None:
    async def by_deployment(name: str) -> bool:
        async with stack.ask(ALIAS) as answer:
            text = await answer.text()
        assert answer.headers["x-klatch-deployment"] in {"default", "other"}
        assert ("away" in text) == (answer.headers["x-klatch-deployment"] == "other")
        return answer.headers["x-klatch-deployment"] == name

    options = ("--url", stack.upstream.url, "--model", "fake?text=away", "--name", "other")
    await in_force(stack, ("models", "set", ALIAS, *options), lambda: by_deployment("other"), ROUTE)
    await in_force(stack, ("models", "remove", ALIAS), lambda: by_deployment("default"), ROUTE)


@pytest.mark.parametrize("scope", [(), ("--person", "ann"), ("--model", "fake?tokens=1")])
async def test_a_limit_that_is_set_refuses_and_one_that_is_taken_away_does_not(
    stack: "Stack", scope: tuple[str, ...]
) -> None:
    async def status_is(status: int) -> bool:
        async with stack.ask("fake?tokens=1", tenant="changed", person="ann") as answer:
            await answer.read()
        assert answer.status in {200, 429}
        return answer.status == status

    quota = ("quota", "set", "changed", *scope, "--tokens-per-day")
    await in_force(stack, (*quota, "1"), lambda: status_is(429), LIMITS)
    await in_force(stack, (*quota, "none"), lambda: status_is(200), LIMITS)
