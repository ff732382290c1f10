# pyright: basic
# jsonschema types its validators partly, and click names the rest of a command line `_protected_args` only.
"""The compose file is one, by the Compose specification, and names only commands and settings that exist.

`compose-spec.schema.json` is the specification's own schema (Apache-2.0), as check-jsonschema 0.39.0 ships it. What
the images do is not tested here: no Docker runs in these tests.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from jsonschema import Draft202012Validator

from klatch_workers.cli import main
from klatch_workers.model_keys import ModelKeys
from klatch_workers.models_file import read_models
from klatch_workers.settings import PREFIX, Settings, host_port, read_settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
SCHEMA = Path(__file__).with_name("compose-spec.schema.json")
SCHEMA_SHA256 = "d549057ebc2925f39f62799eab0db7b9e2c18b35b6c00595199116da3ed10e64"

TEXT = (COMPOSE / "compose.yaml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "klatch"}
KNOWN = {PREFIX + name.upper() for name in Settings.model_fields}


def problems(file: dict[str, Any]) -> list[str]:
    raw = SCHEMA.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == SCHEMA_SHA256
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(json.loads(raw)).iter_errors(file)]


def parse(arguments: list[str]) -> None:
    """Parse a command line of `klatch` without running it; raises click's UsageError."""
    command: click.Command = main
    context = command.make_context("klatch", list(arguments))
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)


def default_of(value: str) -> str:
    """What a value is when nobody set the variables in it."""
    return re.sub(r"\$\{[A-Z_]+(?::([-?])([^}]*))?\}", lambda said: said[2] if said[1] == "-" else "set-by-user", value)


def test_the_file_follows_the_compose_specification() -> None:
    assert problems(FILE) == []


def test_the_schema_finds_what_the_specification_does_not_have() -> None:
    broken = {**FILE, "services": {**SERVICES, "kafka": {**SERVICES["kafka"], "restarts": "always"}}}
    assert any("restarts" in problem for problem in problems(broken))


def outside(service: dict[str, Any], path: str) -> str:
    """A path of a container as the file here that is mounted there."""
    mounts = [said.split(":") for said in service.get("volumes", [])]
    return next((str(COMPOSE / source) for source, target, *_ in mounts if target == path), path)


@pytest.mark.parametrize("service", OURS)
def test_a_service_runs_a_command_that_klatch_has(service: str) -> None:
    parse([outside(OURS[service], said) for said in OURS[service]["command"]])


def test_routes_and_their_keys_are_files_that_klatch_reads_and_the_keys_a_secret_of_who_calls_models() -> None:
    assert read_models(COMPOSE / "models.toml") == []
    file = COMPOSE / default_of(FILE["secrets"]["model_keys"]["file"])
    assert ModelKeys(file).missing(["any"]) == ["any"]
    for service in ("generation", "http"):
        assert OURS[service]["environment"]["KLATCH_KEYS_FILE"] == "/run/secrets/model_keys"
        assert OURS[service]["secrets"] == ["model_keys"]
        assert "KLATCH_MODEL_URL" in OURS[service]["environment"]


def test_a_command_that_klatch_does_not_have_is_found() -> None:
    with pytest.raises(click.UsageError):
        parse(["worker", "admissions"])


def test_every_stage_has_a_service() -> None:
    stages = {service["command"][1] for service in OURS.values() if service["command"][0] == "worker"}
    assert stages == {"admission", "screening", "generation", "memory", "views", "http"}


def test_every_variable_of_klatch_is_a_setting() -> None:
    named = set(re.findall(PREFIX + r"[A-Z_]+", TEXT + (COMPOSE / "Dockerfile").read_text()))
    assert named <= KNOWN, "a setting was renamed, or misspelt in compose/"


@pytest.mark.parametrize("service", OURS)
def test_a_service_starts_with_its_defaults(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {name: default_of(value) for name, value in OURS[service]["environment"].items() if value}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = read_settings(environment)
    assert [host_port(listen) for listen in (settings.http, settings.memory, settings.views, settings.kafka)]


def uses(kind: str) -> Iterator[str]:
    for service in SERVICES.values():
        for said in service.get(kind, []):
            yield said.split(":")[0]


def test_every_mount_is_a_declared_volume_or_a_file_here() -> None:
    for source in uses("volumes"):
        assert (COMPOSE / source).is_file() if source.startswith("./") else source in FILE["volumes"]


def test_ports_are_published_on_loopback_only() -> None:
    assert set(uses("ports")) == {"127.0.0.1"}


def test_every_dependency_is_a_service() -> None:
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)


def test_every_image_but_ours_is_pinned_to_a_version() -> None:
    images = {service["image"] for service in SERVICES.values()} - {"klatch"}
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []


def test_the_image_starts_klatch_and_copies_what_exists() -> None:
    lines = (COMPOSE / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["klatch"]' in lines
    copied = [path for line in lines if line.startswith("COPY") for path in line.split()[1:-1]]
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_prometheus_scrapes_the_views_service_where_it_listens() -> None:
    scrape = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"][0]
    host, port = host_port(scrape["static_configs"][0]["targets"][0])
    assert host_port(SERVICES[host]["environment"]["KLATCH_VIEWS"])[1] == port
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{SERVICES['prometheus']['secrets'][0]}"
