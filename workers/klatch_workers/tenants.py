"""Tenants: who may speak, by which keys, within which limits; from a file into the ledger.

The file is TOML, or JSON of the same shape:

[tenants.acme]
keys = ["klatch-…", "sha256:9f86d081…"]     # API keys, or their sha256 so that the file holds no secret
[tenants.acme.limits]                    # each may be left out: no limit
requests_per_minute = 60
tokens_per_minute = 50000
tokens_per_day = 1000000
concurrent_requests = 8
[[tenants.acme.rules]]                   # limits of a part: a use case, a person, a model; "*" is each by itself
person = "*"
limits = { tokens_per_day = 20000 }

`weight` and `priority` may stand beside `keys`; docs/quotas.md tells what all of it means.
"""

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from klatch_schemas.codec import draft, explain
from klatch_schemas.events import (
    ApiKey,
    LimitRule,
    Limits,
    ModelRouted,
    PriorityClass,
    QuotaLimitSet,
    TenantConfigured,
    TokenPrice,
    Weight,
)
from klatch_schemas.ids import Tenant, TenantField
from klatch_schemas.topics import CHAT_REQUESTS, MODELS, TENANTS, Namespace
from klatch_streams.ledger import Ledger
from klatch_streams.log import Log
from klatch_workers.standing import Standing

_HASHED: Final = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_ONE: Final = "a key speaks for one tenant, so give each its own"


class TenantsFileError(ValueError):
    """The tenants file cannot be used; names file, field and fix."""


class KeyTaken(TenantsFileError):
    """A key that is given to a tenant speaks for another already; names both, and of the key its id."""


def _digest(key: str) -> str:
    """The sha256 of a key, which may be given instead of it. Raises ValueError, which does not repeat it."""
    hashed = _HASHED.fullmatch(key)
    if key[:7].lower() == "sha256:" and not hashed:
        # Hashed as a key, it would let in whoever says what the file holds so that it need not be secret.
        raise ValueError("`sha256:` needs the 64 hex digits of a key's hash behind it")
    return hashed[1].lower() if hashed else hashlib.sha256(key.encode()).hexdigest()


def _usable(key: str) -> str:
    _digest(key)
    return key


class _Tenant(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Annotated[str, StringConstraints(min_length=8), AfterValidator(_usable)]] = Field(
        default_factory=list[str]
    )
    limits: Limits = Limits()
    rules: tuple[LimitRule, ...] = Field(default=(), max_length=500)
    weight: Weight = 1.0
    priority: PriorityClass = 0


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenants: dict[TenantField, _Tenant]


