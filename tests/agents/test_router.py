"""The router against real servers that fail as told: what is tried, what is seen of it, and what is freed again."""

import asyncio

import pytest
from structlog.testing import capture_logs
from tests.agents.conftest import Book, World, answering, ask, call, routed

from klatch_agents.gateway.errors import (
    ConnectError,
    ExpiredError,
    ModelError,
    RefusedError,
    StalledError,
    TruncatedError,
    UnroutableError,
)
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_agents.gateway.router import LISTING_S, Router, listing_of
from klatch_agents.testing.upstream import Upstream
from klatch_schemas.events import CircuitBreaker, Deployment, ModelRouted, RouteTimeouts

NOWHERE = "http://127.0.0.1:9/v1"
"""The discard port: nobody listens."""


@pytest.mark.parametrize(
    "script",
    [
        "status=500",
        "status=429",
        "status=401",
        "fault=drop&fault_after=0",
        "fault=error-event&fault_after=0",
        "garbage",
    ],
)
async def test_what_fails_before_its_first_token_is_answered_by_the_next_and_nobody_sees_it(
    world: World, script: str
) -> None:
    """[38]"""
    script = "fault=garbage&fault_after=0" if script == "garbage" else script
    world.route(world.on_a(script), world.on_b())
    assert await ask(world.router) == ("b", "from b")
    assert [one.outcome for one in world.a.calls] != ["open"]


async def test_a_server_that_is_not_there_is_passed_over(world: World) -> None:
    world.route(Deployment(name="dead", url=NOWHERE), world.on_b())
    assert await ask(world.router) == ("b", "from b")


async def test_once_a_token_was_seen_a_failure_is_the_replys_own(world: World) -> None:
    """[35, 38]"""
    world.route(world.on_a("tokens=20&fault=drop&fault_after=5"), world.on_b())
    with pytest.raises(TruncatedError) as broken:
        await ask(world.router)
    assert broken.value.spoke
    assert not world.b.calls


async def test_a_filtered_prompt_goes_to_nobody_else(world: World) -> None:
    """[32]"""
    world.route(world.on_a("prompt_filtered=true"), world.on_b())
    with pytest.raises(RefusedError) as refused:
        await ask(world.router)
    assert (refused.value.status, refused.value.code) == (400, "content_filter")
    assert not world.b.calls


async def test_the_last_failure_is_told_when_all_fail(world: World) -> None:
    world.route(world.on_a("status=503"), world.on_b("status=502"), tries=2)
    with pytest.raises(RefusedError) as refused:
        await ask(world.router)
    assert refused.value.status == 502


async def test_a_lone_server_is_tried_again_after_a_pause(world: World) -> None:
    world.route(world.on_a("status=500"))
    with pytest.raises(RefusedError):
        await ask(world.router)
    assert len(world.a.calls) == 3
    assert world.clock.naps == sorted(world.clock.naps)
    assert len(world.clock.naps) == 2


async def test_retry_after_holds_for_every_request(world: World) -> None:
    world.route(world.on_a("status=429&retry_after=5"), world.on_b())
    await ask(world.router)
    await ask(world.router)
    assert len(world.a.calls) == 1
    world.clock.at += 5
    await ask(world.router)
    assert len(world.a.calls) == 2


async def test_failures_in_a_row_open_the_breaker_and_one_probe_closes_it(world: World) -> None:
    world.route(world.on_a("status=500"), world.on_b(), breaker=CircuitBreaker(failures=2, cool_down_s=10))
    for _ in range(4):
        await ask(world.router)
    assert len(world.a.calls) == 2
    world.clock.at += 10
    world.route(world.on_a("text=well again"), world.on_b(), breaker=CircuitBreaker(failures=2, cool_down_s=10))
    assert await ask(world.router) == ("a", "well again")
    assert await ask(world.router) == ("a", "well again")


async def test_breaks_in_mid_stream_open_the_breaker_too(world: World) -> None:
    world.route(
        world.on_a("tokens=9&fault=drop&fault_after=3"),
        world.on_b(),
        breaker=CircuitBreaker(failures=2, cool_down_s=10),
    )
    for _ in range(2):
        with pytest.raises(TruncatedError):
            await ask(world.router)
    assert (await ask(world.router))[0] == "b"


