"""`klatch models set` on a route that stands: what is told changes, what is not told stays."""

from typing import Any

import pytest

from klatch_schemas.events import CircuitBreaker, Deployment, ModelRouted, Prices, RouteTimeouts
from klatch_workers.models_file import ModelsFileError
from klatch_workers.route_change import with_one_changed

EAST = Deployment(
    name="east",
    kind="azure",
    url="https://east.openai.azure.com",
    model="gpt-4o-eu",
    key="east",
    auth="token",
    api_version="2025-01-01-preview",
    weight=3.0,
    concurrency=32,
    prices=Prices(prompt=2.5, completion=10),
)
OWN = Deployment(name="own", kind="vllm", url="http://10.0.0.7:8000/v1", tier=1)
ROUTE = ModelRouted(
    alias="m",
    deployments=(EAST, OWN),
    timeouts=RouteTimeouts(first_token_s=60),
    tries=4,
    breaker=CircuitBreaker(failures=2),
    by="ann",
)
ALONE = ROUTE.model_copy(update={"deployments": (EAST,)})


def test_a_model_without_a_route_gets_one_deployment_that_is_named_after_it() -> None:
    made = with_one_changed(None, "other/name", {"url": "http://10.0.0.8/v1"}, "bob")
    assert made == ModelRouted(
        alias="other/name", deployments=(Deployment(name="other-name", url="http://10.0.0.8/v1"),), by="bob"
    )


def test_prices_fallbacks_time_outs_and_all_else_that_is_not_told_stay() -> None:
    made = with_one_changed(ROUTE, "m", {"name": "east", "concurrency": 8}, "bob")
    east = EAST.model_copy(update={"concurrency": 8})
    assert made == ROUTE.model_copy(update={"deployments": (east, OWN), "by": "bob"})


def test_a_lone_deployment_needs_no_name() -> None:
    [one] = with_one_changed(ALONE, "m", {"model": "gpt-4o-us"}).deployments
    assert one == EAST.model_copy(update={"model": "gpt-4o-us"})


@pytest.mark.parametrize(
    ("route", "told", "says"),
    [
        (ROUTE, {"concurrency": 8}, "m goes to more than one deployment: give --name with one of east, own"),
        (ROUTE, {"name": "west", "concurrency": 8}, "m has no deployment west: give --name with one of east, own"),
        (ALONE, {"name": "west"}, "m has no deployment west: give --name with one of east"),
        (ALONE, {"url": "nowhere"}, "deployment east: "),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_fix(route: ModelRouted, told: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelsFileError, match=f"^{says}"):
        with_one_changed(route, "m", told)


@pytest.mark.parametrize(
    ("told", "key"),
    [
        ({"url": "https://west.openai.azure.com"}, None),
        ({"url": "http://east.openai.azure.com"}, None),
        ({"url": "https://east.openai.azure.com/"}, "east"),
        ({"url": "https://west.openai.azure.com", "key": "west"}, "west"),
    ],
)
def test_a_key_goes_to_no_other_host_unless_that_is_said(told: dict[str, Any], key: str | None) -> None:
    [one] = with_one_changed(ALONE, "m", told).deployments
    assert (one.key, one.prices) == (key, EAST.prices)


@pytest.mark.parametrize("told", [{"kind": "openai", "url": "https://api.openai.com/v1"}, {"kind": "local"}])
def test_what_only_one_kind_of_server_has_is_not_carried_to_another(told: dict[str, Any]) -> None:
    [one] = with_one_changed(ALONE, "m", told).deployments
    assert (one.kind, one.url) == (told["kind"], told.get("url", ""))
    assert (one.auth, one.api_version, one.key) == ("key", None, None)
    assert (one.weight, one.concurrency, one.prices) == (EAST.weight, EAST.concurrency, EAST.prices)
