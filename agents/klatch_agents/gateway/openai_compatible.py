"""A gateway to one server of Chat Completions: OpenAI, Azure OpenAI, vLLM, llama.cpp, most others.

What differs between them is in `dialect.py`. One aiohttp session with an unbounded pool, no limit
on a whole reply. The request body goes up as the caller wrote it, but for what the dialect changes;
`stream` and `stream_options.include_usage` are added. One thing is tried again: a call that the
server refused for `stream_options` is made with `include_usage` alone, then without them.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Self, cast
from urllib.parse import urlsplit

import aiohttp
import msgspec

from klatch_agents.gateway import http
from klatch_agents.gateway.continuing import Continues, continuing_body
from klatch_agents.gateway.dialect import Dialect, Options
from klatch_agents.gateway.errors import MalformedError, RefusedError
from klatch_agents.gateway.facts import are_embeddings
from klatch_agents.gateway.port import DEFAULT_TIMEOUTS, KeyOf, ModelCall, ModelReply, Timeouts
from klatch_agents.gateway.reply import StreamedReply


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model server is, e.g. `Endpoint("http://127.0.0.1:8000/v1", key="...")`.

    `model`, if given, replaces the model's name in every chat completion. `headers` go with every
    call. `continues` says how this server goes on with an answer that broke off (`continuing.py`).
    The key is in no repr and no error; `key_of`, if given, is asked for it before every call.
    """

    base_url: str
    key: str = field(default="", repr=False)
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    continues: Continues = "none"
    dialect: Dialect = Dialect()
    key_of: KeyOf | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a model server's URL looks like http://host:port/v1")
        if "?" in self.base_url or "#" in self.base_url:
            # Paths are put behind it; of Azure the version is a field of its own.
            raise ValueError("a model server's URL ends with its path, such as /v1: leave out ? and # and what follows")
        if parts.username or parts.password:
            raise ValueError("give the model server's key as `key`, not inside its URL")

    def url(self, what: Literal["chat/completions", "embeddings", "models"], model: str = "") -> str:
        return self.base_url.rstrip("/") + self.dialect.path(what, model)

    async def current_key(self, refused: str = "") -> str:
        """See `KeyOf`."""
        return await self.key_of(refused) if self.key_of else self.key


class OpenAICompatible:
    """The `Gateway` to one endpoint, and its `Catalogue`. Use it inside one event loop, `async with`
    or with `close`."""

    def __init__(self, endpoint: Endpoint, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> None:
        """`timeouts` are for `models`, and for an `embed` that brings none; a `ModelCall` brings its own."""
        self._endpoint = endpoint
        self._timeouts = timeouts
        self._http = http.Client(endpoint.current_key, endpoint.dialect.key_headers)
        self._taken: dict[str, Options] = {}  # by model, of options that were refused; learnt, to fail only once

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"OpenAICompatible({self._endpoint!r})"

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[ModelReply]:
        """See `Gateway.stream`. Raises ValueError for a prefix at a server that does not continue."""
        model = str(call.model or self._endpoint.model or call.body.get("model", ""))
        response = await self._send(call, model)
        reply = StreamedReply(
            response,
            model=model,
            choices=_asked_choices(call.body),
            running_usage=_asks_running_usage(call.body),
            timeouts=call.timeouts,
            upstream_request_id=http.request_id(response),
            linger=self._http.linger,
        )
        try:
            await self._expect_events(response)
            yield reply
        finally:
            reply.close()

    def continues(self, call: ModelCall) -> bool:  # noqa: ARG002 - one server answers every call
        """See `Gateway.continues`."""
        return self._endpoint.continues != "none"

    async def embed(
        self,
        body: Mapping[str, object],
        timeouts: Timeouts | None = None,
        before_send: Callable[[], Awaitable[None]] | None = None,
    ) -> bytes:
        """See `Catalogue.embed`."""
        url = self._endpoint.url("embeddings", str(body.get("model", "")))
        within = timeouts or self._timeouts
        sent = _encode(dict(body))
        async with await self._http.open("POST", url, self._endpoint.headers, within, sent, before_send) as response:
            raw = await self._http.whole(response, within)
            if not are_embeddings(raw):
                raise self._http.not_as_asked(response, raw, "a list of embeddings")
            return raw

    async def models(self, timeouts: Timeouts | None = None) -> list[str]:
        """See `Catalogue.models`."""
        url = self._endpoint.url("models")
        raw = await self._http.fetch("GET", url, self._endpoint.headers, timeouts or self._timeouts)
        try:
            return [model.id for model in msgspec.json.decode(raw, type=_Models).data]
        except msgspec.DecodeError as error:
            raise MalformedError(f"{url} is no list of models: {error}") from error

    async def close(self) -> None:
        """See `Gateway.close`."""
        await self._http.close()

    async def _send(self, call: ModelCall, model: str) -> aiohttp.ClientResponse:
        url, dialect = self._endpoint.url("chat/completions", model), self._endpoint.dialect
        headers = {**call.headers, **self._endpoint.headers, **_STREAMING}
        look = partial(call.before_send, call.deployment) if call.before_send else None
        asked = continuing_body(call.body, call.prefix, self._endpoint.continues) if call.prefix else call.body
        sent = None
        for options in self._options(model):
            body = dialect.streaming(asked, model, call.priority, options)
            if body == sent:
                continue  # the usage was all that was asked for
            sent = body
            try:
                response = await self._http.open("POST", url, headers, call.timeouts, _encode(body), look)
            except RefusedError as refused:
                if options == "none" or not _are_stream_options(refused):
                    raise
            else:
                if options == "none" or (options == "usage" and not _odd_options(call.body)):
                    self._taken[model] = options
                return response
        raise AssertionError("the last of the options is none")

    def _options(self, model: str) -> tuple[Options, ...]:
        return _FROM[self._taken.get(model, "all")]

    async def _expect_events(self, response: aiohttp.ClientResponse) -> None:
        if response.content_type not in ("application/json", "text/html"):
            return  # servers exist that send events as text/plain
        body = await self._http.read(response)
        raise self._http.not_as_asked(response, body, "an event stream")


def _odd_options(body: Mapping[str, object]) -> bool:
    """Whether the caller's own options may be what was refused."""
    own = body.get("stream_options")
    return bool(own) and not (isinstance(own, dict) and own.keys() <= {"include_usage"})


_FROM: dict[Options, tuple[Options, ...]] = {
    "all": ("all", "usage", "none"),
    "usage": ("usage", "none"),
    "none": ("none",),
}


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_WRONG_REQUEST = (400, 422)
"""How a server refuses a member that it does not know; FastAPI's say 422."""
# Compression buffers what should flow.
_STREAMING = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}


def _are_stream_options(refused: RefusedError) -> bool:
    """Whether they are what a call was refused for."""
    return refused.status in _WRONG_REQUEST and b"stream_options" in refused.said


def _asked_choices(body: Mapping[str, object]) -> int:
    n = body.get("n")
    return n if isinstance(n, int) and n > 0 else 1


def _asks_running_usage(body: Mapping[str, object]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(cast("dict[str, object]", options).get("continuous_usage_stats"))


def _encode(body: dict[str, object]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON as an escape
        return json.dumps(body).encode()
