"""Checks of what answers over HTTP: the model server, the memory and views workers, the door."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from klatch_workers.ask import Answer, Unreached, ask
from klatch_workers.doctor.findings import Endpoint, Finding, Findings, Setup

_PATIENCE_S: Final = 5.0
_TOKEN_PATIENCE_S: Final = 60.0
"""A model that is loaded on demand takes its time."""


async def servers(setup: Setup) -> Findings:
    """Everything that answers over HTTP."""
    yield await model(setup)
    yield await _healthy(setup, "memory", setup.memory, "requests get no recalled memories, and the door no embeddings")
    yield await _healthy(setup, "views", setup.views, "`klatch top` has nothing to show")
    yield await door(setup.door)


async def model(setup: Setup) -> Finding:
    """The model server lists models, and one of them says a token."""
    if setup.model.url is None:
        if "model" in setup.pids:
            return Finding("model", "ok", "`klatch up` runs the local model")
        says = "no model server is named here, so none was asked"
        return Finding("model", "warning", says, "set KLATCH_MODEL_URL as the generation worker has it, or route all")
    url = setup.model.url.rstrip("/")
    try:
        listed = await _ask("GET", f"{url}/models", setup.model.key)
        if listed.status != 200:
            return _refused(url, listed)
        name = setup.settings.model or _first_id(listed)
        body = {"model": name, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
        said = await _ask("POST", f"{url}/chat/completions", setup.model.key, body, _TOKEN_PATIENCE_S)
    except Unreached as error:
        return Finding("model", "problem", f"the model server at {error}", "start it, or mend KLATCH_MODEL_URL")
    if said.status != 200:
        return _refused(url, said)
    return Finding("model", "ok", f"{name} answers at {url}")


def _refused(url: str, answer: Answer) -> Finding:
    fix = (
        "mend KLATCH_MODEL_KEY"
        if answer.status in {401, 403}
        else "mend KLATCH_MODEL_URL (with its /v1) or KLATCH_MODEL"
    )
    return Finding("model", "problem", f"the model server at {url} refuses: {answer.reason}", fix)


def _first_id(listed: Answer) -> str:
    try:
        return str(listed.json["data"][0]["id"])
    except (LookupError, TypeError):
        return "default"


async def _healthy(setup: Setup, name: str, server: Endpoint, without: str) -> Finding:
    check, start = f"{name} server", f"start `klatch worker {name}`"
    if server.url is None:
        if name in setup.pids:
            return Finding(check, "ok", f"`klatch up` runs the {name} worker")
        fix = f"set KLATCH_{name.upper()}_URL, or ask where it runs"
        return Finding(check, "warning", f"no {name} worker is named here: {without}", fix)
    try:
        answer = await _ask("GET", f"{server.url.rstrip('/')}/healthz", None)
    except Unreached as error:
        return Finding(check, "problem", f"the {name} worker: {error}; {without}", start)
    if answer.status != 200:
        return Finding(check, "problem", f"the {name} worker at {server.url} says: {answer.reason}", start)
    return Finding(check, "ok", f"the {name} worker answers at {server.url}")


async def door(door: Endpoint) -> Finding:
    """The HTTP door is ready, and knows the key."""
    start = "start `klatch up` or `klatch worker http`, or say where it is with --http"
    try:
        ready = await _ask("GET", f"{door.url}/readyz", None)
        if ready.status != 200:
            return Finding("door", "problem", f"the HTTP door at {door.url} is not ready: {ready.reason}", start)
        if door.key is None:
            return Finding(
                "door",
                "warning",
                f"the HTTP door at {door.url} is ready; no API key is known here",
                "set KLATCH_API_KEY",
            )
        listed = await _ask("GET", f"{door.url}/v1/models", door.key)
    except Unreached as error:
        return Finding("door", "problem", f"the HTTP door: {error}", start)
    if listed.status == 401:
        return Finding(
            "door", "problem", f"the HTTP door at {door.url} does not know your API key", "mend KLATCH_API_KEY"
        )
    if listed.status != 200:
        says = f"the HTTP door at {door.url} is ready, and its model server is not: {listed.reason}"
        return Finding("door", "problem", says, "see the model server")
    return Finding("door", "ok", f"the HTTP door at {door.url} is ready and knows your API key")


async def _ask(
    method: str, url: str, key: str | None, body: Mapping[str, Any] | None = None, patience_s: float = _PATIENCE_S
) -> Answer:
    return await asyncio.to_thread(ask, method, url, key=key, body=body, timeout_s=patience_s)
