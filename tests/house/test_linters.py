"""The linters and type checkers, on the whole tree: `pytest` alone is the full check.

Each runs as it would from a shell, with the configuration in `pyproject.toml`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

CHECKS = {
    "the import rule": ["lint-imports", "--no-cache"],
    "ruff": ["ruff", "check", "--no-cache"],
    "the format": ["ruff", "format", "--check"],
    "mypy": ["mypy", "--no-error-summary"],
    "pyright": ["pyright", "--warnings"],
}


@pytest.mark.timeout(900)  # mypy and pyright without a cache, on a small machine that is busy
@pytest.mark.parametrize("name", CHECKS)
def test_the_tree_passes(name: str) -> None:
    program, *arguments = CHECKS[name]
    done = subprocess.run(
        [BIN / program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{program} {' '.join(arguments)}\n{done.stdout}{done.stderr}"
