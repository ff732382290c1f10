"""The ledgers as stages and doors ask them: prompts by name, tenants by key.

Each is a live view of its topic; a change written to the ledger is in force as soon as it has been read, well within
a second.
"""

from collections.abc import Iterator, Mapping

from klatch_schemas.events import ModelRouted, Prices, PromptPublished, TenantConfigured
from klatch_schemas.ids import Tenant
from klatch_streams.ledger import Ledger

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

    def prices(self, alias: str, deployment: str) -> Prices | None:
        """What a deployment of a route costs, where it is known."""
        route = self._ledger.get(alias)
        return next((one.prices for one in route.deployments if one.name == deployment), None) if route else None


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
