"""Where commands look for klatch, and what they say of settings that are none: all of them alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from klatch_workers.cli import main

TENANTS = '[tenants.acme]\nkeys = ["klatch-0123456789"]\n'
READING = (("tenants", "list"), ("topics", "check"), ("topics", "describe"))
ON_KAFKA = (
    *READING,
    ("tenants", "apply", "tenants.toml"),
    ("topics", "create"),
    ("quota", "show", "acme"),
    ("models", "list"),
    ("prompts", "list"),
    ("redrive",),
    ("cancel", "r1"),
    ("publish",),
    ("tail",),
)
WITH_SETTINGS = (*ON_KAFKA, ("top", "--once"), ("chat",), ("worker", "admission"), ("up",), ("bench",))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tenants.toml").write_text(TENANTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def klatch(arguments: tuple[str, ...], **environment: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environment, input="{}\n")


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


@pytest.mark.parametrize("arguments", WITH_SETTINGS, ids=" ".join)
@pytest.mark.parametrize(
    ("setting", "told"),
    [({"KLATCH_KAFKAA": "x"}, "did you mean KLATCH_KAFKA?"), ({"KLATCH_MAX_IN_FLIGHT": "many"}, "max_in_flight")],
    ids=["misspelt", "ill-formed"],
)
def test_a_setting_that_is_none_is_told_and_ends_with_two(
    folder: Path, arguments: tuple[str, ...], setting: dict[str, str], told: str
) -> None:
    said = klatch(arguments, KLATCH_DATA=str(folder), **setting)
    assert said.exit_code == 2, said.output
    assert told in said.output
    assert "errors.pydantic.dev" not in said.output
