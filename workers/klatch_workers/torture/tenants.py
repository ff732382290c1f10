"""The tenants of the load: two without limits to speak of, one that everything limits, one with people and money; and
one that floods.

What the limited ones may use is far less than what they ask for, so that every limit refuses something, and it is
changed while they ask: limits are checked against what was in force at each place of the log.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from klatch_schemas.events import Deployment, LimitRule, Limits, ModelRouted, Prices, TenantConfigured
from klatch_schemas.ids import Person, Tenant
from klatch_workers.quotas import Change
from klatch_workers.tenants import tenant_configured

FREE: Final = (Tenant("torture-a"), Tenant("torture-b"))
TIGHT: Final = Tenant("torture-tight")
PEOPLE: Final = Tenant("torture-people")
FLOODING: Final = Tenant("torture-flood")
"""Asks much at once, of which nearly all is refused."""
TALKING: Final = (*FREE, TIGHT, PEOPLE)
LIMITED: Final = (TIGHT, PEOPLE, FLOODING)
"""Being refused by a limit is what they are here for."""
TENANTS: Final = (*FREE, *LIMITED)

PERSONS: Final = (Person("ann"), Person("bob"), Person("eve"))
PRICED: Final = "priced"
"""The model of `PEOPLE`: the one that has a price."""
PRICES: Final = Prices(prompt=1.0, completion=10.0)
"""Of that model."""
PRICED_TOKENS: Final = 30
PRICED_RATE: Final = 40.0

_CHANGES_S: Final = (7.0, 11.0, 5.0, 9.0)
_FREELY: Final = Limits(requests_per_minute=10**6, tokens_per_day=10**12, concurrent_requests=10**6)
"""Out of the load's reach, but counted: replies have credit, and the judge adds it all up."""
_TIGHTLY: Final = Limits(requests_per_minute=20, tokens_per_minute=2_500, tokens_per_day=6_000, concurrent_requests=3)
_A_PERSON: Final = Limits(requests_per_minute=6, burst_requests=3, concurrent_requests=2, tokens_per_month=3_000)
_OF_A_FLOOD: Final = Limits(requests_per_minute=10)
_MONEY: Final = Limits(cost_micros_per_day=30_000, cost_micros_per_month=90_000)


def shares(limited: float) -> tuple[float, ...]:
    """Of the conversations, by tenant of `TALKING`, if so many are those of tenants with limits."""
    free = (1 - limited) / len(FREE)
    return (free, free, limited * 10 / 18, limited * 8 / 18)


def configured(tenant: Tenant, key: str) -> TenantConfigured:
    """A tenant as it stands in the ledger when the load begins."""
    if tenant == TIGHT:
        return tenant_configured(tenant, [key], _TIGHTLY)
    if tenant == FLOODING:
        return tenant_configured(tenant, [key], _OF_A_FLOOD)
    if tenant == PEOPLE:
        each = LimitRule(person="*", limits=_A_PERSON)
        return tenant_configured(tenant, [key], _MONEY).model_copy(update={"rules": (each,)})
    return tenant_configured(tenant, [key], _FREELY)


def priced_route(script: str) -> ModelRouted:
    """The route of the model that has a price; `script` is what the model server reads as its name."""
    deployment = Deployment(name="priced", kind="local", model=script, continues="prefill", prices=PRICES)
    return ModelRouted(alias=PRICED, deployments=(deployment,))


class QuotaSet(NamedTuple):
    """A change that an operator makes."""

    at_s: float
    """Seconds after the load began."""
    tenant: Tenant
    change: Change


def changes(minutes: float) -> Iterator[QuotaSet]:
    """What operators change during a load of so many minutes: rates up and down, budgets only up."""
    at, rounds = 0.0, 0
    while True:
        rounds += 1
        for pause, (tenant, change) in zip(_CHANGES_S, _round(1 + rounds, narrow=rounds % 2 == 1), strict=True):
            at += pause
            if at > minutes * 60:
                return
            yield QuotaSet(at, tenant, change)


def _round(more: int, *, narrow: bool) -> Iterator[tuple[Tenant, Change]]:
    rate = 10 if narrow else 30
    yield TIGHT, Change({}, {"concurrent_requests": 2 if narrow else 4})
    yield TIGHT, Change({}, {"tokens_per_day": 6_000 * more, "requests_per_minute": rate})
    of_each = {"requests_per_minute": 3 if narrow else 12, "tokens_per_month": 3_000 * more}
    yield PEOPLE, Change({"person": "*"}, of_each)
    yield PEOPLE, Change({}, {"cost_micros_per_day": 30_000 * more, "cost_micros_per_month": 90_000 * more})
