"""Quotas as operators set and read them, on a log."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import JsonValue, ValidationError

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatRequested,
    Deployment,
    Event,
    LimitRule,
    Limits,
    ModelRouted,
    Prices,
    QuotaLimitSet,
    TenantConfigured,
    TokenPrice,
)
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant
from klatch_schemas.records import Draft, Partition
from klatch_schemas.topics import ADMISSION_STATE, CHAT_REQUESTS, MODELS, TENANTS, TOPICS, Namespace
from klatch_streams.admission import Admission
from klatch_streams.kernel import Input
from klatch_streams.ledger import Ledger as LedgerTopic
from klatch_streams.ledger import publish
from klatch_streams.memory_log import MemoryLog
from klatch_streams.quota.report import standings
from klatch_streams.snapshots import Snapshots
from klatch_workers.cli import main
from klatch_workers.models_file import write_models
from klatch_workers.quotas import Change, UnknownTenant, read_quota, set_quota, write_prices
from klatch_workers.tenants import tenant_configured, write_tenants

ACME = Tenant("acme")
SPACE = Namespace()
KEY = "klatch-0123456789"


@pytest.fixture
async def log() -> MemoryLog:
    log = MemoryLog({topic.name: 1 for topic in TOPICS})
    await write_tenants(log, SPACE, [tenant_configured(ACME, [KEY], Limits(tokens_per_day=1_000))], by="test")
    return log


def route(dollars: float) -> ModelRouted:
    cheap = Deployment(name="a", url="http://a", prices=Prices(prompt=0.1, completion=0.2))
    dear = Deployment(name="b", url="http://b", prices=Prices(prompt=0.05, completion=dollars))
    return ModelRouted(alias="small", deployments=(cheap, dear, Deployment(name="c", url="http://c")))


def settings(log: MemoryLog) -> list[QuotaLimitSet]:
    said = [codec.decode(record.value) for record in log.records(CHAT_REQUESTS.name)]
    return [one for one in said if isinstance(one, QuotaLimitSet)]


def ask(number: int, person: str, **body: JsonValue) -> Event:
    return ChatRequested(
        request=RequestId(f"r{number}"),
        tenant=ACME,
        conversation=Conversation("c"),
        person=Person(person),
        body={"max_tokens": 84, **body},
    )


async def says(log: MemoryLog, *events: Event) -> None:
    await log.append([codec.draft(CHAT_REQUESTS.name, ACME, event) for event in events])


async def test_a_change_leaves_what_it_does_not_name() -> None:
    before = tenant_configured(ACME, [KEY], Limits(tokens_per_day=1_000))
    after = Change(limits={"requests_per_minute": 5}, weight=2.0).of(before)
    assert after.limits == Limits(tokens_per_day=1_000, requests_per_minute=5)
    assert (after.weight, after.keys, after.priority) == (2.0, before.keys, 0)
    scoped = Change(scope={"person": "*"}, limits={"tokens_per_day": 9}).of(after)
    more = Change(scope={"person": "*"}, limits={"concurrent_requests": 1}).of(scoped)
    assert more.rules == (LimitRule(person="*", limits=Limits(tokens_per_day=9, concurrent_requests=1)),)
    none = Change(scope={"person": "*"}, limits={"tokens_per_day": None, "concurrent_requests": None}).of(more)
    assert none == after


async def test_what_is_set_stands_in_the_tenants_log_and_in_its_history(log: MemoryLog) -> None:
    await set_quota(log, SPACE, ACME, Change({"person": "*"}, {"tokens_per_day": 7}), by="ann")
    await set_quota(log, SPACE, ACME, Change({"person": "*"}, {"tokens_per_day": 7}), by="bob")
    assert [one.by for one in settings(log)] == ["test", "ann"]
    ledger = await read_quota(log, SPACE, ACME, 0)
    assert [(change.by, change.what) for change in ledger.changes] == [
        ("test", ("tokens_per_day: none -> 1000",)),
        ("ann", ("person=* tokens_per_day: none -> 7",)),
    ]


async def test_changes_made_at_once_are_all_kept_and_none_brings_a_key_back(log: MemoryLog) -> None:
    new = tenant_configured(ACME, ["klatch-9876543210"], Limits(tokens_per_day=1_000))
    await asyncio.gather(
        set_quota(log, SPACE, ACME, Change(limits={"requests_per_minute": 5}), by="ann"),
        set_quota(log, SPACE, ACME, Change(limits={"cost_micros_per_month": 6}), by="bob"),
        set_quota(log, SPACE, ACME, Change(weight=2.0), by="cy"),
        write_tenants(log, SPACE, [new], by="up", keep={ACME}),
    )
    in_force = (await read_quota(log, SPACE, ACME, 0)).rules.settings
    async with await LedgerTopic[TenantConfigured].open(log, TENANTS, SPACE, TenantConfigured) as ledger:
        held = ledger.get(ACME)
    assert held
    assert held.keys == new.keys
    for said in (held, in_force):
        assert said.limits == Limits(tokens_per_day=1_000, requests_per_minute=5, cost_micros_per_month=6)
        assert said.weight == 2.0


async def new_prices(log: MemoryLog) -> None:
    await write_prices(log, SPACE, by="models")


async def the_same_limit(log: MemoryLog) -> None:
    await set_quota(log, SPACE, ACME, Change(limits={"tokens_per_day": 900}), by="bob")


async def another_limit(log: MemoryLog) -> None:
    await set_quota(log, SPACE, ACME, Change(limits={"requests_per_minute": 9}), by="bob")


@pytest.mark.parametrize(
    ("other", "more"), [(new_prices, {}), (the_same_limit, {}), (another_limit, {"requests_per_minute": 9})]
)
async def test_what_is_set_is_in_force_whoever_writes_between_its_limits_and_its_ledger(
    other: Callable[[MemoryLog], Awaitable[object]], more: dict[str, int]
) -> None:
    left = -1

    async def writing(_: Sequence[Draft]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            await other(busy)

    busy = MemoryLog({topic.name: 1 for topic in TOPICS}, appending=writing)
    money = Limits(tokens_per_day=1_000, cost_micros_per_day=10)
    await write_tenants(busy, SPACE, [tenant_configured(ACME, [KEY], money)], by="test")
    await publish(busy, MODELS, "small", route(0.7), SPACE)
    left = 2
    said = await set_quota(busy, SPACE, ACME, Change(limits={"tokens_per_day": 500}), by="ann")
    assert left < 0
    assert said.limits == money.model_copy(update={"tokens_per_day": 500, **more})
    async with await LedgerTopic[TenantConfigured].open(busy, TENANTS, SPACE, TenantConfigured) as ledger:
        held = ledger.get(ACME)
    in_force = (await read_quota(busy, SPACE, ACME, 0)).rules.settings
    assert held
    assert (held.limits, held.prices) == (in_force.limits, in_force.prices)
    assert in_force.limits == said.limits


@pytest.mark.parametrize("seed", range(8))
async def test_changes_of_many_at_once_are_all_kept_and_in_force(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret

    async def dawdling(drafts: Sequence[Draft]) -> None:
        for _ in range(chance.randrange(40) * len(drafts)):
            await asyncio.sleep(0)

    busy = MemoryLog({topic.name: 1 for topic in TOPICS}, appending=dawdling)
    await write_tenants(busy, SPACE, [tenant_configured(ACME, [KEY], Limits())], by="test")
    names = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent_requests", "tokens_per_month")
    changes = [Change(limits={name: 5}) for name in names]
    await asyncio.gather(*(set_quota(busy, SPACE, ACME, change, by="ann") for change in changes))
    async with await LedgerTopic[TenantConfigured].open(busy, TENANTS, SPACE, TenantConfigured) as ledger:
        held = ledger.get(ACME)
    assert held
    assert held.limits == Limits.model_validate(dict.fromkeys(names, 5))
    assert (await read_quota(busy, SPACE, ACME, 0)).rules.settings.limits == held.limits
    # Of those who write at once, one is done with every turn.
    assert len(settings(busy)) <= 1 + 5 + 4 + 3 + 2 + 1


async def test_what_somebody_wrote_who_died_of_it_is_written_over(log: MemoryLog) -> None:
    of_nothing = codec.draft(TENANTS.name, ACME, tenant_configured(ACME, [KEY], Limits(tokens_per_day=7)))
    await log.append([of_nothing._replace(headers=[("name", b"x"), ("made-of", b"nothing")])])
    await set_quota(log, SPACE, ACME, Change(limits={"tokens_per_day": 1_000}), by="ann")
    async with await LedgerTopic[TenantConfigured].open(log, TENANTS, SPACE, TenantConfigured) as ledger:
        held = ledger.get(ACME)
    assert held
    assert held.limits.tokens_per_day == settings(log)[-1].limits.tokens_per_day == 1_000
    assert len(settings(log)) == 2


async def test_who_has_no_limits_is_excepted_from_those_of_everybody(log: MemoryLog) -> None:
    ann = {"person": "ann"}
    await set_quota(log, SPACE, ACME, Change({"person": "*"}, {"tokens_per_day": 7}), by="op")
    said = await set_quota(log, SPACE, ACME, Change(ann, {"tokens_per_day": None}), by="op")
    assert LimitRule(person="ann", limits=Limits()) in said.rules
    await set_quota(log, SPACE, ACME, Change(ann, {"requests_per_minute": 5}), by="op")
    said = await set_quota(log, SPACE, ACME, Change(ann, {"requests_per_minute": None}), by="op")
    assert LimitRule(person="ann", limits=Limits()) in said.rules, "taking a limit away adds none"
    await set_quota(log, SPACE, ACME, Change({"person": "*"}, {"tokens_per_day": None}), by="op")
    said = await set_quota(log, SPACE, ACME, Change(ann, {"tokens_per_day": None}), by="op")
    assert not said.rules


async def test_a_model_named_by_half_a_surrogate_pair_is_counted_and_shown(log: MemoryLog) -> None:
    await set_quota(log, SPACE, ACME, Change({"model": "*"}, {"requests_per_minute": 1}), by="op")
    await says(log, *(ask(number, "ann", model="m\ud800") for number in (1, 2)))
    shown = [one for one in standings(await read_quota(log, SPACE, ACME, 0)) if one.scope]
    assert [(one.scope, one.used) for one in shown] == [({"model": "m\ud800"}, 1)]


async def test_a_limit_with_a_burst_stands_as_clients_are_told_of_it(log: MemoryLog) -> None:
    change = Change(limits={"requests_per_minute": 10, "burst_requests": 30, "tokens_per_day": None})
    await set_quota(log, SPACE, ACME, change, by="op")
    await says(log, ask(1, "ann"))
    said = [(one.limit, one.most, one.used) for one in standings(await read_quota(log, SPACE, ACME, 0))]
    assert said == [("requests_per_minute", 40, 1), ("requests_per_hour", 600, 1)]


async def test_a_tenant_that_does_not_exist_is_told_with_those_that_do(log: MemoryLog) -> None:
    unknown = r"no tenant 'acne'.*did you mean acme\?.*holds acme.*klatch tenants apply"
    with pytest.raises(UnknownTenant, match=unknown):
        await set_quota(log, SPACE, Tenant("acne"), Change(weight=2.0), by="")
    with pytest.raises(UnknownTenant, match=unknown):
        await read_quota(log, SPACE, Tenant("acne"), 0)
    with pytest.raises(ValidationError):
        await set_quota(log, SPACE, ACME, Change(weight=1_000.0), by="")


async def test_a_tenant_that_only_admission_knows_is_shown(log: MemoryLog) -> None:
    direct = QuotaLimitSet(tenant=Tenant("direct"), limits=Limits(tokens_per_day=5))
    await log.append([codec.draft(CHAT_REQUESTS.name, "direct", direct)])
    [only] = standings(await read_quota(log, SPACE, Tenant("direct"), 0))
    assert (only.limit, only.most) == ("tokens_per_day", 5)


async def test_the_topic_table_names_operators_wherever_their_commands_write() -> None:
    written = set[str]()

    async def note(drafts: Sequence[Draft]) -> None:
        written.update(draft.topic for draft in drafts)

    noted = MemoryLog({topic.name: 1 for topic in TOPICS}, appending=note)
    await write_tenants(noted, SPACE, [tenant_configured(ACME, [KEY], Limits())], by="test")
    await set_quota(noted, SPACE, ACME, Change(limits={"cost_micros_per_day": 10}), by="ann")
    await write_models(noted, SPACE, [route(0.7)])
    assert written == {CHAT_REQUESTS.name, TENANTS.name, MODELS.name}
    assert not [topic.name for topic in TOPICS if topic.name in written and "operators" not in topic.written_by]


async def test_what_stands_is_set_again_where_that_is_asked_for(log: MemoryLog) -> None:
    for again in (False, True):
        await set_quota(log, SPACE, ACME, Change(), by="ann", again=again)
    assert [(one.by, one.limits.tokens_per_day) for one in settings(log)] == [("test", 1_000), ("ann", 1_000)]


@pytest.mark.parametrize("snapshot_after", [None, 1, 3])
async def test_where_a_tenant_stands_is_admissions_ledger_whatever_a_snapshot_holds(
    log: MemoryLog, snapshot_after: int | None
) -> None:
    each = Change({"person": "*"}, {"tokens_per_day": 500})
    await set_quota(log, SPACE, ACME, each, by="ann")
    await says(log, ask(1, "ann"), ask(2, "ann"), ask(3, "bob"))
    records = log.records(CHAT_REQUESTS.name)
    if snapshot_after is not None:
        admission, state = Admission(), Admission().initial(ACME)
        for record in records[: snapshot_after + 1]:
            event = codec.decode(record.value)
            assert isinstance(event, Event)
            state, _ = admission.decide(state, Input(event, record.timestamp_ms))
        snapshots = await Snapshots.open(log, Partition(ADMISSION_STATE.name, 0), 0)
        await snapshots.write([(ACME, snapshot_after, admission.dump(state))])
    ledger = await read_quota(log, SPACE, ACME, records[-1].timestamp_ms)
    found = {(tuple(one.scope.items()), one.limit): (one.used, one.left) for one in standings(ledger)}
    assert found == {
        ((), "tokens_per_day"): (300, 700),
        ((("person", "ann"),), "tokens_per_day"): (200, 300),
        ((("person", "bob"),), "tokens_per_day"): (100, 400),
    }


async def test_tenants_whose_money_is_limited_get_the_highest_price_of_each_route(log: MemoryLog) -> None:
    await publish(log, MODELS, "small", route(0.4), SPACE)
    await set_quota(log, SPACE, ACME, Change(limits={"cost_micros_per_day": 10}), by="ann")
    assert settings(log)[-1].prices == {"small": TokenPrice(prompt=100_000, completion=400_000)}
    await publish(log, MODELS, "small", route(0.5), SPACE)
    assert await write_prices(log, SPACE, by="models") == [ACME]
    assert await write_prices(log, SPACE, by="models") == []
    assert settings(log)[-1].prices["small"].completion == 500_000
    assert settings(log)[-1].limits == Limits(tokens_per_day=1_000, cost_micros_per_day=10)


@pytest.mark.parametrize("append", range(2, 6))
async def test_prices_bring_nothing_back_that_is_changed_meanwhile(append: int) -> None:
    limits, left = Limits(cost_micros_per_day=10), 0
    old, new = (tenant_configured(ACME, [key], limits) for key in (KEY, "klatch-9876543210"))

    async def replacing_the_key(_: Sequence[Draft]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            await publish(busy, TENANTS, ACME, new, SPACE)

    busy = MemoryLog({topic.name: 1 for topic in TOPICS}, appending=replacing_the_key)
    await write_tenants(busy, SPACE, [tenant_configured(Tenant("aaa"), [], limits), old], by="test")
    left = append  # the first puts the route into its ledger, then come two for each tenant
    await write_models(busy, SPACE, [route(0.7)])
    assert left < 0
    async with await LedgerTopic[TenantConfigured].open(busy, TENANTS, SPACE, TenantConfigured) as ledger:
        held = {one.tenant: one for one in ledger.values()}
    assert held[ACME].keys == new.keys
    assert {one.prices["small"].completion for one in held.values()} == {700_000}


async def test_tenants_whose_money_is_not_limited_need_no_prices(log: MemoryLog) -> None:
    await publish(log, MODELS, "small", route(0.4), SPACE)
    assert await write_prices(log, SPACE, by="models") == []
    await set_quota(log, SPACE, ACME, Change(weight=3.0), by="ann")
    assert settings(log)[-1].prices == {}


async def test_a_tenant_that_keeps_its_limits_gets_only_its_keys(log: MemoryLog) -> None:
    await set_quota(log, SPACE, ACME, Change({"person": "*"}, {"tokens_per_day": 7}, None, None), by="ann")
    new = tenant_configured(ACME, ["klatch-9876543210"], Limits())
    assert await write_tenants(log, SPACE, [new], by="up", keep={ACME}) == [ACME]
    assert settings(log)[-1].limits == Limits(tokens_per_day=1_000)
    assert settings(log)[-1].rules == (LimitRule(person="*", limits=Limits(tokens_per_day=7)),)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["acme"], "nothing to set: name a limit"),
        (["acme", "--tokens-per-day", "many"], "neither a whole number nor `none`"),
        (["acme", "--tokens-per-day", "-3"], "neither a whole number nor `none`"),
        (["acme", "--cost-per-day", "ten"], "neither an amount of US dollars, such as 12.50"),
        (["acme", "--cost-per-day", "0.0000001"], "counted in millionths"),
        (["acme", "--cost-per-day", "inf"], "counted in millionths"),
        (["acme", "--cost-per-day", "1e999999"], "'--cost-per-day': '1e999999' is not between 0 and 1,000,000,000"),
        (["acme", "--cost-per-day", "1000000000.01"], "is not between 0 and 1,000,000,000"),
        (["acme", "--tokens-per-day", "9" * 5_000], "'--tokens-per-day': '9999"),
        (["acme", "--tokens-per-day", "9" * 5_000], "is not between 0 and 1,000,000,000,000,000"),
        (["acme", "--tokens-per-day", "1000000000000001"], "is not between 0 and 1,000,000,000,000,000"),
        (["acme", "--person", "*", "--weight", "2"], "are the whole tenant's"),
        (["acme", "--priority", "12"], "0<=x<=9"),
    ],
)
def test_a_command_that_makes_no_sense_says_what_would(arguments: list[str], told: str) -> None:
    result: Any = CliRunner().invoke(main, ["quota", "set", *arguments])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


async def test_a_route_that_changes_brings_its_price_to_those_whose_money_is_limited(log: MemoryLog) -> None:
    await set_quota(log, SPACE, ACME, Change(limits={"cost_micros_per_day": 10}), by="ann")
    await write_models(log, SPACE, [route(0.7)])
    assert (settings(log)[-1].prices["small"].completion, settings(log)[-1].by) == (700_000, "klatch models")
