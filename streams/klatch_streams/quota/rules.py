"""A tenant's settings, ready to be asked: which scopes a request counts in, within which limits, at which prices.

A scope is a set of dimensions (use case, person, model) with a value for each: everything of the tenant (no
dimension), everything of ann, everything of ann with one model. Each scope that a rule covers has a counter of its
own, and all of a request's scopes must have room. Of the rules over the same dimensions the one that names most
applies, and it alone; with as many names, the one that names the use case, then the person.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, EmbeddingRequested, LimitRule, Limits, QuotaLimitSet, TokenPrice
from klatch_streams.quota.counters import Counter

EACH: Final = "*"
NOBODY: Final = ""
"""Stands for a value that a request does not name: all such requests count together."""
_LONGEST: Final = 200
_MOST_KNOWN: Final = 4_096
DIMENSIONS: Final = ("use_case", "person", "model")
_MICRO: Final = 1_000_000
_FREE: Final = TokenPrice()

Asked = ChatRequested | EmbeddingRequested
"""What counts against limits."""

Names = tuple[str | None, str | None, str | None]
"""Use case, person, model; None: whatever it is."""


def names_of(rule: LimitRule) -> Names:
    """What a rule names."""
    return rule.use_case, rule.person, rule.model


def names_in(key: str) -> Names:
    """The names that a scope's key is made of; half a surrogate pair may stand in them."""
    names: Names = msgspec.convert(codec.loads(key.encode()), Names)
    return names


class Budget(NamedTuple):
    """A limit of a day or a month: it does not come back by waiting a little, so it stops replies that run."""

    name: str
    most: int
    money: bool
    monthly: bool

    def used(self, counter: Counter) -> int:
        """How much of it is used; the counter is one of `at`."""
        if self.money:
            return counter.month_micros if self.monthly else counter.day_micros
        return counter.month_tokens if self.monthly else counter.day_tokens

    def reserved(self, counter: Counter) -> int:
        """How much at most of what is used may come back when requests that run are settled."""
        if self.money:
            return counter.month_reserved_micros if self.monthly else counter.day_reserved_micros
        return counter.month_reserved_tokens if self.monthly else counter.day_reserved_tokens


class Scope(NamedTuple):
    """What some of a tenant's requests have in common, and may use together."""

    key: str
    """JSON of its `Names`; empty for the whole tenant."""
    limits: Limits
    budgets: tuple[Budget, ...]
    """Those of its limits."""

    @classmethod
    def of(cls, key: str, limits: Limits) -> "Scope":
        """A scope with its limits."""
        bounds = (
            (limits.tokens_per_day, "tokens_per_day", False, False),
            (limits.tokens_per_month, "tokens_per_month", False, True),
            (limits.cost_micros_per_day, "cost_micros_per_day", True, False),
            (limits.cost_micros_per_month, "cost_micros_per_month", True, True),
        )
        found = [Budget(name, most, money, monthly) for most, name, money, monthly in bounds if most is not None]
        return cls(key, limits, tuple(found))

    @property
    def dimensions(self) -> str | None:
        """Such as `use_case+person`; None for the whole tenant."""
        if not self.key:
            return None
        names = names_in(self.key)
        return "+".join(dimension for dimension, name in zip(DIMENSIONS, names, strict=True) if name is not None)


class Settings(msgspec.Struct, frozen=True):
    """All that an operator has set."""

    limits: Limits = Limits()
    rules: tuple[LimitRule, ...] = ()
    weight: float = 1.0
    priority: int = 0
    prices: Mapping[str, TokenPrice] = {}

    @classmethod
    def of(cls, said: QuotaLimitSet) -> "Settings":
        """What an event says."""
        return cls(said.limits, said.rules, said.weight, said.priority, said.prices)

    def dump(self) -> dict[str, object]:
        """As plain JSON data."""
        return {
            "limits": self.limits.model_dump(exclude_none=True),
            "rules": [rule.model_dump(exclude_none=True) for rule in self.rules],
            "weight": self.weight,
            "priority": self.priority,
            "prices": {model: price.model_dump() for model, price in self.prices.items()},
        }


