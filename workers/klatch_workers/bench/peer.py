"""LiteLLM's proxy as a side of the comparison: installed into an environment of its own, and run beside klatch.

Never into klatch's environment: it brings 130 distributions. Its version is pinned, so that two runs compare the same
thing, and its settings are the ones its documentation starts with: one model, a master key, one worker, no database.
What is set beyond them only keeps it from the network: no telemetry, prices from its own package.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from klatch_workers import leash
from klatch_workers.bench.client import Target
from klatch_workers.bench.report import PEER
from klatch_workers.settings import PREFIX
from klatch_workers.up.everything import free_address

VERSION: Final = "1.108.7"
KEY: Final = "sk-klatch-bench"
SAID: Final = f"LiteLLM's proxy {VERSION}: one model, a master key, one worker, no database"
_INSTALL_S, _START_S, _STOP_S = 600.0, 240.0, 10.0
_LOOK_S = 0.2

_CONFIG = """\
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: {url}
      api_key: none
general_settings:
  master_key: {key}
"""
_OFFLINE = {"LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


class PeerFailed(Exception):
    """The peer could not be installed or did not start; the message says what to do."""


@dataclass(slots=True)
class Peer:
    """A server that is not klatch's, as a process."""

    name: str
    command: Sequence[str]
    url: str
    """Without `/v1`."""
    alive: str
    """The path that answers with 200 once it serves."""
    log_file: Path
    key: str = ""
    environment: Mapping[str, str] | None = None
    pid: int = 0

    @property
    def target(self) -> Target:
        """Where it is asked."""
        return Target(self.name, f"{self.url}/v1", self.key)

    @asynccontextmanager
    async def running(self, patience_s: float = _START_S) -> AsyncGenerator["Peer", None]:
        """Start it, wait until it serves, and stop it at the end. Raises PeerFailed."""
        with self.log_file.open("ab") as told:
            process = await leash.spawn(self.command, env=self.environment, stdout=told, stderr=told)
        self.pid = process.pid
        try:
            async with asyncio.timeout(patience_s):
                await self._until_alive(process)
            yield self
        except TimeoutError as error:
            raise PeerFailed(f"{self.name} did not serve within {patience_s:.0f} s; read {self.log_file}") from error
        finally:
            await _stop(process)

    async def _until_alive(self, process: asyncio.subprocess.Process) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while process.returncode is None:
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(self.url + self.alive) as answer:
                        if answer.status == 200:
                            return
                # It tells nobody that it serves: it must be asked again and again.
                await asyncio.sleep(_LOOK_S)
        raise PeerFailed(f"{self.name} ended with {process.returncode} before it served; read {self.log_file}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def litellm(folder: Path, cache: Path, model: str, model_url: str) -> Peer:
    """LiteLLM's proxy before `model_url`, installed if it is not; it logs to `folder`. Raises PeerFailed."""
    program = await _installed(cache / f"litellm-{VERSION}")
    config, address = folder / "litellm.yaml", free_address()
    config.write_text(_CONFIG.format(model=model, url=model_url, key=KEY))
    host, _, port = address.partition(":")
    theirs = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "LITELLM_"))}
    command = [str(program), "--config", str(config), "--host", host, "--port", port, "--num_workers", "1"]
    return Peer(
        name=PEER,
        command=command,
        url=f"http://{address}",
        alive="/health/liveliness",
        log_file=folder / "litellm.log",
        key=KEY,
        environment={**theirs, **_OFFLINE},
    )


async def _installed(home: Path) -> Path:
    """The proxy's program in the environment `home`, which is made if it is not whole."""
    program, whole = home / "bin" / "litellm", home / "installed"
    if whole.exists() and program.exists():
        return program
    home.parent.mkdir(parents=True, exist_ok=True)
    await _run("uv", "venv", "--clear", "--python", sys.executable, str(home))
    await _run("uv", "pip", "install", "--python", str(home / "bin" / "python"), f"litellm[proxy]=={VERSION}")
    whole.touch()
    return program


async def _run(*command: str) -> None:
    try:
        process = await leash.spawn(command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    except FileNotFoundError as error:
        raise PeerFailed("uv is needed to install LiteLLM's proxy: https://docs.astral.sh/uv/") from error
    try:
        async with asyncio.timeout(_INSTALL_S):
            said, _ = await process.communicate()
    except TimeoutError as error:
        process.kill()
        raise PeerFailed(f"`{' '.join(command)}` took longer than {_INSTALL_S:.0f} s") from error
    if process.returncode:
        raise PeerFailed(f"`{' '.join(command)}` failed:\n{said.decode(errors='replace')[-2000:]}")
