"""Checks of the routes of model names: what there is, whether the keys are here, and whether each deployment answers.

Each deployment is asked as `klatch models test` asks it, and one that refuses is asked for an embedding as well: what
a route is for, it does not say. Deployments whose key is not here are not asked.
"""

from collections.abc import Sequence
from typing import Final

from klatch_agents.gateway.errors import MisconfiguredError
from klatch_schemas.events import Deployment, ModelRouted
from klatch_workers.doctor.findings import Finding, Findings, Setup
from klatch_workers.model_keys import ModelKeys
from klatch_workers.model_trial import Trial, trials
from klatch_workers.settings import Settings

_CHECK: Final = "routes"
_PATIENCE_S: Final = 60.0
"""A model that is loaded on demand takes its time."""
_SILENT: Final = frozenset({"model_unreachable", "model_stalled"})
_AS_THE_WORKERS: Final = "set KLATCH_KEYS_FILE as for the generation worker"


async def routes(setup: Setup, routed: Sequence[ModelRouted]) -> Findings:
    """Everything about the routes of the ledger."""
    if not routed:
        yield Finding(_CHECK, "ok", "no model has a route: all go to the server of KLATCH_MODEL_URL")
        return
    told = "; ".join(f"{one.alias} → {', '.join(to.name for to in _in_order(one))}" for one in routed)
    yield Finding(_CHECK, "ok", f"{len(routed)} of models: {told}")
    keys = ModelKeys(setup.settings.keys_file)
    try:
        missing = keys.missing(_named(routed))
    except MisconfiguredError as error:
        yield Finding("keys", "problem", error.message, "mend the file: no worker starts with it")
        return
    yield _keys(setup.settings, _named(routed), missing)
    async for finding in _answers(setup.settings, [_without(one, missing) for one in routed]):
        yield finding


def _in_order(route: ModelRouted) -> list[Deployment]:
    return sorted(route.deployments, key=lambda one: (one.tier, -one.weight))


def _named(routed: Sequence[ModelRouted]) -> list[str]:
    return sorted({one.key for route in routed for one in route.deployments if one.key})


def _keys(settings: Settings, named: Sequence[str], missing: Sequence[str]) -> Finding:
    if not named:
        return Finding("keys", "ok", "no route names a key")
    if settings.keys_file is None:
        says = f"routes name keys ({', '.join(named)}), and no keys file is named here: these were not asked"
        return Finding("keys", "warning", says, _AS_THE_WORKERS)
    if missing:
        says = f"{settings.keys_file} lacks keys that routes name: {', '.join(missing)}"
        return Finding("keys", "problem", says, "add them under [keys]; workers see it without a restart")
    return Finding("keys", "ok", f"{settings.keys_file} has the keys that routes name: {', '.join(named)}")


def _without(route: ModelRouted, keys: Sequence[str]) -> ModelRouted:
    """What can be asked of a route, within a doctor's patience."""
    patience = route.timeouts.model_copy(update={"first_token_s": min(route.timeouts.first_token_s, _PATIENCE_S)})
    left = tuple(one for one in route.deployments if one.key not in keys)
    return route.model_copy(update={"deployments": left, "timeouts": patience})


async def _answers(settings: Settings, asked: Sequence[ModelRouted]) -> Findings:
    found = {(one.alias, one.deployment): one async for one in trials(settings, asked)}
    refused = [_only(route, found) for route in asked]
    async for one in trials(settings, refused, embed=True):
        if one.error is None:
            found[one.alias, one.deployment] = one
    for route in asked:
        said = [found[route.alias, one.name] for one in _in_order(route)]
        # Of several deployments one that fails is what the others are there for.
        alone = all(one.error for one in said)
        for one in said:
            yield _told(one, alone=alone)


def _only(route: ModelRouted, found: dict[tuple[str, str], Trial]) -> ModelRouted:
    """A route to those that answered, and refused."""
    left = tuple(
        one for one in route.deployments if (said := found[route.alias, one.name]).error and said.code not in _SILENT
    )
    return route.model_copy(update={"deployments": left})


def _told(one: Trial, *, alone: bool) -> Finding:
    where = f"{one.alias} → {one.deployment}"
    if one.error is None:
        got = f"an embedding of {one.dimension} numbers" if one.dimension else "words"
        return Finding("deployment", "ok", f"{where} answers with {got} after {one.milliseconds} ms")
    if one.code == "model_misconfigured" and "KLATCH_MODEL_URL" in one.error:
        return Finding("deployment", "warning", f"{where}: {one.error}", "set it as for the generation worker")
    says = f"{where} fails: {one.error}" + ("; nothing else serves this model" if alone else "")
    fix = f"`klatch models test {one.alias}` asks it again; mend the models file, or the server"
    return Finding("deployment", "problem" if alone else "warning", says, fix)
