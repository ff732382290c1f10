"""The part of Jinja that prompts may use, and the bounds it runs in.

Prompts are data of a tenant and are rendered inside a worker, so nothing in them may grow or run without bound.
Two means: what is not on the lists below is refused when the template is compiled (macros, imports, calls,
multiplication, filters that pad or repeat), and what is left pays for its work: every loop step, and every value that
a filter, an operator or a method reads or builds, is taken from a budget of one rendering.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, MappingView, Sized
from contextvars import ContextVar
from typing import Any, Final, cast

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

MOST_SOURCE: Final = 65_536
"""The longest template, in characters."""
MOST_OUTPUT: Final = 400_000
"""The longest text that a template may render or build on the way, in characters."""
MOST_WORK: Final = 200_000
"""Steps of one rendering: a loop step, an element read, or 256 characters read. Under a second, all spent."""

_STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign)
_EXPRESSIONS = (
    nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr,
    nodes.Filter, nodes.Test, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos,
    nodes.Add, nodes.Sub, nodes.Concat, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Call,
)  # fmt: skip
_METHODS = frozenset(
    {"items", "keys", "values", "get", "split", "startswith", "endswith", "upper", "lower", "title", "cycle"}
)
_JINJA_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort",
    "string", "title", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
_TESTS = (
    "boolean", "defined", "even", "false", "float", "integer", "iterable", "mapping", "none", "number", "odd",
    "sequence", "string", "true", "undefined",
)  # fmt: skip


class Exhausted(SecurityError):
    """A template built or did more than one rendering may."""


class Budget:
    """What one rendering has left."""

    __slots__ = ("work",)

    def __init__(self, work: int = MOST_WORK) -> None:
        self.work = work

    def spend(self, work: int) -> None:
        """Takes `work` steps; raises `Exhausted` when they are not there."""
        self.work -= work
        if self.work < 0:
            raise Exhausted(f"it takes more than {MOST_WORK} steps: loop over less")


BUDGET: ContextVar[Budget] = ContextVar("klatch_prompt_budget")


def environment() -> ImmutableSandboxedEnvironment:
    """A sandboxed environment with nothing in it but the lists above."""
    made = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Any] = {name: FILTERS[name] for name in _JINJA_FILTERS}
    functions: dict[str, Any] = {"range": _range}
    filters |= {
        "join": _join,
        "replace": _replace,
        "tojson": _tojson,
        "trim": _trim,
        "_charged": _charged,
        "_stepped": _stepped,
        "_sized": _sized,
    }
    made.filters = filters
    made.tests = {name: TESTS[name] for name in _TESTS}
    made.globals = functions
    return made


def compile_template(env: ImmutableSandboxedEnvironment, source: str) -> Template:
    """The template of `source`, checked and metered; raises `TemplateSyntaxError` naming line and fix."""
    if len(source) > MOST_SOURCE:
        raise TemplateSyntaxError(f"the template is longer than {MOST_SOURCE} characters: shorten it", 1)
    tree = env.parse(source)
    _check(tree)
    metered = cast("nodes.Template", _Meter().visit(tree))
    return Template.from_code(env, env.compile(metered), env.make_globals(None))


# --- what may be written ---------------------------------------------------------------------------------------------


def _check(tree: nodes.Template) -> None:
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, (*_STATEMENTS, *_EXPRESSIONS)):
            word = type(node).__name__
            raise TemplateSyntaxError(f"prompts do not have {word}: use variables, if, for and set", node.lineno)
        if isinstance(node, nodes.For) and node.recursive:
            raise TemplateSyntaxError("prompts do not have recursive loops", node.lineno)
        if isinstance(node, nodes.Call):
            _check_call(node)
        if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)):
            _check_literal(node)


def _check_call(call: nodes.Call) -> None:
    called = call.node
    if isinstance(called, nodes.Name) and called.name == "range":
        return
    if isinstance(called, nodes.Getattr) and called.attr in _METHODS:
        return
    raise TemplateSyntaxError(f"only range() and {', '.join(sorted(_METHODS))} can be called", call.lineno)


def _check_literal(literal: nodes.List | nodes.Tuple | nodes.Dict) -> None:
    # A list of variables, put into a list of itself a few dozen times, prints without end.
    if isinstance(literal, nodes.Tuple) and literal.ctx != "load":
        return
    for part in literal.find_all(nodes.Name):
        raise TemplateSyntaxError("lists and dictionaries in prompts hold constants only", part.lineno)


class _Meter(NodeTransformer):
    """Puts the meter in front of whatever reads or builds a value."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        node.iter = _through("_stepped", cast("nodes.Expr", node.iter))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.node is not None:
            node.node = _through("_charged", node.node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through("_charged", node.expr)
        for operand in node.ops:
            operand.expr = _through("_charged", operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_through("_charged", part) for part in node.nodes]
        return _through("_sized", node)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.left, node.right = _through("_charged", node.left), _through("_charged", node.right)
        return _through("_sized", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("_charged", node.node)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.node, nodes.Getattr):
            node.node.node = _through("_charged", node.node.node)
        return node


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# --- the meter, as filters (taking the context, so that Jinja does not evaluate them while it compiles) ---


@pass_context
def _charged(_: Context, value: object) -> object:
    """`value`, its size taken from the budget; an iterator pays as it goes."""
    if isinstance(value, Iterator):
        return _steps(cast("Iterator[object]", value))
    if not isinstance(value, Undefined):
        BUDGET.get().spend(_weight(value))
    return value


@pass_context
def _stepped(context: Context, value: Iterable[object]) -> Iterator[object]:
    """The elements of `value`, a step each."""
    charged = cast("Iterable[object]", _charged(context, value))
    return _steps(iter(charged))


@pass_context
def _sized(_: Context, value: object) -> object:
    """`value`, unless it has grown too long."""
    if isinstance(value, Sized) and len(value) > MOST_OUTPUT:
        raise _too_long()
    return value


def _steps(values: Iterator[object]) -> Iterator[object]:
    budget = BUDGET.get()
    for value in values:
        budget.spend(1)
        yield value


def _weight(value: object) -> int:
    """How many steps it takes to read all of `value`; counting stops soon after the budget would be spent."""
    weight, stack = 0, [value]
    while stack and weight <= MOST_WORK:
        item = stack.pop()
        weight += 1
        if isinstance(item, str):
            weight += len(item) // 256
        elif isinstance(item, Mapping):
            members = cast("Mapping[object, object]", item)
            stack += members.keys()
            stack += members.values()
        elif isinstance(item, (list, tuple)):
            stack += cast("list[object]", item)
        elif isinstance(item, (range, MappingView)):
            weight += len(cast("Sized", item))
    return weight


def _too_long() -> Exhausted:
    return Exhausted(f"it makes more than {MOST_OUTPUT} characters: shorten the template or its variables")


# --- filters and functions whose Jinja originals can grow without bound ---


def _join(values: Iterable[object], separator: object = "") -> str:
    texts = [str(value) for value in values]
    between = str(separator)
    if sum(map(len, texts)) + len(between) * len(texts) > MOST_OUTPUT:
        raise _too_long()
    return between.join(texts)


def _replace(value: object, old: object, new: object) -> str:
    text, before, after = str(value), str(old), str(new)
    if len(text) + text.count(before) * (len(after) - len(before)) > MOST_OUTPUT:
        raise _too_long()
    return text.replace(before, after)


def _tojson(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _trim(value: object) -> str:
    return str(value).strip()


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > 10_000:
        raise Exhausted("range() is longer than 10000: use a shorter one")
    return made