async def test_a_caller_who_leaves_while_it_probes_lets_another_probe(world: World) -> None:
    world.route(world.on_a("status=500"), tries=1, breaker=CircuitBreaker(failures=1, cool_down_s=10))
    with pytest.raises(RefusedError):
        await ask(world.router)
    world.clock.at += 10
    world.route(world.on_a("first_delay=30"), tries=1)
    probing = asyncio.create_task(ask(world.router))
    await world.a.changed(lambda: len(world.a.calls) == 2)
    probing.cancel()
    await asyncio.wait([probing])
    await world.a.changed(lambda: world.a.calls[1].outcome == "left")
    world.route(world.on_a("text=well again"), tries=1)
    assert await ask(world.router) == ("a", "well again")


async def test_when_everything_cools_down_for_long_it_is_said_at_once_with_the_time_to_come_back(world: World) -> None:
    world.route(world.on_a("status=500"), tries=1, breaker=CircuitBreaker(failures=1, cool_down_s=60))
    with pytest.raises(RefusedError):
        await ask(world.router)
    with pytest.raises(UnroutableError) as refused:
        await ask(world.router)
    assert (refused.value.status, refused.value.retriable, refused.value.retry_after) == (503, True, 60)
    assert world.clock.naps == []


async def test_a_model_without_a_route_goes_to_the_default_under_its_own_name(world: World) -> None:
    default = ModelRouted(alias="*", deployments=(Deployment(name="default", url=world.b.url),))
    async with routed(world.a, world.b, default) as made:
        assert (await ask(made.router, call("fake?text=plain")))[1] == "plain"
        assert made.b.calls[-1].body["model"] == "fake?text=plain"


async def test_without_a_default_a_model_without_a_route_is_not_found(world: World) -> None:
    with pytest.raises(UnroutableError) as unknown:
        await ask(world.router, call("nobody"))
    assert (unknown.value.status, unknown.value.code) == (404, "model_not_found")


async def test_a_route_that_changes_is_in_force_for_the_next_call_and_the_present_one_ends_where_it_began(
    world: World,
) -> None:
    world.route(world.on_a("tokens=30&rate=200"))
    async with world.router.stream(call()) as reply:
        batches = aiter(reply)
        await anext(batches)
        world.route(world.on_b())
        assert await ask(world.router) == ("b", "from b")
        async for _ in batches:
            pass
    assert reply.finished is not None
    assert reply.deployment == "a"


async def test_places_are_freed_however_a_call_ends(world: World) -> None:
    """[41]"""
    world.route(world.on_a("tokens=1000&rate=100", concurrency=1), tries=1)
    async with world.router.stream(call()) as reply:
        await anext(aiter(reply))
    waiting = asyncio.create_task(ask(world.router))
    await world.a.changed(lambda: len(world.a.calls) == 2)
    second = asyncio.create_task(ask(world.router))
    await asyncio.sleep(0)
    second.cancel()
    waiting.cancel()
    await asyncio.wait([waiting, second])
    world.route(world.on_a("text=free", concurrency=1))
    async with asyncio.timeout(5):
        assert await ask(world.router) == ("a", "free")
    assert len(world.a.calls) == 3, "who waited for a place made no call"


async def test_no_more_calls_are_under_way_than_there_are_places(world: World) -> None:
    world.route(world.on_a("tokens=3&rate=50", concurrency=2))
    asking = [asyncio.create_task(ask(world.router)) for _ in range(6)]
    most = 0
    while not all(task.done() for task in asking):
        most = max(most, sum(one.outcome == "open" for one in world.a.calls))
        await asyncio.wait(asking, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result()[0] for task in asking] == ["a"] * 6
    assert most == 2


async def test_a_tenant_that_floods_waits_behind_itself_and_not_before_others(world: World) -> None:
    world.route(world.on_a("tokens=2&rate=100", concurrency=2))
    flood = [asyncio.create_task(ask(world.router, call(tenant="flood"))) for _ in range(30)]
    await world.a.changed(lambda: len(world.a.calls) == 2)
    await ask(world.router, call(tenant="quiet"))
    assert sum(task.done() for task in flood) < 10
    await asyncio.gather(*flood)


