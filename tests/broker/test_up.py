"""`klatch up`, from its first line to its last process: what it says, what it refuses, and what a SIGKILL leaves."""

import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import pytest_asyncio

from klatch_agents.testing.upstream import Upstream
from klatch_schemas.events import TenantConfigured
from klatch_schemas.topics import TENANTS
from klatch_workers.kafka import Cluster

if TYPE_CHECKING:
    from tests.broker.conftest import Kit, Stack

pytestmark = pytest.mark.broker

STAGES = {"admission", "screening", "generation", "memory", "views", "http"}


async def test_the_first_line_says_all_that_a_program_needs(stack: "Stack", kit: "Kit") -> None:
    facts = stack.up.lines[0]
    assert set(facts) == {"event", "http", "bootstrap", "namespace", "tenant", "api_key", "views_url", "pids"}
    assert facts["event"] == "ready"
    assert facts["tenant"] == "local"
    assert set(facts["pids"]) == {"broker", *STAGES}
    assert kit.running(stack.up.pids.values()) == set(stack.up.pids.values())
    assert await stack.text("fake?text=at once", tenant="local") == "at once"


async def test_tenants_of_the_file_are_in_the_ledger_with_their_limits_and_without_their_keys(
    stack: "Stack", kit: "Kit"
) -> None:
    records = await stack.records(TENANTS)
    tenants = [event for record in records if isinstance(event := kit.read(record), TenantConfigured)]
    limits = {tenant.tenant: tenant.limits.requests_per_minute for tenant in tenants}
    assert limits.items() >= {"local": None, "acme": None, "zeta": None, "slow": 1}.items()
    held = b"".join(record.value or b"" for record in records)
    assert not [key for key in stack.keys.values() if key.encode() in held]


# --- what is refused


async def test_a_second_up_on_a_data_folder_in_use_is_refused(stack: "Stack", kit: "Kit") -> None:
    options = ("--data", str(stack.up.data), "--http", kit.free_address(), "--model-url", stack.upstream.url)
    code, said = await kit.refused(*options)
    assert code == 2
    assert str(stack.up.data) in said
    assert "--data" in said
    assert len(said.splitlines()) == 1
    assert await stack.text("fake?text=unharmed") == "unharmed"


async def test_an_address_that_is_taken_is_refused(stack: "Stack", kit: "Kit", tmp_path: Path) -> None:
    taken = stack.http.removeprefix("http://")
    code, said = await kit.refused("--data", str(tmp_path), "--http", taken, "--model-url", stack.upstream.url)
    assert code == 2
    assert f"{taken} is taken" in said
    assert "--http" in said


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:http", "127.0.0.1:99999"])
async def test_an_address_that_is_none_is_refused_with_the_form_that_is_wanted(
    kit: "Kit", tmp_path: Path, address: str
) -> None:
    code, said = await kit.refused("--data", str(tmp_path), "--http", address, "--model-url", "http://127.0.0.1:9/v1")
    assert code == 2
    assert "HOST:PORT" in said
    assert "Traceback" not in said


async def test_a_misspelt_setting_is_refused_with_the_name_that_was_meant(kit: "Kit", tmp_path: Path) -> None:
    code, said = await kit.refused("--data", str(tmp_path), KLATCH_MODEL_ULR="http://127.0.0.1:9/v1")
    assert code == 2
    assert "did you mean KLATCH_MODEL_URL?" in said


async def test_a_cluster_that_does_not_answer_is_one_line_that_names_it(kit: "Kit", tmp_path: Path) -> None:
    nowhere = kit.free_address()
    code, said = await kit.refused(
        *("--data", str(tmp_path), "--http", kit.free_address()),
        *("--kafka", nowhere, "--model-url", "http://127.0.0.1:9/v1"),
    )
    assert code == 1
    assert nowhere in said
    assert "--kafka" in said
    assert len(said.splitlines()) == 1


