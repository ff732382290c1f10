"""House rules that no linter knows: sizes, docstrings, what a decider may import, what a test may not do."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [
    path
    for component in ("schemas", "streams", "agents", "workers")
    for path in sorted((ROOT / component).rglob("*.py"))
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

LONGEST_MODULE, LONGEST_FUNCTION = 400, 60
REASON = "Over 400 lines"
"""How a module's docstring begins the sentence that says why it is longer."""

DECIDERS = ("admission", "continuing", "counting", "estimate", "generation", "kernel", "seen", "windows")
PURE = {
    *("__future__", "abc", "bisect", "collections", "dataclasses", "enum", "functools", "heapq", "itertools"),
    *("json", "math", "operator", "re", "types", "typing"),
    *("annotated_types", "msgspec", "pydantic", "rpds"),
}
"""What a decider may import, and what that may import in turn, besides klatch's own modules."""
POLICIES = ("continuing", "dialect", "fair", "health", "routing")
"""What is decided about calls of models, apart from calling them."""
PURE_NAMES = {"uuid": {"NAMESPACE_URL", "UUID", "uuid5"}, "zlib": {"crc32"}}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", [*CODE, *TESTS], ids=label)
def test_a_module_says_what_it_promises_and_is_short_or_says_why_not(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        return
    promise = ast.get_docstring(tree(path))
    assert promise, "begin the module with its promise and its limits"
    lines = len(text.splitlines())
    assert lines <= LONGEST_MODULE or REASON in promise, (
        f"{lines} lines: split the module, or add to its docstring a sentence that begins {REASON!r} and says why"
    )


@pytest.mark.parametrize("path", [*CODE, *TESTS], ids=label)
def test_no_function_is_longer_than_a_page(path: Path) -> None:
    long = {
        node.name: lines
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert long == {}


# --- deciders ----------------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of every import, wherever in the file it stands; `import m` has the name ``."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Import(names):
                yield from ((one.name, "") for one in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from ((module, one.name) for one in names)
            case ast.ImportFrom():
                pytest.fail(f"{label(path)} has a relative import, which this test cannot follow")
            case _:
                pass


def source(module: str) -> Path | None:
    """The file of one of klatch's own modules."""
    spec = find_spec(module)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def impurities(module: str, seen: set[str]) -> Iterator[str]:
    """What `module` imports, itself or through klatch's other modules, that a decision must not depend on."""
    path = source(module)
    if module in seen or path is None:
        return
    seen.add(module)
    for name, item in imports(path):
        if name.startswith("klatch_"):
            # `from klatch_schemas import codec` imports a module, `from klatch_schemas.ids import Tenant` does not.
            inner = f"{name}.{item}"
            yield from impurities(inner if item and "." not in name and source(inner) else name, seen)
        elif name.split(".")[0] not in PURE and item not in PURE_NAMES.get(name, ()):
            yield f"{module} imports {name}{'.' if item else ''}{item}"


@pytest.mark.parametrize("name", DECIDERS)
def test_a_decider_imports_no_clock_no_randomness_no_network_and_no_event_loop(name: str) -> None:
    seen = set[str]()
    assert list(impurities(f"klatch_streams.{name}", seen)) == []
    assert f"klatch_streams.{name}" in seen


def test_what_a_decider_must_not_import_is_found_through_other_modules() -> None:
    kafka_log = "klatch_streams.kafka_log"
    path = source(kafka_log)
    assert path
    assert not any(module == "asyncio" for module, _ in imports(path))
    assert any("imports asyncio" in found for found in impurities(kafka_log, set()))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_models_is_as_pure_as_a_decider(name: str) -> None:
    found = set(impurities(f"klatch_agents.gateway.{name}", set()))
    assert {one for one in found if not one.endswith(("imports hashlib.sha256", "imports urllib.parse.quote"))} == set()


@pytest.mark.parametrize("name", DECIDERS)
def test_a_decider_has_no_any_in_its_types(name: str) -> None:
    path = source(f"klatch_streams.{name}")
    assert path
    assert not any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree(path)))


def test_every_class_that_decides_is_held_to_these_rules() -> None:
    deciding = {
        path.stem
        for path in CODE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(one, ast.FunctionDef) and one.name == "decide" for one in node.body)
    }
    assert deciding <= set(DECIDERS)
    assert "admission" in deciding


# --- tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TESTS, ids=label)
def test_a_test_mocks_and_patches_nothing(path: Path) -> None:
    mocked = {module for module, _ in imports(path) if module.split(".")[0] in {"mock", "pytest_mock"}}
    mocked |= {f"{module}.{name}" for module, name in imports(path) if "mock" in (*module.split("."), name)}
    assert mocked == set()
    patches = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr in {"setattr", "setitem"}
        and isinstance(node.value, ast.Name)
        and node.value.id in {"monkeypatch", "mp", "patch"}
    ]
    assert [line for line in patches if not commented(path, line)] == [], (
        "patches what it tests, and no comment says why"
    )


@pytest.mark.parametrize("path", TESTS, ids=label)
def test_a_test_awaits_what_it_waits_for_or_says_why_it_sleeps(path: Path) -> None:
    sleeps = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and is_sleep(node)]
    assert [line for line in sleeps if not commented(path, line)] == [], "await the event, or say in a comment why not"


def is_sleep(call: ast.Call) -> bool:
    """`time.sleep(...)` of anything, and `asyncio.sleep(...)` of a constant; `sleep(0)` only lets others run."""
    match call:
        case ast.Call(ast.Attribute(ast.Name("time"), "sleep")):
            return True
        case ast.Call(ast.Attribute(ast.Name("asyncio"), "sleep"), [ast.Constant(float(seconds) | int(seconds))]):
            return seconds != 0
        case _:
            return False


def commented(path: Path, line: int) -> bool:
    """Whether a comment stands on the line or right above it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "  # " in lines[line - 1] or lines[line - 2].lstrip().startswith("# ")
