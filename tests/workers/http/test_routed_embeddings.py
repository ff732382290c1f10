"""Embeddings at the door: of the model that is named, where it has a route, else klatch's own."""

from dataclasses import dataclass

import pytest

from klatch_agents.gateway.port import Embedded, ModelCall
from klatch_schemas.errors import NotFound
from klatch_schemas.events import Deployment, ModelRouted
from klatch_workers.http.embeddings import RoutedEmbeddings


@dataclass
class Named:
    """Embeddings that say who they are."""

    name: str

    async def embed(self, call: ModelCall) -> Embedded:
        return Embedded(f"{self.name} {call.body['input']}".encode())


class Routes:
    """A ledger with one route."""

    def find(self, alias: str) -> ModelRouted | None:
        return ModelRouted(alias=alias, deployments=(Deployment(name="one"),)) if alias == "routed" else None


async def test_a_model_with_a_route_is_asked_and_any_other_name_gets_klatchs_own() -> None:
    embeddings = RoutedEmbeddings(Routes(), Named("router"), Named("own"))
    asked = [{"model": "routed", "input": "a"}, {"model": "other", "input": "b"}, {"input": "c"}]
    said = [await embeddings.embed(ModelCall(body)) for body in asked]
    assert [one.answer for one in said] == [b"router a", b"own b", b"own c"]


async def test_without_an_embedder_of_its_own_a_door_says_that_the_model_has_no_route() -> None:
    embeddings = RoutedEmbeddings(Routes(), Named("router"), None)
    with pytest.raises(NotFound, match="no route"):
        await embeddings.embed(ModelCall({"model": "other", "input": "b"}))
