"""Routes of model names, from a file into the `models` ledger. The file is the source; keep it in git.

It is TOML, or JSON of the same shape. A deployment is written once and used by any route; no secret stands in it,
`key` names one of the keys file (`model_keys.py`):

[deployments.azure-east]
kind = "azure"                            # openai, azure, vllm, openai-compatible (default), local
url = "https://east.openai.azure.com"
model = "gpt-4o-eu"                       # what the server calls it
key = "azure-east"
concurrency = 32                          # calls at once, per generation process
prices = { prompt = 2.5, cached = 1.25, completion = 10 }    # US dollars a million tokens

[routes.gpt-4o]
to = ["azure-east", { deployment = "azure-west", weight = 3 }, { deployment = "own", tier = 1 }]
tries = 3
timeouts = { connect_s = 5, first_token_s = 60, idle_s = 30 }
breaker = { failures = 5, cool_down_s = 10 }
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from klatch_schemas.codec import explain
from klatch_schemas.events import CircuitBreaker, Deployment, ModelRouted, RouteTimeouts
from klatch_schemas.ids import LabelField, NameField
from klatch_schemas.topics import MODELS, Namespace
from klatch_streams.ledger import Ledger, publish
from klatch_streams.log import Log
from klatch_workers.quotas import write_prices


class ModelsFileError(ValueError):
    """The models file cannot be used; names file, field and fix."""


class _To(BaseModel):
    model_config = ConfigDict(extra="forbid")

    deployment: NameField
    # Checked as a deployment's, so that what is wrong is told with its name.
    weight: object = None
    tier: object = None

    def of(self, deployment: Deployment) -> Deployment:
        given = {"weight": self.weight, "tier": self.tier}
        said = {name: value for name, value in given.items() if value is not None}
        return Deployment.model_validate({**deployment.model_dump(), **said})


def _spelt_out(to: object) -> object:
    """`"own"` is short for `{ deployment = "own" }`."""
    return {"deployment": to} if isinstance(to, str) else to


def _above_zero(timeouts: RouteTimeouts) -> RouteTimeouts:
    for name, seconds in timeouts:
        if not seconds:
            raise ValueError(f"with {name} = 0 every call fails at once: give seconds above 0, or leave it out")
    return timeouts


class _Route(BaseModel):
    model_config = ConfigDict(extra="forbid")

    to: Annotated[list[Annotated[_To, BeforeValidator(_spelt_out)]], Field(min_length=1)]
    tries: Annotated[int, Field(ge=1, le=20)] = 3
    timeouts: Annotated[RouteTimeouts, AfterValidator(_above_zero)] = RouteTimeouts()
    breaker: CircuitBreaker = CircuitBreaker()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    deployments: dict[NameField, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    routes: dict[LabelField, _Route]


def read_models(path: Path, by: str = "") -> list[ModelRouted]:
    """The routes that a file names. Raises ModelsFileError."""
    try:
        raw = path.read_text()
        document = json.loads(raw) if path.suffix == ".json" else tomllib.loads(raw)
        file = _File.model_validate(document)
        deployments = {name: checked({**fields, "name": name}) for name, fields in file.deployments.items()}
        return [_routed(alias, route, deployments, by) for alias, route in file.routes.items()]
    except OSError as error:
        raise ModelsFileError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise ModelsFileError(f"{path}: {explain(error)}") from error
    except ModelsFileError as error:
        raise ModelsFileError(f"{path}: {error}") from error
    except ValueError as error:
        raise ModelsFileError(f"{path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error


def checked(fields: dict[str, Any]) -> Deployment:
    """A deployment that a worker will be able to open. Raises ModelsFileError, naming it."""
    # With it comes an HTTP client: 0.2 s that a start without a models file need not wait.
    from klatch_agents.gateway.openai_compatible import Endpoint  # noqa: PLC0415

    name = fields.get("name")
    try:
        deployment = Deployment.model_validate(fields)
        if deployment.kind == "local":
            if deployment.url or deployment.key:
                raise ModelsFileError(f"deployment {name}: `local` is the worker's own server: leave url and key out")
            return deployment
        Endpoint(deployment.url)
    except ValidationError as error:
        raise ModelsFileError(f"deployment {name}: {explain(error)}") from error
    except ModelsFileError:
        raise
    except ValueError as error:
        raise ModelsFileError(f"deployment {name}: {error}") from error
    if deployment.kind == "azure" and deployment.url.rstrip("/").endswith(("/v1", "/openai")):
        raise ModelsFileError(f"deployment {name}: of Azure give the resource alone, https://NAME.openai.azure.com")
    return deployment


async def write_models(
    log: Log, namespace: Namespace, routes: Sequence[ModelRouted], *, prune: bool = False
) -> tuple[list[str], list[str]]:
    """Put routes into the ledger; returns the aliases that changed, and those that went (with `prune`, all others)."""
    named = {route.alias for route in routes}
    async with await Ledger[ModelRouted].open(log, MODELS, namespace, ModelRouted) as ledger:
        changed = [route for route in routes if ledger.get(route.alias) != route]
        gone = sorted({route.alias for route in ledger.values()} - named) if prune else []
    for route in changed:
        await publish(log, MODELS, route.alias, route, namespace)
    for alias in gone:
        await publish(log, MODELS, alias, None, namespace)
    if changed or gone:
        # Admission reserves money by the prices that stand in each tenant's own log.
        await write_prices(log, namespace, by=next((route.by for route in changed if route.by), "klatch models"))
    return [route.alias for route in changed], gone


async def remove_route(log: Log, namespace: Namespace, alias: str) -> bool:
    """Take a route away, whatever is written of others meanwhile; False if there is none."""
    async with await Ledger[ModelRouted].open(log, MODELS, namespace, ModelRouted) as ledger:
        if ledger.get(alias) is None:
            return False
    await publish(log, MODELS, alias, None, namespace)
    await write_prices(log, namespace, by="klatch models")
    return True


def _routed(alias: str, route: _Route, deployments: dict[str, Deployment], by: str) -> ModelRouted:
    for one in route.to:
        if one.deployment not in deployments:
            raise ModelsFileError(f"route {alias}: there is no [deployments.{one.deployment}]")
    if len({one.deployment for one in route.to}) < len(route.to):
        raise ModelsFileError(f"route {alias} names a deployment twice: give it one weight")
    return ModelRouted(
        alias=alias,
        deployments=tuple(_weighed(alias, one, deployments[one.deployment]) for one in route.to),
        timeouts=route.timeouts,
        tries=route.tries,
        breaker=route.breaker,
        by=by,
    )


def _weighed(alias: str, to: _To, deployment: Deployment) -> Deployment:
    try:
        return to.of(deployment)
    except ValidationError as error:
        raise ModelsFileError(f"route {alias}: deployment {to.deployment}: {explain(error)}") from error
