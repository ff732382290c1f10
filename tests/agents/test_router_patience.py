"""How long a route waits: for a connection, a first token, the next event, and before it tries again.

Servers and sockets are real; only the pauses between tries pass on the test's clock.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.agents.conftest import World, ask, call, open_server, routed, text_in

from klatch_agents.gateway.errors import ConnectError, RefusedError, StalledError
from klatch_agents.gateway.router import Router
from klatch_agents.gateway.routing import BACK_OFF_S
from klatch_schemas.events import Deployment, RouteTimeouts

PATIENT = 9
"""Tries: on a busy machine the second server may be too slow as well."""


@pytest.fixture
def deaf() -> Iterator[str]:
    """The URL of a server that takes no connection: nobody accepts, and there is no room left to wait in."""
    with ExitStack() as sockets:
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        while _has_room(server, sockets):
            pass
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def _has_room(server: socket.socket, sockets: ExitStack) -> bool:
    waiting = sockets.enter_context(socket.socket())
    waiting.settimeout(0.2)
    try:
        waiting.connect(server.getsockname())
    except TimeoutError:
        return False
    return True


async def test_a_server_that_takes_no_connection_is_passed_over(world: World, deaf: str) -> None:
    world.route(Deployment(name="deaf", url=deaf), world.on_b(), tries=PATIENT, timeouts=RouteTimeouts(connect_s=0.2))
    assert await ask(world.router) == ("b", "from b")


async def test_who_waits_for_a_connection_alone_is_told_how_long_it_was_waited_for(world: World, deaf: str) -> None:
    world.route(Deployment(name="deaf", url=deaf), tries=1, timeouts=RouteTimeouts(connect_s=0.2))
    with pytest.raises(ConnectError, match=r"no connection to the model server at .* within 0\.2 s") as failed:
        await ask(world.router)
    assert (failed.value.code, failed.value.retriable, failed.value.spoke) == ("model_unreachable", True, False)


SILENT = pytest.mark.parametrize(
    "script", ["header_delay=30", "first_delay=30", "fault=stall&fault_after=0"], ids=["headers", "event", "word"]
)
"""No status line; no event behind it; a role, and no word behind that."""


@SILENT
async def test_a_silence_before_the_first_token_is_answered_by_the_next_and_the_call_is_hung_up(
    world: World, script: str
) -> None:
    """[38]"""
    world.route(world.on_a(script), world.on_b(), tries=PATIENT, timeouts=RouteTimeouts(first_token_s=0.5))
    assert await ask(world.router) == ("b", "from b")
    await world.a.changed(lambda: world.a.calls[0].outcome == "left")


@SILENT
async def test_where_all_are_silent_each_try_waits_for_its_first_token_and_the_last_is_told(
    world: World, script: str
) -> None:
    world.route(world.on_a(script), tries=2, timeouts=RouteTimeouts(first_token_s=0.5))
    with pytest.raises(StalledError, match=r"(did not answer within|was silent for) 0\.5 s") as stalled:
        await ask(world.router)
    assert (stalled.value.code, stalled.value.retriable, stalled.value.spoke) == ("model_stalled", True, False)
    await world.a.changed(lambda: {one.outcome for one in world.a.calls} == {"left"})


async def test_a_silence_between_two_events_ends_the_reply_and_is_tried_nowhere_else(world: World) -> None:
    """[37, 38]"""
    timeouts = RouteTimeouts(first_token_s=30, idle_s=0.5)
    world.route(world.on_a("tokens=8&fault=stall&fault_after=3"), world.on_b(), timeouts=timeouts)
    heard = list[str]()

    async def hear() -> None:
        async with world.router.stream(call()) as reply:
            async for batch in reply:
                heard.append(text_in(batch))

    with pytest.raises(StalledError, match=r"was silent for 0\.5 s") as stalled:
        await hear()
    assert "".join(heard) == "The quick brown ", "what was said stands"
    assert (stalled.value.code, stalled.value.spoke) == ("model_stalled", True)
    await world.a.changed(lambda: [one.outcome for one in world.a.calls] == ["left"])
    assert not world.b.calls


# --- pauses


async def test_requests_that_failed_together_do_not_come_back_together(world: World) -> None:
    """By the router's own chance."""
    world.route(world.on_a("status=500"), tries=2)
    async with Router(world.book, open_server, now=world.clock.now, sleep=world.clock.sleep) as router:
        for _ in range(2):
            with pytest.raises(RefusedError):
                await ask(router)
    first, second = world.clock.naps
    assert first != second
    assert all(BACK_OFF_S / 2 <= pause <= BACK_OFF_S for pause in (first, second))


@pytest.mark.parametrize("chance", [0.0, 0.37, 1.0])
async def test_retry_after_is_the_least_pause_whatever_chance_adds_to_it(world: World, chance: float) -> None:
    async with routed(world.a, world.b, jitter=lambda: chance) as made:
        made.route(made.on_a("status=429&retry_after=2"))
        with pytest.raises(RefusedError):
            await ask(made.router)
    first, second = made.clock.naps
    assert first == pytest.approx(2.0 + BACK_OFF_S * (1 + chance) / 2)
    assert second == pytest.approx(2.0 + BACK_OFF_S * (1 + chance))
