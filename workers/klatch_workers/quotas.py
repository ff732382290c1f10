"""A tenant's quotas, for operators: change its settings, and read where it stands from the log itself.

Where a tenant stands is admission's own ledger, made again: its snapshot, and what the tenant's log says since,
folded by the decider. So it is as true as a decision made now would be.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from klatch_schemas import codec
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import LimitRule, Limits, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_schemas.records import Partition, Record, partition_of
from klatch_schemas.topics import ADMISSION_STATE, CHAT_REQUESTS, TENANTS, Namespace
from klatch_streams.admission import Admission, advanced
from klatch_streams.catch_up import catch_up
from klatch_streams.kernel import Input
from klatch_streams.ledger import Ledger as LedgerTopic
from klatch_streams.log import Log
from klatch_streams.quota.ledger import Ledger
from klatch_streams.quota.rules import DIMENSIONS, names_of, patterns
from klatch_streams.snapshots import look
from klatch_workers.nearest import did_you_mean
from klatch_workers.tenants import limits_money, write_tenants


class UnknownTenant(LookupError):
    """The ledger holds no such tenant; names the nearest, and those it holds."""

    def __init__(self, tenant: str, known: Sequence[str]) -> None:
        named = ", ".join(known[:20]) or "none"
        hint = did_you_mean(tenant, known)
        super().__init__(
            f"no tenant {tenant!r} in the ledger{hint and f' ({hint})'}: it holds {named}. "
            "`klatch tenants apply FILE` adds tenants"
        )


@dataclass(frozen=True, slots=True)
class Change:
    """What to set; what is left out stays."""

    scope: Mapping[str, str] = field(default_factory=dict[str, str])
    """Dimension to name or `*`; empty for the whole tenant."""
    limits: Mapping[str, int | None] = field(default_factory=dict[str, int | None])
    """By the names of `Limits`; None takes a limit away."""
    weight: float | None = None
    priority: int | None = None

    def of(self, tenant: TenantConfigured) -> TenantConfigured:
        """The tenant, changed. Raises pydantic's ValidationError."""
        more: dict[str, object] = {}
        if self.scope:
            more["rules"] = self._rules(tenant.rules)
        else:
            more["limits"] = _changed(tenant.limits, self.limits)
        if self.weight is not None:
            more["weight"] = self.weight
        if self.priority is not None:
            more["priority"] = self.priority
        return TenantConfigured.model_validate({**tenant.model_dump(), **more})

    def _rules(self, rules: tuple[LimitRule, ...]) -> tuple[LimitRule, ...]:
        names = tuple(self.scope.get(dimension) for dimension in DIMENSIONS)
        others = [rule for rule in rules if names_of(rule) != names]
        before = next((rule.limits for rule in rules if names_of(rule) == names), Limits())
        limits = _changed(before, self.limits)
        broader = patterns(names)
        if limits == Limits() and not any(names_of(rule) in broader for rule in others):
            return tuple(others)
        # An empty rule stands where a broader one would apply again without it: it excepts from that.
        return (*others, LimitRule.model_validate({**self.scope, "limits": limits}))


async def set_quota(
    log: Log, namespace: Namespace, tenant: Tenant, change: Change, by: str, *, again: bool = False
) -> TenantConfigured:
    """Change a tenant's settings; `again`: write them also if nothing changes. In force for the next request.

    Changes that are made at the same time are all kept.
    Raises UnknownTenant, ValidationError, LogError.
    """
    held, position = await _held(log, namespace, tenant)
    [changed], _ = await _write(log, namespace, [held], position, change.of, by, again=again)
    return changed


async def write_prices(log: Log, namespace: Namespace, by: str) -> list[Tenant]:
    """After routes changed: give tenants whose money is limited the prices that stand now; returns those changed.

    What is changed of them at the same time is kept. Raises LogError.
    """
    async with await LedgerTopic[TenantConfigured].open(log, TENANTS, namespace, TenantConfigured) as ledger:
        held, position = [tenant for tenant in ledger.values() if limits_money(tenant)], ledger.position
    _, written = await _write(log, namespace, held, position, lambda tenant: tenant, by)
    return sorted(written)


