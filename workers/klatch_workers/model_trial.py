"""Tries deployments with a real, small call, each by itself: no fallback, no retry, so that each failure is seen.

But for one: reasoning models refuse `max_tokens`, and other servers do not know the newer name. Who refuses it is asked
once more, with `max_completion_tokens`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgspec

from klatch_agents.gateway.errors import MalformedError, ModelError, RefusedError
from klatch_agents.gateway.openai_compatible import OpenAICompatible
from klatch_agents.gateway.port import ModelCall
from klatch_agents.gateway.router import timeouts_of
from klatch_schemas import codec
from klatch_schemas.chunks import Reply
from klatch_schemas.events import Deployment, ModelRouted
from klatch_workers.model_servers import ModelServers
from klatch_workers.settings import Settings

_MESSAGES: Final = [{"role": "user", "content": "Say hello."}]
_TOKENS: Final = 16
_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """What a deployment answered."""

    alias: str
    deployment: str
    milliseconds: int = 0
    """To the first token, or to the embedding."""
    text: str = ""
    dimension: int = 0
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    code: str | None = None

    def facts(self) -> dict[str, Any]:
        """What is known, for JSON."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", 0)} | {
            "ok": self.error is None
        }


async def trials(
    settings: Settings, routes: Sequence[ModelRouted], *, only: str | None = None, embed: bool = False
) -> AsyncGenerator[Trial]:
    """One trial a deployment, as they come in."""
    servers, room = ModelServers(settings), asyncio.Semaphore(_AT_ONCE)
    trying = [
        asyncio.create_task(_trial(servers, room, route, one, embed=embed))
        for route in routes
        for one in route.deployments
        if only in {None, one.name}
    ]
    try:
        for finished in asyncio.as_completed(trying):
            yield await finished
    finally:
        for task in trying:
            task.cancel()


async def _trial(
    servers: ModelServers, room: asyncio.Semaphore, route: ModelRouted, one: Deployment, *, embed: bool
) -> Trial:
    async with room:
        try:
            async with servers.open(one) as server:
                asking = _embedding if embed else _words
                return await asking(server, route, one)
        except ModelError as error:
            return Trial(route.alias, one.name, error=error.message, code=error.code)
        except ValueError as error:
            return Trial(route.alias, one.name, error=str(error), code="model_misconfigured")


async def _words(server: OpenAICompatible, route: ModelRouted, one: Deployment) -> Trial:
    try:
        return await _said(server, route, one, "max_tokens")
    except RefusedError as refused:
        if refused.status != 400 or b"max_tokens" not in refused.said:
            raise
    return await _said(server, route, one, "max_completion_tokens")


async def _said(server: OpenAICompatible, route: ModelRouted, one: Deployment, limit: str) -> Trial:
    began, first, said = time.monotonic(), 0.0, Reply()
    body = {"messages": _MESSAGES, limit: _TOKENS}
    call = ModelCall(body, model=one.model or route.alias, timeouts=timeouts_of(route.timeouts))
    async with server.stream(call) as reply:
        async for chunks in reply:
            for chunk in chunks:
                first = first or (time.monotonic() if chunk.speaks else 0.0)
                said.add(codec.loads(chunk.raw))
        finished = reply.finished
    usage = finished.usage if finished else None
    return Trial(
        route.alias,
        one.name,
        milliseconds=round(1000 * ((first or time.monotonic()) - began)),
        text=str(next((message.get("content") for message in said.messages()), None) or ""),
        finish_reason=finished.finish_reasons.get(0) if finished else None,
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
    )


async def _embedding(server: OpenAICompatible, route: ModelRouted, one: Deployment) -> Trial:
    began = time.monotonic()
    body = {"model": one.model or route.alias, "input": "hello", "encoding_format": "float"}
    raw = await server.embed(body, timeouts_of(route.timeouts))
    took_ms = round(1000 * (time.monotonic() - began))
    return Trial(route.alias, one.name, milliseconds=took_ms, dimension=len(_first_vector(raw)))


class _Embedding(msgspec.Struct):
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


def _first_vector(raw: bytes) -> list[float]:
    try:
        data = msgspec.json.decode(raw, type=_Embeddings).data
    except msgspec.DecodeError as error:
        raise MalformedError(f"the answer holds no embedding in numbers: {error}") from error
    if not data:
        raise MalformedError("the answer holds no embedding: its list of them is empty")
    return data[0].embedding
