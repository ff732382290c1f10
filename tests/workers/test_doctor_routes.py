"""What the doctor finds about routes: what there is, the keys that are missing, and which deployments answer."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from tests.agents.conftest import answering

from klatch_agents.testing.upstream import Upstream
from klatch_agents.testing.upstream.http import Connection, Request
from klatch_schemas.events import Deployment, ModelRouted, RouteTimeouts
from klatch_schemas.topics import Namespace
from klatch_workers.doctor.findings import Endpoint, Finding, Setup
from klatch_workers.doctor.routes import routes
from klatch_workers.model_trial import trials
from klatch_workers.settings import Settings

NOWHERE = Endpoint(None)


@pytest_asyncio.fixture
async def upstream() -> AsyncGenerator[Upstream]:
    async with Upstream() as serving:
        yield serving


async def found(*routed: ModelRouted, keys_file: Path | None = None) -> list[Finding]:
    setup = Setup(
        settings=Settings(keys_file=keys_file),
        environment={},
        data=Path(),
        pids={},
        bootstrap="",
        own_kafka=False,
        namespace=Namespace(),
        door=NOWHERE,
        model=NOWHERE,
        memory=NOWHERE,
        views=NOWHERE,
    )
    return [one async for one in routes(setup, routed)]


def levels(findings: list[Finding], check: str) -> list[str]:
    return [one.level for one in findings if one.check == check]


async def test_routes_are_named_with_their_deployments_in_order_and_each_is_asked(upstream: Upstream) -> None:
    own = Deployment(name="own", url=upstream.url, model="fake", tier=1)
    gone = Deployment(name="gone", url="http://127.0.0.1:9/v1")
    said = await found(ModelRouted(alias="m", deployments=(own, gone)))
    assert said[0].says == "1 of models: m → gone, own"
    first, second = [one for one in said if one.check == "deployment"]
    assert (first.level, second.level) == ("warning", "ok"), "what the other is there for"
    assert first.says.startswith("m → gone fails")
    assert second.says.startswith("m → own answers with words")


async def test_a_model_that_nobody_answers_for_is_a_problem() -> None:
    gone = Deployment(name="gone", url="http://127.0.0.1:9/v1")
    said = await found(ModelRouted(alias="m", deployments=(gone,)))
    assert levels(said, "deployment") == ["problem"]
    assert all(one.fix for one in said if one.level != "ok")


async def test_keys_that_the_file_lacks_are_named_and_their_deployments_not_asked(
    upstream: Upstream, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[keys]\nopenai = "sk-secret"\n')
    there = Deployment(name="there", url=upstream.url, model="fake", key="openai")
    lacking = Deployment(name="lacking", url=upstream.url, model="fake", key="azure-east")
    routed = ModelRouted(alias="m", deployments=(there, lacking))
    said = await found(routed, keys_file=file)
    [keys] = [one for one in said if one.check == "keys"]
    assert (keys.level, keys.says) == ("problem", f"{file} lacks keys that routes name: azure-east")
    assert [one.says.split(" answers")[0] for one in said if one.check == "deployment"] == ["m → there"]
    assert len(upstream.calls) == 1
    assert not any("sk-secret" in one.says + one.fix for one in said)
    file.write_text('[keys]\nopenai = "sk-secret"\nazure-east = "sk-other"\n')
    assert levels(await found(routed, keys_file=file), "keys") == ["ok"]
    assert levels(await found(routed), "keys") == ["warning"], "the workers may have one, this shell has none"


async def test_a_keys_file_that_cannot_be_used_is_a_problem(tmp_path: Path) -> None:
    said = await found(
        ModelRouted(alias="m", deployments=(Deployment(name="d", url="http://127.0.0.1:9/v1", key="k"),)),
        keys_file=tmp_path / "nothing.toml",
    )
    assert levels(said, "keys") == ["problem"]
    assert "cannot be read" in said[-1].says


async def test_a_deployment_for_embeddings_only_is_asked_for_one() -> None:
    async def embed(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"embedding": [0.0] * 7}]})

    async def complete(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no chat model"}}, status=400)

    application = web.Application()
    application.router.add_post("/v1/embeddings", embed)
    application.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        listening: list[tuple[str, int]] = list(runner.addresses)
        one = Deployment(name="vectors", url=f"http://127.0.0.1:{listening[0][1]}/v1")
        said = await found(ModelRouted(alias="e", deployments=(one,)))
    finally:
        await runner.cleanup()
    assert levels(said, "deployment") == ["ok"]
    assert "an embedding of 7 numbers" in said[-1].says


@pytest.mark.parametrize("embed", [False, True], ids=["words", "embedding"])
async def test_a_trial_waits_as_long_as_its_route_says(upstream: Upstream, embed: bool) -> None:
    slow = Deployment(name="slow", url=upstream.url, model="fake?header_delay=30")
    routed = ModelRouted(alias="m", deployments=(slow,), timeouts=RouteTimeouts(first_token_s=0.2))
    async with asyncio.timeout(20):
        [said] = [one async for one in trials(Settings(), [routed], embed=embed)]
    assert said.code == "model_stalled"


async def test_a_reasoning_model_that_refuses_max_tokens_is_asked_by_the_newer_name() -> None:
    asked = list[dict[str, object]]()

    def reasoning(at: Connection, request: Request) -> None:
        asked.append(json.loads(request.body))
        if "max_tokens" in asked[-1]:
            message = "Unsupported parameter: 'max_tokens' is not supported with this model."
            at.respond(400, json.dumps({"error": {"message": message, "param": "max_tokens"}}).encode())
            return
        at.begin_events({})
        at.write(b'data: {"choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":"stop"}]}\n\n')
        at.write(b"data: [DONE]\n\n")
        at.end()

    async with answering(reasoning) as url:
        routed = ModelRouted(alias="m", deployments=(Deployment(name="o", kind="azure", url=url),))
        [said] = [one async for one in trials(Settings(), [routed])]
    assert (said.error, said.text) == (None, "hello")
    assert [body.get("max_tokens", body.get("max_completion_tokens")) for body in asked] == [16, 16]


async def test_what_is_refused_for_another_reason_is_asked_once() -> None:
    asked = list[str]()

    def refuse(at: Connection, request: Request) -> None:
        asked.append(request.path)
        at.respond(400, b'{"error": {"message": "no such model"}}')

    async with answering(refuse) as url:
        routed = ModelRouted(alias="m", deployments=(Deployment(name="o", url=url),))
        [said] = [one async for one in trials(Settings(), [routed])]
    assert (said.error, len(asked)) == ("no such model", 1)


async def test_without_routes_it_says_where_models_go() -> None:
    [said] = await found()
    assert (said.level, "KLATCH_MODEL_URL" in said.says) == ("ok", True)


@pytest.mark.parametrize(
    "said",
    [{"data": []}, {"data": [{"object": "embedding"}]}, {"data": [{"embedding": "AACAPw=="}]}, {"data": [7]}],
    ids=["empty", "missing", "base64", "number"],
)
async def test_an_embedding_that_is_not_numbers_is_a_trial_that_failed(said: dict[str, object]) -> None:
    async with answering(lambda at, _: at.respond(200, json.dumps(said).encode())) as url:
        odd = ModelRouted(alias="m", deployments=(Deployment(name="odd", url=url),))
        [tried] = [one async for one in trials(Settings(), [odd], embed=True)]
    assert (tried.code, tried.dimension) == ("model_reply_malformed", 0)
    assert "embedding" in (tried.error or "")