async def test_a_models_file_that_cannot_be_used_is_refused_by_place(kit: "Kit", tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[routes.m]\nto = ["nowhere"]\n')
    code, said = await kit.refused("--data", str(tmp_path), "--models", str(tmp_path / "models.toml"))
    assert code == 2
    assert "route m: there is no [deployments.nowhere]" in said


async def test_a_tenants_file_that_cannot_be_used_is_refused_by_field(kit: "Kit", tmp_path: Path) -> None:
    (tmp_path / "tenants.toml").write_text("[tenants.acme.limits]\nrequests_per_minut = 3\n")
    code, said = await kit.refused("--data", str(tmp_path), "--tenants", str(tmp_path / "tenants.toml"))
    assert code == 2
    assert "tenants.acme.limits.requests_per_minut" in said


# --- SIGKILL, and up again


@dataclass(frozen=True, slots=True)
class Reborn:
    """An `up` that was killed in the middle of a stream, and started again on the same data."""

    stack: "Stack"
    before: dict[str, Any]
    after: dict[str, Any]
    left: set[int]
    """Processes of the first that outlived it."""
    failed: list[str]
    """Stages that failed before the kill."""
    cut: str
    """The request whose reply was under way."""


def failed_stages(data: Path) -> list[str]:
    """Stages that had to be started again inside their process."""
    logs = {path.stem: path.read_text() for path in (data / "logs").glob("*.log")}
    return [stage for stage, said in logs.items() if "supervisor.failed" in said]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def reborn(kit: "Kit", tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> AsyncIterator[Reborn]:
    data = tmp_path_factory.mktemp("reborn") / "data"
    options = ("--http", kit.free_address(), "--model-url", upstream.url)
    first = await kit.up.launch(data, *options)
    async with kit.opened(first, upstream) as stack:
        told = {"tenant": "local", "person": "petra"}
        await stack.text("fake?text=Noted.", "My dog is called Bello.", conversation="pets", **told)
        await stack.text("fake?text=Noted.", "I am allergic to peanuts.", conversation="health", **told)
        async with stack.ask("fake?reply=unique&tokens=400&rate=20", tenant="local") as answer:
            while b"<<" not in await answer.content.readline():  # nothing that is said stands before it, or a comment
                pass
            failed = failed_stages(data)
            first.process.kill()
            pids = set(first.pids.values())
            assert await first.ended() == -signal.SIGKILL
            left = await kit.outlived(pids)
            cut = answer.headers["x-request-id"]
    second = await kit.up.launch(data, *options, "--model", "fake?reply=echo-messages")
    async with kit.opened(second, upstream) as stack:
        yield Reborn(stack, first.lines[0], second.lines[0], left, failed, cut)
    assert await second.terminate() == 0
    assert kit.running(second.pids.values()) == set()


async def test_no_stage_fails_on_a_kafka_that_is_new(reborn: Reborn) -> None:
    assert reborn.failed == []


async def test_a_sigkill_takes_every_process_with_it(reborn: Reborn) -> None:
    assert reborn.left == set()


async def test_keys_outlive_a_sigkill(reborn: Reborn) -> None:
    assert reborn.after["api_key"] == reborn.before["api_key"]
    mode = (reborn.stack.up.data / "keys.json").stat().st_mode
    assert mode & 0o077 == 0


async def test_what_was_accepted_before_a_sigkill_ends_once_after_it(reborn: Reborn) -> None:
    story = await reborn.stack.story(reborn.cut)
    assert story.said_by(1).startswith("<<")
    assert [(end.attempt, end.status) for end in story.ends] == [(2, "completed")]
    assert len(story.settlements) == 1
    assert [turn.reply[0]["content"] for turn in story.told] == [story.said_by(2)]
    async with (
        reborn.stack.session("local") as session,
        session.get(f"/v1/streams/{reborn.cut}") as answer,
    ):
        text = await answer.text()
    assert "<<" not in text
    assert text.count("data: [DONE]") == 1


async def test_a_conversation_goes_on_after_a_sigkill(reborn: Reborn) -> None:
    said = await reborn.stack.text("any", "What is its name?", tenant="local", conversation="pets")
    heard = [(message["role"], message["content"]) for message in json.loads(said)]
    assert heard == [
        ("user", "My dog is called Bello."),
        ("assistant", "Noted."),
        ("user", "What is its name?"),
    ]


async def test_what_a_person_said_in_another_conversation_is_recalled_after_a_sigkill(reborn: Reborn) -> None:
    asked = {"tenant": "local", "memory": {"recall": 1}}
    said = ""
    while "peanuts" not in said:  # the turn may still be on its way into the index, for as long as the test may take
        said = await reborn.stack.text("any", "Which food must I avoid?", person="petra", **asked)
    stranger = await reborn.stack.text("any", "Which food must I avoid?", person="paul", **asked)
    assert "peanuts" not in stranger
    other = await reborn.stack.text("any", "Which food must I avoid?", person="petra", tenant="local")
    assert "peanuts" not in other


async def test_the_model_that_was_named_for_all_is_asked_whatever_a_request_names(reborn: Reborn) -> None:
    text = f"only here {uuid4().hex}"
    assert json.loads(await reborn.stack.text("another-model", text, tenant="local"))[-1]["content"] == text
    asked = [call.body["model"] for call in reborn.stack.upstream.calls if text in json.dumps(call.body)]
    assert asked == ["fake?reply=echo-messages"]


# --- an existing cluster, the local model, an orderly end


async def test_on_another_cluster_the_local_model_answers_and_sigterm_lets_it_finish(
    kit: "Kit", kafka: Cluster, upstream: Upstream, tmp_path: Path
) -> None:
    namespace = f"up-{uuid4().hex[:8]}"
    options = ("--http", kit.free_address(), "--kafka", kafka.bootstrap, "--namespace", namespace)
    # It may take as long to finish as the model takes on a busy machine.
    up = await kit.up.launch(tmp_path / "data", *options, KLATCH_DRAIN_S="120")
    async with kit.opened(up, upstream) as stack:
        assert stack.bootstrap == kafka.bootstrap
        assert set(up.pids) == {"model", *STAGES}
        asked = stack.openai("local").chat.completions
        stream = await asked.create(
            model="local", messages=[{"role": "user", "content": "Count to ten."}], max_tokens=24, stream=True
        )
        chunks = [await anext(stream)]
        up.process.terminate()
        chunks += [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason in {"stop", "length"}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()
        assert await up.ended(150) == 0
    assert [line["event"] for line in up.lines] == ["ready", "stopping", "stopped"]
    assert failed_stages(tmp_path / "data") == []
    assert kit.running(up.pids.values()) == set()
    assert not (tmp_path / "data" / "run.json").exists()
    assert kafka.running


async def test_sigterm_before_it_serves_ends_what_was_started(kit: "Kit", upstream: Upstream, tmp_path: Path) -> None:
    data = tmp_path / "data"
    # No Kafka answers there: it cannot serve before the signal comes, however busy the machine is.
    options = ("--http", kit.free_address(), "--kafka", kit.free_address(), "--model-url", upstream.url)
    up = await kit.up.launch(data, *options, "--namespace", f"up-{uuid4().hex[:8]}")
    await kit.appears(data / "logs" / "views.log")
    children = kit.children(up.process.pid)
    assert children
    os.kill(up.process.pid, signal.SIGTERM)
    assert await up.ended() == 0
    assert kit.running(children) == set()
    assert up.lines == []
