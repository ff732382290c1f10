"""The bare install, without any extra, has the client commands; the others say what to install."""

import subprocess
import sys
from importlib.metadata import requires

import pytest

from klatch_workers.doctor.machine import extra_of

# Import names that differ from their packages'.
_MODULES = {"faust-streaming": "faust", "qdrant-client": "qdrant_client", "qdrant-edge-py": "qdrant_edge"}

_BLOCK = """
import sys
blocked = set(sys.argv[1].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from klatch_workers.cli import main
main(sys.argv[2:], prog_name="klatch")
"""


def _extras() -> list[str]:
    """The modules of packages that only extras bring."""
    listed = [extra_of(line) for line in requires("klatch") or ()]
    packages = {found[0] for found in listed if found and found[0] != "klatch"}
    modules = {_MODULES.get(package, package.replace("-", "_")) for package in packages}
    assert {"aiohttp", "jinja2", "starlette", "uvicorn"} <= modules
    return sorted(modules)


def klatch(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", _BLOCK, ",".join(_extras()), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", [(), ("publish",), ("tail",), ("cancel",)])
def test_help_works(command: tuple[str, ...]) -> None:
    said = klatch(*command, "--help")
    assert said.returncode == 0, said.stderr
    assert "Usage: klatch" in said.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("publish", "-", "--tenant", "acme"),
        ("tail",),
        ("cancel", "r1", "--conversation", "c1", "--tenant", "acme"),
    ],
)
def test_client_commands_go_as_far_as_kafka(arguments: tuple[str, ...]) -> None:
    said = klatch(*arguments, "--kafka", "127.0.0.1:1", stdin='{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert said.returncode == 3, said.stderr
    assert "no Kafka answers at 127.0.0.1:1" in said.stderr


def test_cancel_goes_as_far_as_the_door() -> None:
    said = klatch("cancel", "r1", "--http", "127.0.0.1:1", "--api-key", "k")
    assert said.returncode == 3, said.stderr
    assert "http://127.0.0.1:1/v1/streams/r1 does not answer" in said.stderr


def test_other_commands_say_what_to_install() -> None:
    said = klatch("chat", "--once", "hi")
    assert said.returncode == 1
    assert "pip install 'klatch[local]'" in said.stderr