async def test_work_whose_deadline_passes_while_it_waits_never_reaches_the_model(world: World) -> None:
    import time

    world.route(world.on_a("tokens=1000&rate=100", concurrency=1))
    async with world.router.stream(call()) as reply:
        await anext(aiter(reply))
        with pytest.raises(ExpiredError):
            await ask(world.router, call(deadline=time.time() + 0.1))
    assert len(world.a.calls) == 1


async def test_a_partial_answer_is_continued_by_one_that_can(world: World) -> None:
    """[38]"""
    world.route(world.on_a(), world.on_b("reply=echo-messages", kind="vllm"))
    assert world.router.continues(call())
    deployment, said = await ask(world.router, call(prefix="The quick"))
    assert deployment == "b"
    assert world.b.calls[-1].body["continue_final_message"] is True
    assert said


async def test_where_none_can_a_partial_answer_is_not_continued(world: World) -> None:
    world.route(world.on_a(), world.on_b())
    assert not world.router.continues(call())
    with pytest.raises(UnroutableError):
        await ask(world.router, call(prefix="The quick"))
    assert not world.a.calls


async def test_models_are_the_aliases_and_what_the_default_lists_if_it_can_be_asked(world: World) -> None:
    world.route(world.on_a())
    assert await world.router.models() == ["m"]
    default = ModelRouted(alias="*", deployments=(Deployment(name="default", url=world.b.url),))
    world.b.models = ["m", "own"]
    async with routed(world.a, world.b, default) as made:
        made.route(made.on_a())
        assert await made.router.models() == ["m", "own"]
    gone = ModelRouted(alias="*", deployments=(Deployment(name="default", url=NOWHERE),))
    async with routed(world.a, world.b, gone) as made:
        with pytest.raises(ConnectError):
            await made.router.models()
        made.route(made.on_a())
        assert await made.router.models() == ["m"]


async def test_a_default_that_is_silent_keeps_nobody_from_the_aliases(world: World) -> None:
    async with answering(lambda _at, _request: None) as url:
        silent = Deployment(name="default", url=url)
        default = ModelRouted(alias="*", deployments=(silent,), timeouts=RouteTimeouts(first_token_s=0.2))
        async with routed(world.a, world.b, default) as made, asyncio.timeout(20):
            with pytest.raises(StalledError):
                await made.router.models()
            made.route(made.on_a())
            assert await made.router.models() == ["m"]


@pytest.mark.parametrize(("route_s", "waited_s"), [(300.0, LISTING_S), (0.5, 0.5)])
def test_a_list_of_models_is_waited_for_no_longer_than_ten_seconds(route_s: float, waited_s: float) -> None:
    assert listing_of(RouteTimeouts(first_token_s=route_s)).first_token == waited_s <= 10


async def test_no_key_gets_into_a_log_line_an_error_or_a_repr() -> None:
    secret = "sk-of-the-router"  # noqa: S105 - of this test alone
    async with Upstream(key="sk-another") as upstream:
        book = Book({"m": ModelRouted(alias="m", deployments=(Deployment(name="a", url=upstream.url, key="named"),))})

        def open_with_key(one: Deployment) -> OpenAICompatible:
            return OpenAICompatible(Endpoint(one.url, key=secret))

        async with Router(book, open_with_key) as router:
            with capture_logs() as logged, pytest.raises(RefusedError) as refused:
                await ask(router)
            assert logged
            assert secret not in f"{logged}{refused.value!r}{refused.value.body}{vars(router)}{book}"


async def test_a_deployment_that_cannot_be_opened_fails_with_the_fix_and_falls_over(world: World) -> None:
    world.route(Deployment(name="odd", url="not a url"))
    with pytest.raises(ModelError, match="odd: a model server's URL"):
        await ask(world.router)
    world.route(Deployment(name="odd", url="not a url"), world.on_b())
    assert (await ask(world.router))[0] == "b"