async def _write(
    log: Log,
    namespace: Namespace,
    held: Sequence[TenantConfigured],
    position: int,
    change: Callable[[TenantConfigured], TenantConfigured],
    by: str,
    *,
    again: bool = False,
) -> tuple[list[TenantConfigured], set[Tenant]]:
    """Change tenants, read up to `position`; returns them as they are now, and whose record was written."""
    since, written = dict.fromkeys((tenant.tenant for tenant in held), position), set[Tenant]()
    now, stale = dict[Tenant, TenantConfigured](), held
    while stale:
        changed = {tenant.tenant: change(tenant) for tenant in stale}
        now |= changed
        written.update(await write_tenants(log, namespace, list(changed.values()), by, again=again))
        # What somebody else said since a tenant was read stays, and this change is made of that.
        stale, since = await _overwritten(log, namespace, changed, since)
    return list(now.values()), written


async def _held(log: Log, namespace: Namespace, tenant: Tenant) -> tuple[TenantConfigured, int]:
    """What the ledger holds of a tenant, and up to where it was read."""
    async with await LedgerTopic[TenantConfigured].open(log, TENANTS, namespace, TenantConfigured) as ledger:
        held = ledger.get(tenant)
        if held is None:
            raise UnknownTenant(tenant, sorted(one.tenant for one in ledger.values()))
        return held, ledger.position


async def _overwritten(
    log: Log, namespace: Namespace, written: Mapping[Tenant, TenantConfigured], since: Mapping[Tenant, int]
) -> tuple[list[TenantConfigured], dict[Tenant, int]]:
    """What was said of tenants from `since` on, before what was written over it; and where to look from next time."""
    topic = Partition(namespace.of(TENANTS), 0)
    _, end = await log.bounds(topic)
    between, places = dict[Tenant, TenantConfigured](), dict[Tenant, int]()
    tail = await log.tail()
    try:
        async for records in catch_up(tail, topic, min(since[tenant] for tenant in written), end):
            for record in records:
                said = _configured(record)
                ours = written.get(said.tenant) if said else None
                if not (said and ours) or said.tenant in places or record.offset < since[said.tenant]:
                    continue
                if said.model_copy(update={"prices": ours.prices}) == ours:
                    places[said.tenant] = record.offset + 1
                else:
                    between[said.tenant] = said
    finally:
        await tail.close()
    # Of a tenant without a place nothing was written: the ledger says so already.
    return [said for tenant, said in between.items() if tenant in places], places


def _configured(record: Record) -> TenantConfigured | None:
    try:
        said = codec.decode_as(TenantConfigured, record.value)
    except Unreadable:
        return None
    return said if record.key == said.tenant.encode() else None


async def read_quota(log: Log, namespace: Namespace, tenant: Tenant, now_ms: int) -> Ledger:
    """Admission's ledger of a tenant, as of the log's end and `now_ms`.

    Raises UnknownTenant if neither the tenants ledger nor admission knows it, LogError, StateLost.
    """
    topic = namespace.of(CHAT_REQUESTS)
    number = partition_of(tenant.encode(), await log.partitions(topic))
    admission = Admission()
    saved = (await look(log, Partition(namespace.of(ADMISSION_STATE), number))).get(tenant)
    state = admission.load(tenant, dict(saved.parts)) if saved else admission.initial(tenant)
    first, end = await log.bounds(Partition(topic, number))
    tail = await log.tail()
    known = saved is not None
    try:
        async for records in catch_up(
            tail, Partition(topic, number), max(first, saved.applied + 1 if saved else 0), end
        ):
            for record in records:
                if record.key == tenant.encode():
                    known = True
                    state = _decided(admission, state, record.value, record.timestamp_ms)
    finally:
        await tail.close()
    if not known:
        await _held(log, namespace, tenant)
    return advanced(state, now_ms)


def _decided(admission: Admission, state: Ledger, value: bytes | None, timestamp_ms: int) -> Ledger:
    try:
        event = codec.decode(value)
    except Unreadable:
        return state
    return state if isinstance(event, Delta) else admission.decide(state, Input(event, timestamp_ms))[0]


def _changed(limits: Limits, changes: Mapping[str, int | None]) -> Limits:
    return Limits.model_validate({**limits.model_dump(), **changes})
