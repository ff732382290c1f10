"""Tenants: who may speak, by which keys, within which limits; from a file into the ledger.

The file is TOML, or JSON of the same shape:

[tenants.acme]
keys = ["klatch-…", "sha256:9f86d081…"]     # API keys, or their sha256 so that the file holds no secret
[tenants.acme.limits]                    # each may be left out: no limit
requests_per_minute = 60
tokens_per_minute = 50000
tokens_per_day = 1000000
concurrent_requests = 8
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from klatch_schemas.codec import draft, explain
from klatch_schemas.events import ApiKey, Limits, QuotaLimitSet, TenantConfigured
from klatch_schemas.ids import Tenant, TenantField
from klatch_schemas.topics import CHAT_REQUESTS, TENANTS, Namespace
from klatch_streams.ledger import Ledger, publish
from klatch_streams.log import Log

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class TenantsFileError(ValueError):
    """The tenants file cannot be used; names file, field and fix."""


class _Tenant(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Annotated[str, StringConstraints(min_length=8)]] = Field(default_factory=list[str])
    limits: Limits = Limits()


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
    return [tenant_configured(name, tenant.keys, tenant.limits) for name, tenant in file.tenants.items()]


def tenant_configured(name: Tenant, keys: list[str], limits: Limits) -> TenantConfigured:
    """A tenant for the ledger; of its keys only the hashes."""
    return TenantConfigured(tenant=name, keys=tuple(_key(key) for key in keys), limits=limits)


async def write_tenants(log: Log, namespace: Namespace, tenants: Sequence[TenantConfigured], by: str) -> list[Tenant]:
    """Put tenants into the ledger, and their limits into their own logs; returns those that differed."""
    changed: list[Tenant] = []
    async with await Ledger[TenantConfigured].open(log, TENANTS, namespace, TenantConfigured) as ledger:
        for tenant in tenants:
            if ledger.get(tenant.tenant) == tenant:
                continue
            # Decisions have one order: the limits in force are those in the tenant's own log. They come first, so
            # that a crash between the two is mended by writing again.
            limits = QuotaLimitSet(tenant=tenant.tenant, limits=tenant.limits, by=by)
            await log.append([draft(namespace.of(CHAT_REQUESTS), tenant.tenant, limits)])
            await publish(log, TENANTS, tenant.tenant, tenant, namespace)
            changed.append(tenant.tenant)
    return changed


def _key(key: str) -> ApiKey:
    hashed = _HASHED.fullmatch(key)
    digest = hashed.group(1) if hashed else hashlib.sha256(key.encode()).hexdigest()
    return ApiKey(id=digest[:12], sha256=digest)
