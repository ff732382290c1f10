"""What the doctor finds on a machine and at servers."""

import fcntl
import json
import os
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest_asyncio
from aiohttp import web
from click.testing import CliRunner

from klatch_schemas.topics import Namespace
from klatch_workers.cli.doctor import doctor as command
from klatch_workers.doctor.examine import settings_findings
from klatch_workers.doctor.findings import Endpoint, Finding, Setup
from klatch_workers.doctor.machine import machine
from klatch_workers.doctor.servers import servers
from klatch_workers.settings import Settings

NOWHERE = Endpoint(None)


def setup(
    data: Path,
    *,
    environment: dict[str, str] | None = None,
    pids: dict[str, int] | None = None,
    model: Endpoint = NOWHERE,
    memory: Endpoint = NOWHERE,
    door: Endpoint = NOWHERE,
    named: str | None = None,
) -> Setup:
    return Setup(
        settings=Settings(model=named),
        environment=environment or {},
        data=data,
        pids=pids or {},
        bootstrap="127.0.0.1:1",
        own_kafka=True,
        namespace=Namespace(),
        door=door,
        model=model,
        memory=memory,
        views=NOWHERE,
    )


async def on_machine(said: Setup, check: str) -> Finding:
    return next(one for one in [one async for one in machine(said)] if one.check == check)


async def at_servers(said: Setup, check: str) -> Finding:
    return next(one for one in [one async for one in servers(said)] if one.check == check)


async def test_a_healthy_machine_has_no_problem(tmp_path: Path) -> None:
    found = [one async for one in machine(setup(tmp_path))]
    assert {one.check for one in found} >= {"python", "packages", "data", "up", "disk", "java", "jars"}
    assert not [one for one in found if one.level == "problem"]


async def test_a_data_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = await on_machine(setup(tmp_path / "file" / "data"), "data")
    assert found.level == "problem"
    assert "--data" in found.fix


async def test_jars_that_are_not_cached_are_a_warning_and_a_wrong_folder_a_problem(tmp_path: Path) -> None:
    empty = await on_machine(setup(tmp_path, environment={"KLATCH_CACHE": str(tmp_path)}), "jars")
    assert empty.level == "warning"
    assert "0 of 4" in empty.says
    wrong = await on_machine(setup(tmp_path, environment={"KLATCH_KAFKA_JARS": str(tmp_path)}), "jars")
    assert wrong.level == "problem"


async def test_what_a_killed_klatch_up_left_is_told_from_one_that_runs(tmp_path: Path) -> None:
    assert (await on_machine(setup(tmp_path), "up")).says.startswith("no `klatch up` runs")
    (tmp_path / "run.json").write_text("{}")
    left = await on_machine(setup(tmp_path), "up")
    assert (left.level, "left behind" in left.says) == ("warning", True)
    with (tmp_path / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = await on_machine(setup(tmp_path, pids={"broker": os.getpid()}), "up")
        assert (runs.level, "with 1 processes" in runs.says) == ("ok", True)
        dead = await on_machine(setup(tmp_path, pids={"broker": os.getpid(), "http": _dead_pid()}), "up")
        assert (dead.level, "these do not: http" in dead.says) == ("problem", True)


def _dead_pid() -> int:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    return child


def test_misspelt_variables_are_each_named_with_the_nearest() -> None:
    found = list(settings_findings({"KLATCH_KAFKAA": "x", "KLATCH_MODEL_URI": "x", "KLATCH_HTTP": "y", "PATH": "z"}))
    assert [(one.level, "did you mean" in one.says) for one in found] == [("problem", True)] * 2
    assert "KLATCH_KAFKA?" in found[0].says
    assert "KLATCH_MODEL_URL?" in found[1].says


class Servers:
    """A model server, a memory worker and a door on one port, as well as told."""

    def __init__(self) -> None:
        self.asked = list[dict[str, Any]]()
        self.completion_status = 200
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def models(self, request: web.Request) -> web.Response:
        if request.headers.get("authorization") != "Bearer right":
            error = {"message": "who are you?", "code": "invalid_api_key"}
            return web.json_response({"error": error}, status=401)
        return web.json_response({"data": [{"id": "tiny"}]})

    async def complete(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        said = {} if self.completion_status == 200 else {"error": {"message": "out of memory"}}
        return web.json_response(said, status=self.completion_status)

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


@pytest_asyncio.fixture
async def there() -> AsyncGenerator[Servers]:
    servers, application = Servers(), web.Application()
    application.router.add_get("/v1/models", servers.models)
    application.router.add_post("/v1/chat/completions", servers.complete)
    application.router.add_get("/healthz", servers.health)
    application.router.add_get("/readyz", servers.health)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    listening: list[tuple[str, int]] = list(runner.addresses)
    servers.port = listening[0][1]
    yield servers
    await runner.cleanup()


async def test_a_model_server_is_asked_for_one_token(there: Servers, tmp_path: Path) -> None:
    found = await at_servers(setup(tmp_path, model=Endpoint(f"{there.url}/v1", "right")), "model")
    assert (found.level, found.says) == ("ok", f"tiny answers at {there.url}/v1")
    assert [(one["model"], one["max_tokens"]) for one in there.asked] == [("tiny", 1)]
    await at_servers(setup(tmp_path, model=Endpoint(f"{there.url}/v1", "right"), named="large"), "model")
    assert there.asked[-1]["model"] == "large"


async def test_a_model_server_that_refuses_is_a_problem_with_its_words(there: Servers, tmp_path: Path) -> None:
    key = await at_servers(setup(tmp_path, model=Endpoint(f"{there.url}/v1", "wrong")), "model")
    assert (key.level, key.fix) == ("problem", "mend KLATCH_MODEL_KEY")
    there.completion_status = 500
    broken = await at_servers(setup(tmp_path, model=Endpoint(f"{there.url}/v1", "right")), "model")
    assert (broken.level, "out of memory" in broken.says) == ("problem", True)


async def test_servers_that_are_away_are_problems_and_unnamed_ones_warnings(there: Servers, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = Endpoint(f"http://127.0.0.1:{free.getsockname()[1]}")
        for check in ("model", "memory server", "door"):
            found = await at_servers(setup(tmp_path, model=away, memory=away, door=away), check)
            assert found.level == "problem", check
            assert "does not answer" in found.says
    assert (await at_servers(setup(tmp_path, door=away), "memory server")).level == "warning"
    assert (await at_servers(setup(tmp_path, memory=Endpoint(there.url), door=away), "memory server")).level == "ok"


async def test_the_door_must_know_the_key(there: Servers, tmp_path: Path) -> None:
    right = await at_servers(setup(tmp_path, door=Endpoint(there.url, "right")), "door")
    assert right.level == "ok"
    wrong = await at_servers(setup(tmp_path, door=Endpoint(there.url, "wrong")), "door")
    assert (wrong.level, wrong.fix) == ("problem", "mend KLATCH_API_KEY")


def test_each_finding_is_an_object_and_a_problem_ends_with_1(tmp_path: Path) -> None:
    environment = {"KLATCH_KAFKA": "127.0.0.1:1", "KLATCH_HTTP": "127.0.0.1:1", "KLATCH_DATA": str(tmp_path)}
    said = CliRunner().invoke(command, ["--json"], env={**environment, "KLATCH_SPELT": "wrong"})
    found = [json.loads(line) for line in said.stdout.splitlines()]
    levels = {one["check"]: one["level"] for one in found}
    assert levels["settings"] == levels["kafka"] == levels["door"] == "problem"
    assert "java" not in levels, "who names a Kafka needs none of ours"
    assert said.exit_code == 1
