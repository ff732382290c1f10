"""Prices of routes that change while tenants are written."""

from collections.abc import Sequence

import pytest

from klatch_schemas import codec
from klatch_schemas.events import Deployment, Limits, ModelRouted, Prices, QuotaLimitSet, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_REQUESTS, MODELS, TENANTS, TOPICS, Namespace
from klatch_streams.ledger import Ledger, publish
from klatch_streams.memory_log import MemoryLog
from klatch_workers.models_file import write_models
from klatch_workers.quotas import Change, read_quota, set_quota, write_prices
from klatch_workers.tenants import tenant_configured, write_tenants

ACME = Tenant("acme")
SPACE = Namespace()
KEY = "klatch-0123456789"


def route(dollars: float) -> ModelRouted:
    priced = Deployment(name="a", url="http://a", prices=Prices(prompt=0.1, completion=dollars))
    return ModelRouted(alias="small", deployments=(priced,))


def settings(log: MemoryLog) -> list[QuotaLimitSet]:
    said = [codec.decode(record.value) for record in log.records(CHAT_REQUESTS.name)]
    return [one for one in said if isinstance(one, QuotaLimitSet)]


@pytest.mark.parametrize("limited", [True, False])
async def test_prices_that_change_while_a_tenant_is_written_reach_it(limited: bool) -> None:
    left = -1

    async def routing(_: Sequence[Draft]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            # To the ledger this brings nothing: it says that price already, or knows of no limit of money.
            await write_models(busy, SPACE, [route(0.7)])

    busy = MemoryLog({topic.name: 1 for topic in TOPICS}, appending=routing)
    await publish(busy, MODELS, "small", route(0.7), SPACE)
    limits = Limits(cost_micros_per_day=10) if limited else Limits()
    await write_tenants(busy, SPACE, [tenant_configured(ACME, [KEY], limits)], by="test")
    await publish(busy, MODELS, "small", route(0.9), SPACE)
    left = 1
    if limited:
        assert await write_prices(busy, SPACE, by="models") == [ACME]
    else:
        said = await set_quota(busy, SPACE, ACME, Change(limits={"cost_micros_per_day": 10}), by="ann")
        assert said.prices["small"].completion == 700_000
    assert left < 0
    async with await Ledger[TenantConfigured].open(busy, TENANTS, SPACE, TenantConfigured) as ledger:
        held = ledger.get(ACME)
    assert held
    assert held.prices["small"].completion == settings(busy)[-1].prices["small"].completion == 700_000


async def test_a_tenant_that_is_changed_while_its_prices_are_looked_at_again_stays_so() -> None:
    left = 100

    async def routing(_: Sequence[Draft]) -> None:
        nonlocal left
        left -= 1
        if left == 1:
            await publish(busy, MODELS, "small", route(0.7), SPACE)
        elif left == -2:  # the publishing above was one append, ann's record another; this is her second time
            await set_quota(busy, SPACE, ACME, Change(limits={"cost_micros_per_day": 30}), by="bob")

    busy = MemoryLog({topic.name: 1 for topic in TOPICS}, appending=routing)
    await write_tenants(busy, SPACE, [tenant_configured(ACME, [KEY], Limits())], by="test")
    await publish(busy, MODELS, "small", route(0.9), SPACE)
    left = 2
    said = await set_quota(busy, SPACE, ACME, Change(limits={"cost_micros_per_day": 10}), by="ann")
    in_force = (await read_quota(busy, SPACE, ACME, 0)).rules.settings
    assert said.limits == in_force.limits == Limits(cost_micros_per_day=30)
    assert in_force.prices["small"].completion == 700_000
