"""What operators changed, as lines that people read; the ledger keeps the last of them."""

from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

from klatch_schemas.events import LimitRule
from klatch_streams.quota.rules import Settings

KEPT: Final = 100
_LINES: Final = 20
_LONGEST: Final = 300


class Change(msgspec.Struct, frozen=True):
    """An operator's change to a tenant's settings."""

    at_ms: int
    by: str
    what: tuple[str, ...]
    """Such as `person=* tokens_per_day: none -> 10000`."""


def recorded(changes: tuple[Change, ...], at_ms: int, by: str, old: Settings, new: Settings) -> tuple[Change, ...]:
    """`changes` with one more at their end, if anything differs."""
    lines = list(islice(_differences(old, new), _LINES + 1))
    if not lines:
        return changes
    if len(lines) > _LINES:
        lines[_LINES:] = ["and more"]
    change = Change(at_ms, by[:_LONGEST], tuple(line[:_LONGEST] for line in lines))
    return (*changes, change)[-KEPT:]


def _differences(old: Settings, new: Settings) -> Iterator[str]:
    before, after = dict(_values(old)), dict(_values(new))
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            yield f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}"


def _values(settings: Settings) -> Iterator[tuple[str, object]]:
    for name, most in settings.limits.model_dump(exclude_none=True).items():
        yield name, most
    for rule in settings.rules:
        for name, most in rule.limits.model_dump(exclude_none=True).items():
            yield f"{scope_text(rule)} {name}", most
    yield "weight", settings.weight
    yield "priority", settings.priority
    for model, price in settings.prices.items():
        yield f"price of {model}", f"{price.prompt}/{price.completion}"


def scope_text(rule: LimitRule) -> str:
    """A rule's scope as an operator writes it: `person=* model=gpt-5`."""
    names = (("use_case", rule.use_case), ("person", rule.person), ("model", rule.model))
    return " ".join(f"{dimension}={name}" for dimension, name in names if name is not None)
