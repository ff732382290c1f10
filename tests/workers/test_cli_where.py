"""Where commands look for klatch, and what they say of settings that are none: all of them alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from klatch_schemas.topics import Namespace
from klatch_workers.cli import main
from klatch_workers.cli.context import CommandFailed, Context

TENANTS = '[tenants.acme]\nkeys = ["klatch-0123456789"]\n'
APPLY = ("tenants", "apply", "tenants.toml")
READING = (("tenants", "list"), ("topics", "check"), ("topics", "describe"))
ON_KAFKA = (
    *READING,
    APPLY,
    ("topics", "create"),
    ("quota", "show", "acme"),
    ("models", "list"),
    ("prompts", "list"),
    ("redrive",),
    ("cancel", "r1"),
    ("publish",),
    ("tail",),
)
ELSEWHERE = (("kafka", "status"), ("top", "--once"), ("chat",), ("worker", "admission"), ("up",), ("bench",))
WITH_SETTINGS = (*ON_KAFKA, *ELSEWHERE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tenants.toml").write_text(TENANTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def klatch(arguments: tuple[str, ...], **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment, input="{}\n")


def run_file(folder: Path) -> None:
    """Of a `klatch up --namespace dev`."""
    facts = {
        "bootstrap": "127.0.0.1:2",
        "namespace": "dev",
        "tenant": "local",
        "http": "http://127.0.0.1:4",
        "api_key": "k",
        "model_url": "http://127.0.0.1:5/v1",
        "model_key": "m",
        "keys_file": str(folder / "keys.toml"),
    }
    (folder / "run.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
@pytest.mark.parametrize("named", ["option", "environment"])
def test_a_command_beside_a_running_klatch_up_asks_its_kafka(
    folder: Path, arguments: tuple[str, ...], named: str
) -> None:
    (folder / "run.json").write_text(json.dumps({"bootstrap": "127.0.0.1:2", "namespace": "beside"}))
    if named == "option":
        asked = klatch((*arguments, "--data", str(folder)))
    else:
        asked = klatch(arguments, KLATCH_DATA=str(folder))
    assert asked.exit_code == 3
    assert "127.0.0.1:2" in asked.output
    over = klatch((*arguments, "--data", str(folder), "--kafka", "127.0.0.1:3"))
    assert (over.exit_code, "127.0.0.1:3" in over.output) == (3, True)


def test_the_kafka_of_the_data_folder_is_the_one_that_klatch_up_keeps_there(folder: Path) -> None:
    asked = klatch(("kafka", "status"), KLATCH_DATA=str(folder), XDG_DATA_HOME="/elsewhere")
    assert (asked.exit_code, str(folder / "kafka") in asked.output) == (3, True)
    asked = klatch(("kafka", "status", "--data", str(folder / "own")), KLATCH_DATA=str(folder))
    assert (asked.exit_code, str(folder / "own") in asked.output) == (3, True)


def test_a_namespace_alone_is_one_of_the_running_klatchs_kafka(folder: Path) -> None:
    run_file(folder)
    beside = Context.read({}, data=folder, namespace="other")
    assert (beside.bootstrap, beside.namespace, beside.tenant) == ("127.0.0.1:2", Namespace.named("other"), "local")


@pytest.mark.parametrize("kafka", ["127.0.0.1:2", "localhost:2", "other:9092, 127.0.0.1:2"])
def test_who_names_the_running_klatchs_own_kafka_means_that_klatch(folder: Path, kafka: str) -> None:
    run_file(folder)
    for beside in (Context.read({"KLATCH_KAFKA": kafka}, data=folder), Context.read({}, data=folder, kafka=kafka)):
        assert (beside.namespace, beside.tenant, beside.api_key) == (Namespace.named("dev"), "local", "k")


@pytest.mark.parametrize("named", ["option", "environment"])
def test_who_names_another_kafka_is_told_nothing_of_the_running_klatch(folder: Path, named: str) -> None:
    run_file(folder)
    kafka = "prod:9092"
    if named == "option":
        away = Context.read({}, data=folder, kafka=kafka)
    else:
        away = Context.read({"KLATCH_KAFKA": kafka}, data=folder)
    assert (away.bootstrap, away.namespace) == (kafka, Namespace())
    assert (away.tenant, away.api_key, away.door_known) == (None, None, False)
    model = away.model_settings
    assert (model.model_url, model.model_key, model.keys_file) == (None, None, None)
    with pytest.raises(CommandFailed, match="with the Kafka prod:9092"):
        away.door()


@pytest.mark.parametrize("door", ["http://127.0.0.1:9", "https://127.0.0.1:4", "elsewhere:4"])
def test_keys_of_the_running_klatch_are_sent_to_no_server_but_its_own(folder: Path, door: str) -> None:
    run_file(folder)
    away = Context.read({"KLATCH_HTTP": "127.0.0.1:9"}, data=folder, model_url="https://models.example/v1")
    assert (away.door_known, away.api_key, away.model_settings.model_key) == (True, None, None)
    with pytest.raises(CommandFailed, match=r"no API key for http://127\.0\.0\.1:9: set KLATCH_API_KEY"):
        away.door()
    assert klatch(("chat", "--once", "hi", "--data", str(folder), "--http", door)).exit_code == 2
    own = Context.read({"KLATCH_HTTP": "localhost:4"}, data=folder, model_url="http://127.0.0.1:5/v1/")
    assert (own.api_key, own.model_settings.model_key) == ("k", SecretStr("m"))


@pytest.mark.parametrize("named", ["option", "environment"])
@pytest.mark.parametrize(
    ("door", "url"),
    [
        ("https://klatch.example", "https://klatch.example"),
        ("https://klatch.example/v1", "https://klatch.example"),
        ("http://klatch.example:8080/v1/", "http://klatch.example:8080"),
        ("https://example/klatch/v1", "https://example/klatch"),
        ("klatch.example:8080", "http://klatch.example:8080"),
    ],
)
def test_a_door_is_named_by_its_url_or_by_host_and_port(folder: Path, named: str, door: str, url: str) -> None:
    said = {"KLATCH_HTTP": door} if named == "environment" else {}
    context = Context.read(said, data=folder, http=None if said else door)
    assert (context.door_known, context.door_url) == (True, url)


@pytest.mark.parametrize("arguments", [("chat", "--once", "hi"), ("cancel", "r1"), ("doctor",)], ids=" ".join)
@pytest.mark.parametrize(
    "door", ["ftp://klatch.example", "https://", "http://a:http", "https://a?x=1", "https://me:secret@a", "a"]
)
def test_a_door_that_cannot_be_is_told_with_what_could(folder: Path, arguments: tuple[str, ...], door: str) -> None:
    said = klatch((*arguments, "--data", str(folder), "--http", door))
    assert said.exit_code == 2, said.output
    assert "https://klatch.example" in said.output
    assert "secret" not in said.output


def test_the_door_of_the_running_klatch_is_not_that_of_another_namespace(folder: Path) -> None:
    run_file(folder)
    other = Context.read({}, data=folder, namespace="other")
    assert (other.door_known, other.api_key) == (False, None)
    assert other.model_settings.model_key == SecretStr("m"), "its model server is"
    cancelled = klatch(("cancel", "r1", "--data", str(folder), "--namespace", "other"))
    assert (cancelled.exit_code, "--conversation" in cancelled.output) == (2, True)
    own = Context.read({}, data=folder, namespace="dev")
    assert (own.door_url, own.api_key) == ("http://127.0.0.1:4", "k")


@pytest.mark.parametrize("arguments", [*READING, APPLY, ("quota", "show", "acme"), ("models", "list")], ids=" ".join)
def test_a_run_file_that_cannot_be_read_fails_no_command_that_names_kafka_and_namespace(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    (folder / "run.json").write_text("{")
    named = (*arguments, "--data", str(folder), "--kafka", "127.0.0.1:3", "--namespace", "dev")
    asked = klatch(named)
    assert (asked.exit_code, "127.0.0.1:3" in asked.output) == (3, True)
    unnamed = klatch((*arguments, "--data", str(folder)))
    assert (unnamed.exit_code, "run.json" in unnamed.output) == (2, True)


@pytest.mark.parametrize("arguments", WITH_SETTINGS, ids=" ".join)
@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"KLATCH_KAFKAA": "x"}, "did you mean KLATCH_KAFKA?"),
        ({"KLATCH_MAX_IN_FLIGHT": "many"}, "max_in_flight"),
        ({"KLATCH_LOG_LEVEL": "inof"}, "KLATCH_LOG_LEVEL is one of debug, info, warning, error, critical"),
    ],
    ids=["misspelt", "ill-formed", "level"],
)
def test_a_setting_that_is_none_is_told_and_ends_with_two(
    folder: Path, arguments: tuple[str, ...], setting: dict[str, str], told: str
) -> None:
    said = klatch(arguments, KLATCH_DATA=str(folder), **setting)
    assert said.exit_code == 2, said.output
    assert told in said.output
    assert "errors.pydantic.dev" not in said.output