class Rules:
    """Settings, compiled. Immutable; equal if their settings are."""

    __slots__ = ("_by_dimensions", "_dearest", "_known", "_whole", "settings")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._whole = Scope.of("", settings.limits)
        self._by_dimensions = _by_dimensions(settings.rules)
        self._known: dict[tuple[str, str, str], tuple[Scope, ...]] = {}
        """Scopes that were looked up, by names: the same people come again."""
        prices = settings.prices.values()
        self._dearest = TokenPrice(
            prompt=max((price.prompt for price in prices), default=0),
            completion=max((price.completion for price in prices), default=0),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self.settings == other.settings

    def __hash__(self) -> int:
        raise TypeError("rules are not for keys")

    def scopes(self, asked: Asked) -> Sequence[Scope]:
        """The scopes of a request, the whole tenant's first."""
        if not self._by_dimensions:
            return (self._whole,)
        names = (asked.use_case, asked.person or NOBODY, model_of(asked))
        if (known := self._known.get(names)) is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[names] = (self._whole, *self._narrow(names))
        return known

    def scope_of(self, key: str) -> Scope:
        """The scope under `key`, with what limits it now."""
        if not key:
            return self._whole
        names = names_in(key)
        dimensions = tuple(name is not None for name in names)
        rules = self._by_dimensions.get(dimensions, {})
        return Scope.of(key, next(_matches(rules, names), Limits()))

    def price_of(self, model: str) -> TokenPrice:
        """The highest price of a model: its own, else that of `*`, else the highest that is known, else nothing."""
        prices = self.settings.prices
        if not prices:
            return _FREE
        return prices.get(model) or prices.get(EACH) or self._dearest

    def _narrow(self, names: tuple[str, str, str]) -> Iterator[Scope]:
        for dimensions, rules in self._by_dimensions.items():
            values = tuple(name if there else None for name, there in zip(names, dimensions, strict=True))
            limits = next(_matches(rules, values), None)
            if limits is not None:
                yield Scope.of(codec.dumps(values).decode(), limits)


def model_of(asked: Asked) -> str:
    """The model as it was asked for, cut to what a rule can name."""
    said = asked.model if isinstance(asked, EmbeddingRequested) else asked.body.get("model")
    return said[:_LONGEST] if isinstance(said, str) else NOBODY


def micros(price: TokenPrice, prompt: int, completion: int) -> int:
    """What tokens cost, in millionths of a US dollar, rounded up."""
    return -(-(prompt * price.prompt + completion * price.completion) // _MICRO)


def tokens_for(price: TokenPrice, most_micros: int) -> int | None:
    """How many completion tokens so much buys; None: any number."""
    return most_micros * _MICRO // price.completion if price.completion else None


def _by_dimensions(rules: Sequence[LimitRule]) -> dict[tuple[bool, ...], dict[tuple[str | None, ...], Limits]]:
    found = dict[tuple[bool, ...], dict[tuple[str | None, ...], Limits]]()
    for rule in rules:
        names = names_of(rule)
        dimensions = tuple(name is not None for name in names)
        if any(dimensions):
            found.setdefault(dimensions, {})[names] = rule.limits
    return found


def _matches(rules: Mapping[tuple[str | None, ...], Limits], values: tuple[str | None, ...]) -> Iterator[Limits]:
    """The limits of the rules that match, the one that names most first."""
    for pattern in patterns(values):
        if (limits := rules.get(pattern)) is not None:
            yield limits


def patterns(values: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
    """The names of all rules that would match, over the same dimensions, the one that names most first."""
    patterns: list[tuple[str | None, ...]] = [()]
    for value in values:
        choices: tuple[str | None, ...] = (None,) if value is None else (value, EACH)
        patterns = [(*pattern, choice) for pattern in patterns for choice in choices]
    if len(patterns) > 2:
        patterns.sort(key=lambda pattern: pattern.count(EACH))
    return patterns
