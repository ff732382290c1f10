"""Hypothesis strategies made from the models of the contract: a new field is tested the day it is added."""

# Looks into annotations, which are Any.
# pyright: basic
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from annotated_types import Ge, Le
from hypothesis import strategies as st
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from klatch_schemas.events import Event, Part

json_values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": st.sampled_from(["a", "0", "Z9._-", "name." * 12]),
    r"^[A-Za-z0-9][A-Za-z0-9._:-]*$": st.sampled_from(["r", "5f0c3a7e-0000-4000-8000-000000000001", "t:" * 60]),
    r"^[^\x00-\x1f\x7f]+$": st.text(
        st.characters(codec="utf-8", categories=["L", "N", "P", "So"]), min_size=1, max_size=9
    ),
    r"^[0-9a-f]{64}$": st.sampled_from(["0" * 64, "9f" * 32]),
}


def instances(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Valid instances of a model; optional fields come and go."""
    required, optional = dict[str, st.SearchStrategy[Any]](), dict[str, st.SearchStrategy[Any]]()
    for name, field in model.model_fields.items():
        into = required if field.is_required() else optional
        into[name] = _field(field)
    return st.fixed_dictionaries(required, optional=optional).map(model.model_validate)


def least(model: type[Event]) -> st.SearchStrategy[Any]:
    """Instances of a model with nothing but what it requires."""
    required = {name: _field(field) for name, field in model.model_fields.items() if field.is_required()}
    return st.fixed_dictionaries(required).map(model.model_validate)


def _field(field: FieldInfo) -> st.SearchStrategy[Any]:
    return _of(field.annotation, tuple(field.metadata))


def _of(kind: Any, limits: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _of(inner[0], (*limits, *_flat(inner[1:])))
    if kind is JsonValue:
        return json_values
    if isinstance(kind, type) and issubclass(kind, Part):
        return st.deferred(lambda: instances(kind))
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in {Union, types.UnionType}:
        return st.one_of([_of(one) for one in inner])
    if origin is tuple:
        return st.lists(_of(inner[0]), max_size=2).map(tuple)
    if origin in {dict, Mapping}:
        return st.dictionaries(_of(inner[0]), _of(inner[1]), max_size=2)
    return _scalar(cast("type", getattr(kind, "__supertype__", kind)), limits)


def _flat(limits: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one for limit in limits for one in (limit.metadata if isinstance(limit, FieldInfo) else [limit]))


def _scalar(kind: type, limits: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    pattern = next((str(one.pattern) for one in limits if getattr(one, "pattern", None)), None)
    if kind is str and pattern:
        return _PATTERNS[pattern]
    low = next((cast("float", limit.ge) for limit in limits if isinstance(limit, Ge)), None)
    high = next((cast("float", limit.le) for limit in limits if isinstance(limit, Le)), None)
    scalars: dict[type, st.SearchStrategy[Any]] = {
        str: st.text(max_size=9),
        bool: st.booleans(),
        int: st.integers(*(None if most is None else int(most) for most in (low, high))),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
        type(None): st.none(),
    }
    return scalars[kind]
