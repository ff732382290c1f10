"""vLLM itself, on CPU, with a tiny random Llama and a LoRA adapter for it: `make vllm`.

`--vllm` names either a Python that has vLLM (an environment of its own, never klatch's), or the URL of a server that
already runs with what `tiny_llama.py` makes.
"""

import asyncio
import os
import socket
from asyncio.subprocess import STDOUT
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from klatch_agents.gateway.dialect import Dialect
from klatch_agents.gateway.openai_compatible import Endpoint, OpenAICompatible
from klatch_workers import leash

MODEL, ADAPTED = "tiny", "adapted"
START_S = 900
"""A minute on a quiet machine; five were seen on a busy one."""
OPTIONS = (
    "--host 127.0.0.1 --dtype bfloat16 --max-model-len 2048 --max-num-seqs 1 --enforce-eager "
    "--enable-lora --max-lora-rank 8 --enable-auto-tool-choice --tool-call-parser hermes"
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Vllm:
    """A running server: one place, so that whoever does not leave it is noticed."""

    root: str

    @property
    def url(self) -> str:
        """Its OpenAI API."""
        return f"{self.root}/v1"

    async def running(self) -> float:
        """How many requests it works on, by its own metrics."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.root}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

    async def prompt(self, messages: list[dict[str, str]], **options: object) -> list[int]:
        """The tokens that messages become."""
        body = {"model": MODEL, "messages": messages, **options}
        async with aiohttp.ClientSession() as session, session.post(f"{self.root}/tokenize", json=body) as response:
            tokens: list[int] = (await response.json())["tokens"]
            return tokens


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Vllm]:
    """The server, started once: a minute or more."""
    given = str(request.config.getoption("--vllm"))
    if given.startswith("http"):
        yield Vllm(given.rstrip("/"))
        return
    folder = tmp_path_factory.mktemp("vllm")
    async with _process(folder / "made.log", given, str(Path(__file__).with_name("tiny_llama.py")), str(folder)) as one:
        assert await one.wait() == 0, (folder / "made.log").read_text()
    port = _free_port()
    argv = [given, "-m", "vllm.entrypoints.openai.api_server", *OPTIONS.split(), "--port", str(port)]
    argv += ["--model", str(folder / "model"), "--served-model-name", MODEL]
    argv += ["--lora-modules", f"{ADAPTED}={folder / 'adapter'}"]
    log = folder / "server.log"
    async with _process(log, *argv) as process:
        await _serves(f"http://127.0.0.1:{port}/health", process, log)
        yield Vllm(f"http://127.0.0.1:{port}")


@pytest_asyncio.fixture(loop_scope="session")
async def gateway(vllm: Vllm) -> AsyncIterator[OpenAICompatible]:
    """klatch's gateway to it."""
    async with OpenAICompatible(Endpoint(vllm.url, continues="vllm", dialect=Dialect("vllm"))) as opened:
        yield opened


@pytest.fixture
def unused_port() -> int:
    """A port on which nobody listens."""
    return _free_port()


@asynccontextmanager
async def _process(log: Path, *argv: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    with log.open("wb") as output:
        process = await leash.spawn(argv, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=STDOUT)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


async def _serves(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while True:
            assert process.returncode is None, f"vLLM ended; see {log}"
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(1)  # it tells nobody when it serves


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
