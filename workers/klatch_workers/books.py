"""The ledgers as stages and doors ask them: prompts by name, tenants by key.

Each is a live view of its topic; a change written to the ledger is in force as soon as it has been read, well within
a second.
"""

from collections.abc import Iterable, Iterator, Mapping

from klatch_schemas.events import Deployment, ModelRouted, Prices, PromptPublished, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_streams.ledger import Ledger

DEFAULT = "default"
"""What the deployment of models without a route is called."""
EVERYBODY = "*"
"""Stands in a prompt's key for "of all tenants"; no tenant can be called so."""


def prompt_key(prompt: PromptPublished) -> str:
    """The record key of a prompt's version."""
    return f"{prompt.tenant or EVERYBODY}/{prompt.name}/{prompt.version}"


class PromptBook:
    """The prompts of the ledger."""

    def __init__(self, ledger: Ledger[PromptPublished]) -> None:
        self._ledger = ledger

    def find(self, tenant: str, name: str, version: int | None) -> PromptPublished | None:
        """A tenant's own prompt before everybody's; without a version, the highest."""
        for owner in (tenant, EVERYBODY):
            if version is not None:
                found = self._ledger.get(f"{owner}/{name}/{version}")
            else:
                found = max(self._of(owner, name), key=lambda prompt: prompt.version, default=None)
            if found:
                return found
        return None

    def _of(self, owner: str, name: str) -> Iterator[PromptPublished]:
        for prompt in self._ledger.values():
            if prompt.name == name and (prompt.tenant or EVERYBODY) == owner:
                yield prompt


class RouteBook:
    """The routes of model names, of the ledger."""

    def __init__(self, ledger: Ledger[ModelRouted]) -> None:
        self._ledger = ledger

    def find(self, alias: str) -> ModelRouted | None:
        """The route of a model name."""
        return self._ledger.get(alias)

    def aliases(self) -> list[str]:
        """The model names that have routes."""
        return [route.alias for route in self._ledger.values()]

    async def changed(self) -> None:
        """Wait for the next change after this call."""
        await self._ledger.changed()

    def prices(self, alias: str, deployment: str) -> Prices | None:
        """What a deployment of a route costs; of one that is gone from it, the most that it may have cost.

        That is the price of its name in other routes; else the highest of its route, where that still stands; else of
        the route `*`, else of any. None for what has no price, and for a server that no route ever named.
        """
        route, gone = self._ledger.get(alias), deployment not in ("", DEFAULT)
        own = list(route.deployments) if route else []
        if named := [one for one in own if one.name == deployment]:
            return named[0].prices
        every = [one for other in self._ledger.values() for one in other.deployments]
        namesakes = [one for one in every if one.name == deployment]
        anybodys = self._ledger.get("*")
        return _highest(namesakes or own or (anybodys.deployments if anybodys else every)) if gone else None


def _highest(deployments: Iterable[Deployment]) -> Prices | None:
    prices = [one.prices for one in deployments if one.prices]
    if not prices:
        return None
    return Prices(prompt=max(one.prompt for one in prices), completion=max(one.completion for one in prices))


class KeyBook(Mapping[str, Tenant]):
    """sha256 of an API key, in hex, to the tenant who may use it."""

    def __init__(self, ledger: Ledger[TenantConfigured]) -> None:
        self._ledger = ledger

    def __getitem__(self, digest: str) -> Tenant:
        for tenant in self._ledger.values():
            if any(key.sha256 == digest for key in tenant.keys):
                return tenant.tenant
        raise KeyError("no tenant has this key")

    def __iter__(self) -> Iterator[str]:
        return (key.sha256 for tenant in self._ledger.values() for key in tenant.keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)
