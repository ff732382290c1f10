"""Routes from a file: what is written once is used by many, and what is wrong is named."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from klatch_schemas.events import ModelRouted
from klatch_schemas.topics import CHAT_REQUESTS, MODELS, TENANTS, Namespace
from klatch_streams.ledger import Ledger, publish
from klatch_streams.memory_log import MemoryLog, MemoryTail
from klatch_workers.models_file import ModelsFileError, read_models, remove_route, write_models

GOOD = """
[deployments.east]
kind = "azure"
url = "https://east.openai.azure.com"
model = "gpt-4o-eu"
key = "east"
concurrency = 32
prices = { prompt = 2.5, cached = 1.25, completion = 10 }

[deployments.own]
kind = "vllm"
url = "http://10.0.0.7:8000/v1"

[deployments.here]
kind = "local"

[routes."gpt-4o"]
to = ["east", { deployment = "own", tier = 1, weight = 3 }, { deployment = "here", tier = 2 }]
tries = 4
timeouts = { first_token_s = 60 }

[routes.small]
to = ["own"]
"""


def written(folder: Path, text: str, name: str = "models.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_deployment_is_written_once_and_used_by_any_route(tmp_path: Path) -> None:
    big, small = read_models(written(tmp_path, GOOD), by="ops")
    assert (big.alias, big.tries, big.timeouts.first_token_s, big.timeouts.connect_s) == ("gpt-4o", 4, 60, 10)
    assert [(one.name, one.tier, one.weight) for one in big.deployments] == [
        ("east", 0, 1),
        ("own", 1, 3),
        ("here", 2, 1),
    ]
    assert big.deployments[0].prices is not None
    assert big.deployments[0].prices.completion == 10
    assert [(one.name, one.tier, one.weight) for one in small.deployments] == [("own", 0, 1)]
    assert small.by == "ops"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('to = ["own"]', 'to = ["owm"]'), "route small: there is no .deployments.owm."),
        (('to = ["own"]', 'to = ["own", "own"]'), "route small names a deployment twice"),
        (('to = ["own"]', "to = []"), "to"),
        (("http://10.0.0.7:8000/v1", "10.0.0.7:8000"), "deployment own: a model server's URL looks like"),
        (("http://10.0.0.7", "http://user:secret@10.0.0.7"), "deployment own: give the model server's key as"),
        (("http://10.0.0.7:8000/v1", "http://10.0.0.7:8000/v1?key=secret"), "deployment own: .*URL .* leave out"),
        (("http://10.0.0.7:8000/v1", "http://10.0.0.7:8000/v1#secret"), "deployment own: .*URL .* leave out"),
        (("http://10.0.0.7:8000/v1", "http://10.0.0.7:8000/v1?"), "deployment own: .*URL .* leave out"),
        (("first_token_s = 60", "first_token_s = 0"), r"routes.gpt-4o.timeouts: .*first_token_s = 0 .*above 0"),
        (("first_token_s = 60", "connect_s = 0.0"), r"routes.gpt-4o.timeouts: .*connect_s = 0 .*above 0"),
        (("first_token_s = 60", "idle_s = 0"), r"routes.gpt-4o.timeouts: .*idle_s = 0 .*above 0"),
        (
            ("east.openai.azure.com", "east.openai.azure.com/openai"),
            "deployment east: of Azure give the resource alone",
        ),
        (('kind = "local"', 'kind = "local"\nurl = "http://x/v1"'), "deployment here: `local` is the worker's own"),
        (('kind = "vllm"', 'kind = "vlm"'), "deployment own: kind"),
        (("concurrency = 32", "concurency = 32"), "deployment east: concurency"),
        (("tries = 4", "tries = 0"), "routes.gpt-4o.tries"),
        (("weight = 3", "weight = -1"), "route gpt-4o: deployment own: weight: .* greater than or equal to 0"),
        (("tier = 1", 'tier = "one"'), "route gpt-4o: deployment own: tier: .* valid integer"),
        (("tier = 1", "teir = 1"), r"routes.gpt-4o.to.1.teir: Extra inputs"),
        (("[routes.small]", "[routes.small"), "is not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    path = written(tmp_path, GOOD.replace(*change))
    with pytest.raises(ModelsFileError, match=says) as refused:
        read_models(path)
    assert str(path) in str(refused.value)
    assert "secret" not in str(refused.value)


async def test_what_is_written_stands_and_only_what_differs_is_written(tmp_path: Path) -> None:
    log, namespace = MemoryLog({MODELS.name: 1, TENANTS.name: 1}), Namespace()
    routes = read_models(written(tmp_path, GOOD))
    assert await write_models(log, namespace, routes) == (["gpt-4o", "small"], [])
    assert await write_models(log, namespace, routes) == ([], [])
    assert await write_models(log, namespace, routes[1:]) == ([], []), "what a file leaves out stays"
    assert await write_models(log, namespace, routes[1:], prune=True) == ([], ["gpt-4o"])
    async with await Ledger[ModelRouted].open(log, MODELS, namespace, ModelRouted) as ledger:
        assert list(ledger.values()) == routes[1:]
    await log.close()


class Busy(MemoryLog):
    """Somebody writes between a command's first and its second look at the log."""

    def __init__(self, writes: Callable[[MemoryLog], Awaitable[object]]) -> None:
        super().__init__({MODELS.name: 1, TENANTS.name: 1, CHAT_REQUESTS.name: 1})
        self.writes, self.looks = writes, 0

    async def tail(self) -> MemoryTail:
        self.looks += 1
        if self.looks == 2:
            await self.writes(self)
        return await super().tail()


async def routes_of(log: MemoryLog) -> dict[str, ModelRouted]:
    async with await Ledger[ModelRouted].open(log, MODELS, Namespace(), ModelRouted) as ledger:
        return {route.alias: route for route in ledger.values()}


async def test_only_the_route_that_is_named_is_removed_whatever_is_applied_meanwhile(tmp_path: Path) -> None:
    old, new = read_models(written(tmp_path, GOOD)), read_models(written(tmp_path, GOOD.replace(":8000", ":9000")))
    gone, added = (old[1].model_copy(update={"alias": alias}) for alias in ("gone", "added"))

    async def apply(log: MemoryLog) -> None:
        for route in (*new, added):
            await publish(log, MODELS, route.alias, route, Namespace())

    log = Busy(apply)
    for route in (*old, gone):
        await publish(log, MODELS, route.alias, route, Namespace())
    assert await remove_route(log, Namespace(), "gone")
    assert await routes_of(log) == {route.alias: route for route in (*new, added)}
    assert not await remove_route(log, Namespace(), "gone")
    await log.close()
