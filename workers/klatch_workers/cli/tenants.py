"""`klatch tenants`: the tenants ledger of a deployment.

Exit codes: 0 done, 2 misused, 3 Kafka cannot be reached.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import click

from klatch_schemas.events import TenantConfigured
from klatch_schemas.topics import TENANTS, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.ledger import Ledger
from klatch_streams.log import LogError
from klatch_workers.settings import read_settings
from klatch_workers.tenants import TenantsFileError, read_tenants, write_tenants


@click.group()
def tenants() -> None:
    """Write tenants, their keys and limits, and list them."""


@tenants.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kafka", metavar="HOST:PORT", help="Bootstrap servers.  [KLATCH_KAFKA]")
@click.option("--namespace", metavar="NAME", help="Prefix of topics and groups.  [KLATCH_NAMESPACE]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def apply(file: Path, kafka: str | None, namespace: str | None, as_json: bool) -> None:
    """Put the tenants that FILE names into the ledger; in force within a second. Tenants it leaves out stay.

    \b
    [tenants.acme]
    keys = ["klatch-…", "sha256:9f86…"]
    [tenants.acme.limits]
    requests_per_minute = 60
    """
    try:
        named = read_tenants(file)
    except TenantsFileError as error:
        raise click.UsageError(str(error)) from error

    async def write(log: KafkaLog, space: Namespace) -> None:
        changed = await write_tenants(log, space, named, by="klatch tenants")
        if as_json:
            click.echo(json.dumps({"tenants": len(named), "changed": changed}))
        else:
            click.echo(f"{len(named)} tenants, changed: {', '.join(changed) or 'none'}")

    _run(kafka, namespace, write)


@tenants.command("list")
@click.option("--kafka", metavar="HOST:PORT", help="Bootstrap servers.  [KLATCH_KAFKA]")
@click.option("--namespace", metavar="NAME", help="Prefix of topics and groups.  [KLATCH_NAMESPACE]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a tenant.")
def list_(kafka: str | None, namespace: str | None, as_json: bool) -> None:
    """The tenants in the ledger, with their limits; of keys only the ids."""

    async def show(log: KafkaLog, space: Namespace) -> None:
        async with await Ledger[TenantConfigured].open(log, TENANTS, space, TenantConfigured) as ledger:
            for tenant in sorted(ledger.values(), key=lambda one: one.tenant):
                limits = tenant.limits.model_dump(exclude_none=True)
                keys = [key.id for key in tenant.keys]
                if as_json:
                    click.echo(json.dumps({"tenant": tenant.tenant, "limits": limits, "keys": keys}))
                else:
                    said = ", ".join(f"{name}={value}" for name, value in limits.items()) or "no limits"
                    click.echo(f"{tenant.tenant:<24} {len(keys)} keys   {said}")

    _run(kafka, namespace, show)


def _run(kafka: str | None, namespace: str | None, work: Callable[[KafkaLog, Namespace], Awaitable[None]]) -> None:
    settings = read_settings(kafka=kafka, namespace=namespace)

    async def run() -> None:
        log = await KafkaLog.open(KafkaOptions(settings.kafka))
        try:
            await work(log, Namespace.named(settings.namespace))
        finally:
            await log.close()

    try:
        asyncio.run(run())
    except LogError as error:
        click.echo(f"klatch tenants: {error}", err=True)
        sys.exit(3)
