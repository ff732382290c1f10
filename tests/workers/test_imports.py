"""What a start of `klatch up` must not wait for is not imported: a start is mostly the CPU time of imports."""

import subprocess
import sys

import pytest


def imported(*arguments: str) -> set[str]:
    """The modules that `klatch` imports, started so."""
    command = [sys.executable, "-X", "importtime", "-m", "klatch_workers", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}


@pytest.mark.parametrize("command", ["up", "worker", "top"])
def test_logging_does_not_bring_a_terminal_library(command: str) -> None:
    modules = imported(command, "--help")
    assert "structlog.dev" in modules
    # A trial to import `rich` itself is listed as well.
    assert modules.isdisjoint({"rich.console", "rich.traceback", "pygments"})


def test_up_has_no_http_client_before_it_starts_anything() -> None:
    assert "aiohttp" not in imported("up", "--help")