def read_tenants(path: Path) -> list[TenantConfigured]:
    """The tenants that a file names. Raises TenantsFileError."""
    try:
        raw = path.read_text()
        document = json.loads(raw) if path.suffix == ".json" else tomllib.loads(raw)
        file = _File.model_validate(document)
    except OSError as error:
        raise TenantsFileError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise TenantsFileError(f"{path}: {explain(error)}") from error
    except ValueError as error:
        raise TenantsFileError(f"{path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    tenants = [_configured(path, name, tenant) for name, tenant in file.tenants.items()]
    owners = dict[str, Tenant]()
    for tenant in tenants:
        if taken := _taken(tenant.keys, owners):
            key, other = taken
            raise TenantsFileError(
                f"{path}: tenants.{other} and tenants.{tenant.tenant} have one key, {key.id}…: {_ONE}"
            )
        owners |= _owners([tenant])
    return tenants


def _configured(path: Path, name: Tenant, said: _Tenant) -> TenantConfigured:
    for number, rule in enumerate(said.rules, 1):
        if not (rule.use_case or rule.person or rule.model):
            raise TenantsFileError(
                f"{path}: tenants.{name}.rules: rule {number} names no use_case, person or model; the tenant's own "
                "limits stand in `limits`"
            )
    configured = tenant_configured(name, said.keys, said.limits)
    return configured.model_copy(update={"rules": said.rules, "weight": said.weight, "priority": said.priority})


def tenant_configured(name: Tenant, keys: list[str], limits: Limits) -> TenantConfigured:
    """A tenant for the ledger; of its keys only the hashes. Raises ValueError for a `sha256:` that is none."""
    return TenantConfigured(tenant=name, keys=tuple(_key(key) for key in keys), limits=limits)


async def write_tenants(
    log: Log,
    namespace: Namespace,
    tenants: Sequence[TenantConfigured],
    by: str,
    *,
    keep: Collection[Tenant] = (),
    again: bool = False,
) -> list[Tenant]:
    """Put tenants into the ledger, and their limits into their own logs; returns those that were written.

    These are the ones that differ from what the ledger holds, or with `again` all: what stands there may have died on
    its way through a tenant's own log. Tenants of `keep` keep the limits that they have. Those whose money is limited
    get the prices of the routes that stand now. Raises KeyTaken before anything is written, and LogError.
    """

    def of(said: TenantConfigured) -> Callable[[TenantConfigured | None], TenantConfigured]:
        kept = said.tenant in keep
        return lambda held: said.model_copy(update=_limits_of(held)) if held and kept else said

    changes = {said.tenant: of(said) for said in tenants}
    _, written = await change_tenants(log, namespace, changes, by, again=again)
    return written


async def change_tenants(
    log: Log,
    namespace: Namespace,
    changes: Mapping[Tenant, Callable[[TenantConfigured | None], TenantConfigured]],
    by: str,
    *,
    again: bool = False,
) -> tuple[dict[Tenant, TenantConfigured], list[Tenant]]:
    """As `write_tenants`, by what is to be made of a tenant that stands, or of None; returns also what was made.

    What others change at the same time stays; a change is made again of that.
    """
    now, written, open_ = dict[Tenant, TenantConfigured](), set[Tenant](), set(changes)
    refused, done = set[Tenant](), set[Tenant]()
    while open_:
        standing = await Standing.read(log, namespace)
        # After the ledger, so that whoever reads other prices finds that it was written.
        prices = await read_prices(log, namespace)
        made = {tenant: _made(change, standing.get(tenant), done=tenant in done) for tenant, change in changes.items()}
        said = [_priced(one, prices) for tenant, one in made.items() if tenant in open_]
        _refuse_taken(said, standing.values())
        places = dict[Tenant, int]()
        for tenant in said:
            now[tenant.tenant] = tenant
            # Who was refused writes the limits too, even if the ledger says them by now: of two who write at once, the
            # last in the ledger need not be the last in the tenant's own log.
            if again or tenant.tenant in refused or not standing.says(tenant):
                places[tenant.tenant] = await _place(log, namespace, standing, tenant, by)
        written.update(places)
        vain = (await Standing.read(log, namespace)).refused if places else set[int]()
        refused = {tenant for tenant, place in places.items() if place in vain}
        done |= open_ - refused
        # Whoever changed the routes meanwhile may have found nothing to do: these prices were not in the ledger yet.
        prices, again = await read_prices(log, namespace), False
        open_ = refused | {tenant for tenant, stands in now.items() if _priced(stands, prices) != stands}
    return now, [tenant for tenant in changes if tenant in written]


def _made(
    change: Callable[[TenantConfigured | None], TenantConfigured], held: TenantConfigured | None, *, done: bool
) -> TenantConfigured:
    """Of what is done, only prices are still open: what others make of it stays."""
    return held if held and done else change(held)


async def _place(log: Log, namespace: Namespace, standing: Standing, tenant: TenantConfigured, by: str) -> int:
    # Decisions have one order: the limits in force are those in the tenant's own log. They come first, so that a
    # crash between the two is mended by writing again.
    limits = QuotaLimitSet.model_validate({"tenant": tenant.tenant, "by": by, **_limits_of(tenant)})
    await log.append([draft(namespace.of(CHAT_REQUESTS), tenant.tenant, limits)])
    record = draft(namespace.of(TENANTS), tenant.tenant, tenant)
    [(_, place)] = await log.append([record._replace(headers=[*record.headers, *standing.headers(tenant.tenant)])])
    return place


def _priced(tenant: TenantConfigured, prices: Mapping[str, TokenPrice]) -> TenantConfigured:
    return tenant.model_copy(update={"prices": prices if limits_money(tenant) else {}})


async def read_prices(log: Log, namespace: Namespace) -> dict[str, TokenPrice]:
    """By alias, the highest price of any deployment of its route: what a request for it may cost at most."""
    async with await Ledger[ModelRouted].open(log, MODELS, namespace, ModelRouted) as ledger:
        priced = [(route.alias, [one.prices for one in route.deployments if one.prices]) for route in ledger.values()]
    return {
        alias: TokenPrice(
            prompt=max(_micros(one.prompt) for one in prices),
            completion=max(_micros(one.completion) for one in prices),
        )
        for alias, prices in sorted(priced)
        if prices
    }


def limits_money(tenant: TenantConfigured) -> bool:
    """Whether any of a tenant's limits is one of money."""
    limits = (tenant.limits, *(rule.limits for rule in tenant.rules))
    return any(one.cost_micros_per_day is not None or one.cost_micros_per_month is not None for one in limits)


def _limits_of(tenant: TenantConfigured) -> dict[str, object]:
    return {name: getattr(tenant, name) for name in ("limits", "rules", "weight", "priority", "prices")}


def _micros(dollars: float) -> int:
    return math.ceil(round(dollars * 1_000_000, 3))


def _refuse_taken(tenants: Sequence[TenantConfigured], standing: Collection[TenantConfigured]) -> None:
    named = {tenant.tenant for tenant in tenants}
    owners = _owners(tenant for tenant in standing if tenant.tenant not in named)
    before = {tenant.tenant: tenant.keys for tenant in standing}
    for tenant in tenants:
        # Who has it already keeps it: a change of limits or prices writes the keys that stand.
        new = [key for key in tenant.keys if key not in before.get(tenant.tenant, ())]
        if taken := _taken(new, owners):
            key, other = taken
            raise KeyTaken(
                f"tenants.{tenant.tenant}.keys: the key {key.id}… is {other}'s, who stands in the ledger: {_ONE} "
                f"(or write {other} without it, in the same file)"
            )


def _owners(tenants: Iterable[TenantConfigured]) -> dict[str, Tenant]:
    """By the sha256 of each key, whose it is."""
    return {key.sha256: tenant.tenant for tenant in tenants for key in tenant.keys}


def _taken(keys: Iterable[ApiKey], owners: Mapping[str, Tenant]) -> tuple[ApiKey, Tenant] | None:
    """One of some keys that has an owner, and whose it is."""
    return next(((key, owners[key.sha256]) for key in keys if key.sha256 in owners), None)


def _key(key: str) -> ApiKey:
    digest = _digest(key)
    return ApiKey(id=digest[:12], sha256=digest)
