"""`klatch models set|apply|list|test|remove`: the routes of model names. Files in git are the source.

A change is in force in running workers within a second. Exit codes: 0 done, 1 it failed, 2 misused, 3 something that
is needed cannot be reached.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from klatch_schemas.codec import explain
from klatch_schemas.events import ModelRouted
from klatch_schemas.topics import MODELS
from klatch_streams.ledger import Ledger
from klatch_streams.log import Log
from klatch_workers.cli.context import (
    FAILED,
    MISUSED,
    CommandFailed,
    Context,
    log_options,
    opened_log,
    perform,
    say_json,
)
from klatch_workers.model_trial import Trial, trials
from klatch_workers.models_file import ModelsFileError, read_models, remove_route, write_models
from klatch_workers.route_change import with_one_changed


@click.group()
def models() -> None:
    """Route model names to deployments, and try them."""


@models.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--prune", is_flag=True, help="Remove the routes that FILE leaves out.")
@click.option("--by", default="", help="Who changes it.")
@log_options
def apply(file: Path, prune: bool, by: str, as_json: bool, **options: Any) -> None:
    """Put the routes that FILE names into the ledger; in force within a second.

    \b
    [deployments.azure-east]
    kind = "azure"
    url = "https://east.openai.azure.com"
    model = "gpt-4o-eu"
    key = "azure-east"
    [routes.gpt-4o]
    to = ["azure-east", { deployment = "own", tier = 1 }]
    """

    async def work() -> int:
        context = Context.read(**options)
        try:
            routes = read_models(file, by)
        except ModelsFileError as error:
            raise CommandFailed(str(error), MISUSED) from error
        async with opened_log(context) as log:
            changed, gone = await write_models(log, context.namespace, routes, prune=prune)
        if as_json:
            say_json({"routes": len(routes), "changed": changed, "removed": gone})
        else:
            removed = f", removed: {', '.join(gone)}" if gone else ""
            click.echo(f"{len(routes)} routes, changed: {', '.join(changed) or 'none'}{removed}")
        return 0

    perform(work, as_json=as_json)


@models.command(name="set")
@click.argument("alias")
@click.option("--url", help="The server, with its /v1; of Azure the resource.")
@click.option(
    "--kind",
    type=click.Choice(["openai", "azure", "vllm", "openai-compatible", "local"]),
    help="[default: of a new one openai-compatible]",
)
@click.option("--model", help="What the server calls it.  [default: of a new one ALIAS]")
@click.option("--key", help="The name of a key in KLATCH_KEYS_FILE; never the key itself.")
@click.option("--api-version", help="Azure's.")
@click.option("--concurrency", type=click.IntRange(1), help="Calls at once, per generation process.")
@click.option("--name", help="Which deployment, where there are several.  [default: a new one is named after ALIAS]")
@click.option("--by", default="", help="Who changes it.")
@log_options
def set_route(alias: str, name: str | None, by: str, as_json: bool, **options: Any) -> None:
    """Route ALIAS to a deployment, or change one that it goes to.

    What is not told stays: other deployments, prices, time-outs, tries, weights. A key is kept only for the host that
    it was given for. To take something away, or for several deployments, `apply` a file.
    """
    asked = {field: options.pop(field) for field in ("url", "kind", "model", "key", "api_version", "concurrency")}
    told = {field: value for field, value in {**asked, "name": name}.items() if value is not None}

    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log:
            standing = {one.alias: one for one in await _routes(log, context)}.get(alias)
            route, to = _changed(standing, alias, told, by)
            changed, _ = await write_models(log, context.namespace, [route])
        if as_json:
            say_json({"alias": alias, "changed": bool(changed)})
        else:
            click.echo(f"{alias} goes to {to}" + ("" if changed else ", as before"))
        return 0

    perform(work, as_json=as_json)


@models.command()
@click.argument("alias")
@log_options
def remove(alias: str, as_json: bool, **options: Any) -> None:
    """Take away ALIAS' route; its requests then go to the server of KLATCH_MODEL_URL."""

    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log:
            removed = await remove_route(log, context.namespace, alias)
        if not removed:
            raise CommandFailed(f"there is no route {alias}; `klatch models list` shows what there is")
        if as_json:
            say_json({"removed": alias})
        else:
            click.echo(f"{alias} has no route any more")
        return 0

    perform(work, as_json=as_json)


