"""Every trap of `docs/fidelity.md` has a test in `tests/fidelity` that cites it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAPS = set(range(1, 49))
CITED = re.compile(r"\[(\d+(?:, \d+)*)\]")
ROW = re.compile(r"^\| (\d+) \|", re.MULTILINE)


def test_each_trap_is_cited_by_a_test() -> None:
    cited = set[int]()
    for path in sorted((ROOT / "tests" / "fidelity").glob("test_*.py")):
        for docstring in docstrings(path):
            for numbers in CITED.findall(docstring):
                cited.update(map(int, numbers.split(", ")))
    assert cited == TRAPS


def docstrings(path: Path) -> Iterator[str]:
    """Of the tests of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield ast.get_docstring(node) or ""


def test_the_page_tells_of_each_trap_once() -> None:
    told = ROW.findall((ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8"))
    assert list(map(int, told)) == sorted(TRAPS)
