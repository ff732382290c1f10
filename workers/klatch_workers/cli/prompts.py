"""`klatch prompts publish|list|show`: the prompts ledger.

Versions are immutable: publishing what stands already changes nothing, anything else under its number is refused. A
template that does not compile is refused before it is published, with its line.
"""

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import click
from pydantic import ValidationError

from klatch_agents.prompts import PromptFailed, Prompts
from klatch_schemas import codec
from klatch_schemas.events import PromptPublished
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import PROMPTS, Namespace
from klatch_streams.ledger import Ledger
from klatch_streams.ledger import publish as write
from klatch_streams.log import Log
from klatch_workers.books import EVERYBODY, PromptBook, prompt_key
from klatch_workers.cli.context import (
    MISUSED,
    CommandFailed,
    Context,
    log_options,
    opened_log,
    perform,
    say_json,
)


@click.group()
def prompts() -> None:
    """Publish and list prompts: Jinja templates, by name and version."""


def _options(command: Any) -> Any:
    owner = click.option("--tenant", metavar="NAME", help="This tenant's own prompts.  [default: those of all tenants]")
    return owner(log_options(command))


@prompts.command()
@click.argument("file", type=click.File("rb"))
@click.option("--name", required=True, help="What requests call it.")
@click.option("--version", type=click.IntRange(1), help="[default: the highest and one]")
@click.option("--by", default="", help="Who publishes it.")
@_options
def publish(
    file: Any, name: str, version: int | None, tenant: str | None, by: str, as_json: bool, **options: Any
) -> None:
    """Publish the template in FILE (- for stdin) as a new version; the highest version is in force."""

    async def work() -> int:
        context = Context.read(**options)
        template = _template(file.read())
        async with opened_log(context) as log:
            said = await publish_prompt(log, context.namespace, _prompt(name, version, tenant, template, by), version)
        if as_json:
            say_json(_facts(said))
        else:
            click.echo(f"prompt {said.name} version {said.version} is published")
        return 0

    perform(work, as_json=as_json)


@prompts.command(name="list")
@_options
def list_prompts(tenant: str | None, as_json: bool, **options: Any) -> None:
    """List names and versions; a * marks the version in force."""

    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log, _ledger(log, context.namespace) as ledger:
            found = [one for one in ledger.values() if tenant is None or one.tenant == tenant]
        highest = dict[tuple[str | None, str], int]()
        for one in found:
            highest[one.tenant, one.name] = max(one.version, highest.get((one.tenant, one.name), 0))
        for one in sorted(found, key=lambda one: (one.tenant or "", one.name, one.version)):
            in_force = highest[one.tenant, one.name] == one.version
            if as_json:
                say_json({**_facts(one), "in_force": in_force})
            else:
                mark = "*" if in_force else " "
                click.echo(f"{one.tenant or EVERYBODY:<16} {one.name:<24} {one.version:>4}{mark} {one.by}".rstrip())
        if not found and not as_json:
            click.echo("no prompts yet: klatch prompts publish FILE --name NAME", err=True)
        return 0

    perform(work, as_json=as_json)


@prompts.command()
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="[default: the one in force]")
@_options
def show(name: str, version: int | None, tenant: str | None, as_json: bool, **options: Any) -> None:
    """Print a prompt's template, as a tenant's request would get it."""

    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log, _ledger(log, context.namespace) as ledger:
            found = PromptBook(ledger).find(tenant or EVERYBODY, name, version)
        if found is None:
            numbered = f" version {version}" if version else ""
            raise CommandFailed(f"there is no prompt {name}{numbered}; `klatch prompts list` shows what there is")
        if as_json:
            say_json({**_facts(found), "template": found.template})
        else:
            click.echo(found.template, nl=not found.template.endswith("\n"))
            sys.stdout.flush()
        return 0

    perform(work, as_json=as_json)


async def publish_prompt(
    log: Log, namespace: Namespace, prompt: PromptPublished, version: int | None
) -> PromptPublished:
    """Put a prompt into the ledger, under `version` or one above the highest. Raises CommandFailed, LogError."""
    try:
        Prompts().check(prompt)
    except PromptFailed as error:
        raise CommandFailed(error.message) from error
    async with _ledger(log, namespace) as ledger:
        if version is None:
            taken = [one.version for one in ledger.values() if (one.tenant, one.name) == (prompt.tenant, prompt.name)]
            prompt = prompt.model_copy(update={"version": max(taken, default=0) + 1})
        key = prompt_key(prompt)
        if (standing := ledger.get(key)) is not None:
            if standing.template == prompt.template:
                return standing
            raise CommandFailed(
                f"prompt {prompt.name} has a version {prompt.version} with other text, and versions never change: "
                "leave --version away to publish the next one"
            )
        await write(log, PROMPTS, key, prompt, namespace)
    return prompt


@asynccontextmanager
async def _ledger(log: Log, namespace: Namespace) -> AsyncGenerator[Ledger[PromptPublished]]:
    async with await Ledger[PromptPublished].open(log, PROMPTS, namespace, PromptPublished) as ledger:
        yield ledger


def _template(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CommandFailed(f"the template is not UTF-8: {error}", MISUSED) from error


def _prompt(name: str, version: int | None, tenant: str | None, template: str, by: str) -> PromptPublished:
    try:
        owner = Tenant(tenant) if tenant else None
        return PromptPublished(tenant=owner, name=name, version=version or 1, template=template, by=by)
    except ValidationError as error:
        raise CommandFailed(f"a prompt cannot be called so: {codec.explain(error)}", MISUSED) from error


def _facts(prompt: PromptPublished) -> dict[str, Any]:
    return {"name": prompt.name, "version": prompt.version, "tenant": prompt.tenant, "by": prompt.by}
