"""`klatch torture` tells by its exit code whether a promise was broken, or the run could not be made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def torture(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, on a machine that has no Kafka."""
    (folder / "none").mkdir()
    return subprocess.run(
        [sys.executable, "-m", "klatch_workers", "torture", *arguments],
        env={**os.environ, "KLATCH_KAFKA_JARS": str(folder / "none"), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [("--minutes", "0.1"), ("--mutants", "no-dedupe,last-end-wins")])
def test_a_run_that_cannot_be_made_is_no_broken_promise(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    said = torture(tmp_path, *arguments)
    assert said.returncode == 3, said.stderr
    assert "Traceback" not in said.stderr
    assert "KLATCH_KAFKA_JARS" in said.stderr
    if "--mutants" in arguments:
        assert said.stdout.split() == ["no-dedupe", "not", "run", "last-end-wins", "not", "run"]


def test_a_misspelt_planted_bug_is_misuse(tmp_path: Path) -> None:
    said = torture(tmp_path, "--mutants", "no-such-bug")
    assert (said.returncode, said.stdout) == (2, "")
