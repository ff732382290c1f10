"""A tenant's quotas, for operators: change its settings, and read where it stands from the log itself.

Where a tenant stands is admission's own ledger, made again: its snapshot, and what the tenant's log says since,
folded by the decider. So it is as true as a decision made now would be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from klatch_schemas import codec
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import LimitRule, Limits, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_schemas.records import Partition, partition_of
from klatch_schemas.topics import ADMISSION_STATE, CHAT_REQUESTS, Namespace
from klatch_streams.admission import Admission, advanced
from klatch_streams.catch_up import catch_up
from klatch_streams.kernel import Input
from klatch_streams.log import Log
from klatch_streams.quota.ledger import Ledger
from klatch_streams.quota.rules import DIMENSIONS, names_of, patterns
from klatch_streams.snapshots import look
from klatch_workers.nearest import did_you_mean
from klatch_workers.standing import Standing
from klatch_workers.tenants import change_tenants, limits_money


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
    await _known(log, namespace, tenant)

    def made_of(held: TenantConfigured | None) -> TenantConfigured:
        if held is None:
            raise UnknownTenant(tenant, ())
        return change.of(held)

    now, _ = await change_tenants(log, namespace, {tenant: made_of}, by, again=again)
    return now[tenant]


async def write_prices(log: Log, namespace: Namespace, by: str) -> list[Tenant]:
    """After routes changed: give tenants whose money is limited the prices that stand now; returns those changed.

    What is changed of them at the same time is kept. Raises LogError.
    """
    held = [tenant for tenant in (await Standing.read(log, namespace)).values() if limits_money(tenant)]
    changes = {one.tenant: partial(_itself, one) for one in held}
    _, written = await change_tenants(log, namespace, changes, by)
    return sorted(written)


def _itself(read: TenantConfigured, held: TenantConfigured | None) -> TenantConfigured:
    return held or read


async def _known(log: Log, namespace: Namespace, tenant: Tenant) -> None:
    standing = await Standing.read(log, namespace)
    if standing.get(tenant) is None:
        raise UnknownTenant(tenant, sorted(one.tenant for one in standing.values()))


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
        await _known(log, namespace, tenant)
    return advanced(state, now_ms)


def _decided(admission: Admission, state: Ledger, value: bytes | None, timestamp_ms: int) -> Ledger:
    try:
        event = codec.decode(value)
    except Unreadable:
        return state
    return state if isinstance(event, Delta) else admission.decide(state, Input(event, timestamp_ms))[0]


def _changed(limits: Limits, changes: Mapping[str, int | None]) -> Limits:
    return Limits.model_validate({**limits.model_dump(), **changes})
