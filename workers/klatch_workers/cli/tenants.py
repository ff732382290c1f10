"""`klatch tenants`: the tenants ledger of a deployment.

Exit codes: 0 done, 1 it failed, 2 misused, 3 Kafka cannot be reached.
"""

from pathlib import Path
from typing import Any

import click

from klatch_schemas.events import TenantConfigured
from klatch_schemas.topics import TENANTS
from klatch_streams.ledger import Ledger
from klatch_workers.cli.context import (
    MISUSED,
    CommandFailed,
    Context,
    log_options,
    opened_log,
    perform,
    say_json,
)
from klatch_workers.tenants import TenantsFileError, read_tenants, write_tenants


@click.group()
def tenants() -> None:
    """Write tenants, their keys and limits, and list them."""


@tenants.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--again", is_flag=True, help="Write all of them, also those that stand in the ledger as they are.")
@log_options
def apply(file: Path, again: bool, as_json: bool, **options: Any) -> None:
    """Put the tenants that FILE names into the ledger; in force within a second. Tenants it leaves out stay.

    \b
    [tenants.acme]
    keys = ["klatch-…", "sha256:9f86…"]
    [tenants.acme.limits]
    requests_per_minute = 60
    """

    async def work() -> int:
        context = Context.read(**options)
        try:
            named = read_tenants(file)
            async with opened_log(context) as log:
                changed = await write_tenants(log, context.namespace, named, by="klatch tenants", again=again)
        except TenantsFileError as error:
            raise CommandFailed(str(error), MISUSED) from error
        if as_json:
            say_json({"tenants": len(named), "changed": changed})
        else:
            done = "written" if again else "changed"
            click.echo(f"{len(named)} tenants, {done}: {', '.join(changed) or 'none'}")
        return 0

    perform(work, as_json=as_json)


@tenants.command("list")
@log_options
def list_(as_json: bool, **options: Any) -> None:
    """The tenants in the ledger, with their limits; of keys only the ids."""

    async def work() -> int:
        context = Context.read(**options)
        async with (
            opened_log(context) as log,
            await Ledger[TenantConfigured].open(log, TENANTS, context.namespace, TenantConfigured) as ledger,
        ):
            standing = sorted(ledger.values(), key=lambda one: one.tenant)
        for tenant in standing:
            limits = tenant.limits.model_dump(exclude_none=True)
            keys = [key.id for key in tenant.keys]
            if as_json:
                say_json({"tenant": tenant.tenant, "limits": limits, "keys": keys})
            else:
                said = ", ".join(f"{name}={value}" for name, value in limits.items()) or "no limits"
                click.echo(f"{tenant.tenant:<24} {len(keys)} keys   {said}")
        return 0

    perform(work, as_json=as_json)