@models.command(name="list")
@log_options
def list_routes(as_json: bool, **options: Any) -> None:
    """List routes with their deployments, tier by tier."""

    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log:
            routes = await _routes(log, context)
        for route in routes:
            if as_json:
                say_json(route.model_dump(mode="json", exclude={"kind"}))
            else:
                click.echo("\n".join(_lines(route)))
        if not routes and not as_json:
            click.echo("no routes: every model goes to the server of KLATCH_MODEL_URL", err=True)
        return 0

    perform(work, as_json=as_json)


@models.command()
@click.argument("alias", required=False)
@click.option("--deployment", metavar="NAME", help="Try this one only.")
@click.option("--embed", is_flag=True, help="Ask for an embedding instead of a few words.")
@log_options
def test(alias: str | None, deployment: str | None, embed: bool, as_json: bool, **options: Any) -> None:
    """Make a real, small call to every deployment of ALIAS (or of all routes), and say what came back.

    The keys are those that KLATCH_KEYS_FILE has for this command.
    """

    async def work() -> int:
        context = Context.read(**options)
        async with opened_log(context) as log:
            routes = [route for route in await _routes(log, context) if alias in {None, route.alias}]
        if alias and not routes:
            raise CommandFailed(f"there is no route {alias}; `klatch models list` shows what there is")
        outcomes = list[Trial]()
        async for trial in trials(context.model_settings, routes, only=deployment, embed=embed):
            outcomes.append(trial)
            if as_json:
                say_json(trial.facts())
            else:
                click.echo(_told(trial))
        if not outcomes:
            raise CommandFailed("no deployment to try; `klatch models list` shows what there is")
        return 0 if all(trial.error is None for trial in outcomes) else FAILED

    perform(work, as_json=as_json)


async def _routes(log: Log, context: Context) -> list[ModelRouted]:
    async with await Ledger[ModelRouted].open(log, MODELS, context.namespace, ModelRouted) as ledger:
        return sorted(ledger.values(), key=lambda route: route.alias)


def _changed(standing: ModelRouted | None, alias: str, told: dict[str, Any], by: str) -> tuple[ModelRouted, str]:
    """The route, and the names of where it goes."""
    try:
        route = with_one_changed(standing, alias, told, by)
        return route, ", ".join(one.name for one in route.deployments)
    except ModelsFileError as error:
        raise CommandFailed(str(error), MISUSED) from error
    except ValidationError as error:
        raise CommandFailed(f"a model cannot be called so: {explain(error)}", MISUSED) from error


def _lines(route: ModelRouted) -> Sequence[str]:
    lines = [f"{route.alias}   {route.tries} tries"]
    for one in sorted(route.deployments, key=lambda one: (one.tier, -one.weight)):
        where = "the worker's own server" if one.kind == "local" else one.url
        limit = f"   at most {one.concurrency} at once" if one.concurrency else ""
        place = f"tier {one.tier}  weight {one.weight:<5g} {one.name:<20}"
        lines.append(f"  {place} {one.kind:<17} {one.model or route.alias} at {where}{limit}")
    return lines


def _told(trial: Trial) -> str:
    where = f"{trial.alias:<20} {trial.deployment:<20}"
    if trial.error is not None:
        return f"{where} {click.style('failed', fg='red')}  {trial.error}"
    got = f"{trial.dimension} numbers" if trial.dimension else f"{trial.text!r}"
    return f"{where} {click.style('ok', fg='green')}  {trial.milliseconds} ms  {got}"
