"""What the door adds to an embedding: `python -m klatch_workers.bench.embeddings [REQUESTS]`.

Kafka, klatch and the scripted model server as `klatch bench` starts them. The model server and the door are asked in
turn, one request at a time on connections that stay open; what is added is of neighbouring requests.
"""

import asyncio
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import aiohttp
import msgspec

from klatch_workers.bench.client import Target
from klatch_workers.bench.report import DIRECT, KLATCH, quantiles
from klatch_workers.bench.rig import MODEL, model_server
from klatch_workers.kafka import Cluster, Options
from klatch_workers.settings import read_settings
from klatch_workers.up.everything import Wanted, everything

_WARM_UP = 50
_ROUTE = '[deployments.fake]\nurl = "{url}"\n\n[routes.{model}]\nto = ["fake"]\n'


async def measure(folder: Path, requests: int) -> dict[str, list[float]]:
    """Milliseconds of each request, by side."""
    async with model_server(folder) as upstream, Cluster(folder / "kafka", Options(fast_start=False)) as kafka:
        url = str(upstream.facts["url"])
        models = folder / "models.toml"
        models.write_text(_ROUTE.format(url=url, model=MODEL))
        settings = read_settings(data=folder / "klatch", http="127.0.0.1:0", model_url=url, drain_s=1.0)
        wanted = Wanted(kafka=kafka.bootstrap, models=models)
        async with everything(settings, wanted, lambda _event, _facts: None) as klatch, aiohttp.ClientSession() as http:
            door = Target(KLATCH, f"{klatch.children['http'].facts['url']}/v1", klatch.keys.api)
            sides = (Target(DIRECT, url), door)
            took = {side.name: list[float]() for side in sides}
            for number in range(_WARM_UP + requests):
                for side in sides:
                    ms = await _one(http, side)
                    if number >= _WARM_UP:
                        took[side.name].append(ms)
            return took


async def _one(http: aiohttp.ClientSession, side: Target) -> float:
    body = msgspec.json.encode({"model": MODEL, "input": "In one short sentence: what is a klatch?"})
    headers = {"authorization": f"Bearer {side.key}", "content-type": "application/json"}
    began = perf_counter()
    async with http.post(f"{side.url}/embeddings", data=body, headers=headers, raise_for_status=True) as response:
        await response.read()
    return (perf_counter() - began) * 1_000


def main() -> None:
    """Measure and print."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with tempfile.TemporaryDirectory(prefix="klatch-embeddings-") as folder:
        took = asyncio.run(measure(Path(folder), requests))
    took["added"] = [door - direct for direct, door in zip(took[DIRECT], took[KLATCH], strict=True)]
    for side, ms in took.items():
        found = quantiles(ms)
        sys.stdout.write(f"{side:<8} p50 {found.p50:.1f} ms, p95 {found.p95:.1f}, p99 {found.p99:.1f}, n {found.n}\n")


if __name__ == "__main__":
    main()
