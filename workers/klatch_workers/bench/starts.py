"""How long `klatch up` takes, broker included: the real command as a child, with the model server left out.

The data folder is new the first time and kept after that. Nothing is downloaded: what a first start on a new machine
fetches is measured by nobody but the network.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from klatch_workers import leash
from klatch_workers.bench.client import Target
from klatch_workers.bench.load import one
from klatch_workers.bench.report import Start
from klatch_workers.bench.rig import MODEL
from klatch_workers.up.children import ChildFailed
from klatch_workers.up.everything import free_address

_PATIENCE_S = 90.0


async def starts(folder: Path, model_url: str, times: int) -> list[Start]:
    """Start it so often, one after the other. Raises ChildFailed."""
    return [await _start(folder / "up", model_url, "kept" if number else "new") for number in range(times)]


async def _start(data: Path, model_url: str, what: str) -> Start:
    loop = asyncio.get_running_loop()
    began = loop.time()
    address = ["--http", free_address(), "--data", str(data)]
    command = [sys.executable, "-m", "klatch_workers", "up", "--json", "--model-url", model_url, *address]
    up = await leash.spawn(command, env=os.environ, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            facts = await _ready(up)
            ready_s = loop.time() - began
            # A first answer: the time until it was accepted lies between these two.
            await one(Target("klatch up", f"{facts['http']}/v1", facts["api_key"]), f"{MODEL}?tokens=1")
            first_token_s = loop.time() - began
            stopping = loop.time()
            up.send_signal(signal.SIGTERM)
            await up.wait()
    finally:
        if up.returncode is None:
            up.kill()
            await up.wait()
    return Start(what, ready_s, first_token_s, loop.time() - stopping)


async def _ready(up: asyncio.subprocess.Process) -> dict[str, Any]:
    assert up.stdout  # noqa: S101 - started with a pipe
    async for line in up.stdout:
        facts: dict[str, Any] = json.loads(line)
        if facts["event"] == "ready":
            return facts
    raise ChildFailed(f"`klatch up` ended with {await up.wait()} before it was ready")
