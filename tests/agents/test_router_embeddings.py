"""Embeddings go the way of replies: the same deployments, the same breaker, the same time-outs."""

import asyncio
import json
import time
from dataclasses import replace

import pytest
from tests.agents.conftest import World, answering

from klatch_agents.gateway.errors import ExpiredError, MalformedError, ModelError, StreamError
from klatch_agents.gateway.port import ModelCall
from klatch_agents.gateway.router import Router
from klatch_schemas.events import CircuitBreaker, Deployment, RouteTimeouts


async def test_embeddings_take_the_same_way(world: World) -> None:
    world.route(world.on_a("status=500"), world.on_b("", model="embedder"))
    embedded = await world.router.embed(ModelCall({"model": "m", "input": "hello"}))
    assert json.loads(embedded.answer)["data"][0]["embedding"]
    assert embedded.deployment == "b"
    assert world.b.calls[-1].body == {"model": "embedder", "input": "hello"}


async def test_an_embedding_waits_as_long_as_its_route_says(world: World) -> None:
    world.route(
        world.on_a("header_delay=30"), world.on_b("", model="embedder"), timeouts=RouteTimeouts(first_token_s=0.2)
    )
    async with asyncio.timeout(20):
        embedded = await world.router.embed(embedding())
    assert embedded.deployment == "b"


def embedding(**fake: object) -> ModelCall:
    """A call for an embedding; `fake` says how the server fails."""
    return ModelCall({"model": "m", "input": "hello"} | ({"x-fake": fake} if fake else {}))


async def fails(router: Router, **fake: object) -> None:
    with pytest.raises(ModelError):
        await router.embed(embedding(**fake))


async def test_an_embedding_ends_the_failures_in_a_row(world: World) -> None:
    world.route(world.on_a(), tries=1, breaker=CircuitBreaker(failures=2, cool_down_s=60))
    for _ in range(3):
        await fails(world.router, status=500)
        await world.router.embed(embedding())
    assert len(world.a.calls) == 6


async def test_an_embedding_that_probes_closes_the_breaker(world: World) -> None:
    world.route(world.on_a(), tries=1, breaker=CircuitBreaker(failures=2, cool_down_s=10))
    await fails(world.router, status=500)
    await fails(world.router, status=500)
    world.clock.at += 10
    await world.router.embed(embedding())
    await fails(world.router, status=500)
    together = [world.router.embed(embedding()) for _ in range(3)]
    assert [one.deployment for one in await asyncio.gather(*together)] == ["a"] * 3
    assert world.clock.naps == [], "none waits while another probes"


async def test_who_is_asked_for_an_embedding_is_said_on_the_connection_to_it(world: World) -> None:
    world.route(world.on_a())
    asked = list[tuple[str, int]]()

    async def before_send(deployment: str) -> None:
        asked.append((deployment, len(world.a.calls) + len(world.b.calls)))

    embedded = await world.router.embed(replace(embedding(), before_send=before_send))
    assert (asked, embedded.deployment) == ([("a", 0)], "a")


async def test_each_try_of_an_embedding_that_came_to_nothing_is_told_before_the_next(world: World) -> None:
    world.route(world.on_a("status=500"), world.on_b("status=503"), tries=2)
    told = list[tuple[int | None, int]]()

    def failed(error: ModelError) -> None:
        told.append((error.status, len(world.b.calls)))

    with pytest.raises(ModelError):
        await world.router.embed(replace(embedding(), failed=failed))
    assert told == [(500, 0), (503, 1)]


async def test_an_embedding_that_waits_for_a_place_ends_at_its_deadline(world: World) -> None:
    world.route(world.on_a(concurrency=1))
    holding = asyncio.create_task(world.router.embed(embedding(header_delay=30)))
    await world.a.changed(lambda: len(world.a.calls) == 1)
    with pytest.raises(ExpiredError):
        await world.router.embed(replace(embedding(), deadline=time.time() + 0.1))
    holding.cancel()
    await asyncio.wait([holding])
    assert len(world.a.calls) == 1


IN_DISGUISE = pytest.mark.parametrize(
    ("said", "kind", "failure"),
    [
        (b'{"error": "Unexpected endpoint or method. (POST /v1/embeddings)"}', "application/json", StreamError),
        (b'{"data": [{"embedding": [1.0]}], "error": {"message": "half of it"}}', "application/json", StreamError),
        (b"<html>Welcome to nginx!</html>", "text/html", MalformedError),
        (b'{"object": "list"}', "application/json", MalformedError),
        (b'{"data": null}', "application/json", MalformedError),
    ],
    ids=["error", "error-beside", "page", "no-list", "null"],
)


@IN_DISGUISE
async def test_a_200_that_is_no_list_of_embeddings_is_a_failure_that_the_next_answers(
    world: World, said: bytes, kind: str, failure: type[ModelError]
) -> None:
    async with answering(lambda at, _: at.respond(200, said, {"content-type": kind})) as url:
        odd = Deployment(name="odd", url=url)
        world.route(odd, world.on_b())
        assert (await world.router.embed(embedding())).deployment == "b"
        world.route(odd, tries=1)
        with pytest.raises(failure) as failed:
            await world.router.embed(embedding())
    assert failed.value.status == 502
    assert "event stream" not in failed.value.message


async def test_a_200_that_is_an_error_opens_the_breaker(world: World) -> None:
    async with answering(lambda at, _: at.respond(200, b'{"error": "no such model"}')) as url:
        odd = Deployment(name="odd", url=url)
        world.route(odd, tries=1, breaker=CircuitBreaker(failures=2, cool_down_s=60))
        for code in ("model_stream_error", "model_stream_error", "model_unavailable"):
            with pytest.raises(ModelError) as failed:
                await world.router.embed(embedding())
            assert failed.value.code == code


@pytest.mark.parametrize("beside", [{}, {"error": None}, {"x-vendor": {"a": [1]}}])
async def test_a_list_of_embeddings_is_passed_on_as_it_came(world: World, beside: dict[str, object]) -> None:
    said = json.dumps({"data": [{"embedding": "AACAPw=="}], **beside}, indent=3).encode()
    async with answering(lambda at, _: at.respond(200, said)) as url:
        world.route(Deployment(name="odd", url=url))
        assert (await world.router.embed(embedding())).answer == said
