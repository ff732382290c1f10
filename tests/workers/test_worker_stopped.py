"""A worker that is told to stop ends by itself, also while Kafka is away; what is no outage is not covered up."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from klatch_streams.kafka.wire import Unreachable
from klatch_workers.cli.worker import run_until
from klatch_workers.settings import Settings
from klatch_workers.wiring import Begin


def nobody(name: str, _: dict[str, Any]) -> None:
    pytest.fail(f"{name} has no Kafka")


def failing(error: Exception, before: Callable[[], None]) -> Begin:
    """A stage's beginning that fails, after something has come to pass."""

    async def begin() -> Settings:
        before()
        raise error

    return begin


@pytest.mark.parametrize("once", [False, True])
async def test_a_stage_that_finds_no_kafka_after_it_was_told_to_stop_ends_without_an_error(once: bool) -> None:
    stop = asyncio.Event()
    await run_until(stop, ["admission"], failing(Unreachable("no Kafka"), stop.set), nobody, 0, once=once)


async def test_a_stage_that_rests_between_two_tries_begins_no_third_after_it_was_told_to_stop() -> None:
    stop, begun = asyncio.Event(), list[None]()

    def before() -> None:
        begun.append(None)
        asyncio.get_running_loop().call_soon(stop.set)

    await run_until(stop, ["admission"], failing(Unreachable("no Kafka"), before), nobody, 0, once=False)
    assert len(begun) == 1


@pytest.mark.parametrize("error", [Unreachable("no Kafka"), RuntimeError("a bug")])
async def test_a_failure_that_no_stop_came_before_is_raised_where_it_is_not_tried_again(error: Exception) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await run_until(asyncio.Event(), ["admission"], failing(error, lambda: None), nobody, 0, once=True)
    assert raised.value.exceptions == (error,)


async def test_a_bug_that_shows_while_a_stage_stops_is_raised() -> None:
    stop = asyncio.Event()
    with pytest.raises(ExceptionGroup):
        await run_until(stop, ["admission"], failing(RuntimeError("a bug"), stop.set), nobody, 0, once=False)
