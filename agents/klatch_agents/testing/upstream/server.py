"""The server: routes, the streams under way, and a record of the calls it was given.

The record is what tests trust: what reached the model, when it ended, and whether the client hung
up. `changed` wakes on every change of it, so that nothing has to sleep.
"""

import asyncio
import json
import re
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from itertools import count
from struct import pack
from typing import Self, cast
from urllib.parse import unquote

import msgspec

from klatch_agents.testing.upstream.answer import Answer, Json
from klatch_agents.testing.upstream.exchange import Call, Exchange, refuse
from klatch_agents.testing.upstream.http import Connection, Request
from klatch_agents.testing.upstream.pace import Wheel
from klatch_agents.testing.upstream.script import Script, script_of


class Upstream:
    """`async with Upstream() as upstream:` serves `upstream.url` (ending in /v1) until it leaves.

    `key`, if given, is required. `keep` bounds the record of calls, oldest forgotten first.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, key: str = "", keep: int = 10_000) -> None:
        self.calls: deque[Call] = deque(maxlen=keep)
        self.models = ["fake"]
        self.instead: Callable[[int], str | None] = lambda _: None
        """By the number of a call, the model and script that answer it in place of what it asked for, if any."""
        self._address = (host, port)
        self.key = key
        """What calls must bring; empty: nothing."""
        self._ids = count()
        self._failed: Counter[str] = Counter()
        self._held: dict[str, list[Exchange]] = {}
        self._released: set[str] = set()
        self._open_ones: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._wheel = Wheel()
        self._waiting: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._serve, self._open_ones), *self._address, backlog=1024
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            for connection in list(self._open_ones):
                connection.drop()
            await self._server.wait_closed()

    @property
    def url(self) -> str:
        if self._server is None:
            raise RuntimeError("this server runs inside `async with`")
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}/v1"

    @property
    def open_connections(self) -> int:
        return len(self._open_ones)

    async def changed(self, until: Callable[[], bool], seconds: float = 10.0) -> None:
        """Waits until the condition holds, looking at every change. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not until():
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.add(future)
                try:
                    await future
                finally:
                    self._waiting.discard(future)

    def release(self, user: str) -> None:
        """Lets go of what is held of calls of this `user`, and holds nothing of its later ones."""
        self._released.add(user)
        for exchange in self._held.pop(user, []):
            exchange.release()

    # -- routes ---------------------------------------------------------------------------------

    def _serve(self, connection: Connection, request: Request) -> None:
        match request.method, request.path:
            case "GET", "/calls":
                connection.respond(200, msgspec.json.encode(list(self.calls)))
            case "DELETE", "/calls":
                self.calls.clear()
                connection.respond(200, b"{}")
            case "GET", "/health":
                connection.respond(200, b'{"status":"ok"}')
            case _ if self.key and _key_in(request) != self.key:
                refuse(connection, 401, f"Incorrect API key provided: {_key_in(request)}", "invalid_api_key")
            case _ if request.path.startswith("/openai/") and "api-version=" not in request.query:
                refuse(connection, 404, "Resource not found: there is no api-version", "404")
            case "GET", ("/v1/models" | "/openai/models"):
                listed = [{"id": m, "object": "model", "owned_by": "klatch"} for m in self.models]
                connection.respond(200, _json({"object": "list", "data": listed}))
            case "POST", path if path in ("/v1/chat/completions", "/v1/embeddings") or _AZURE.fullmatch(path):
                self._receive(connection, request, path)
            case _:
                refuse(connection, 404, f"no such path: {request.path}", "not_found")

    def _receive(self, connection: Connection, request: Request, path: str) -> None:
        try:
            body: Json = json.loads(request.body)
            if deployment := _AZURE.fullmatch(path):
                scripted = cast("Json", body.get("x-fake", {}))
                body = {**body, "model": unquote(deployment["name"]), "x-fake": {"azure": True, **scripted}}
            number = next(self._ids)
            instead = self.instead(number)
            model, script = self._script_of({**body, "model": instead} if instead else body)
        except (ValueError, AttributeError) as error:
            refuse(connection, 400, f"cannot read this request: {error}", "bad_request")
            return
        headers = {k: v for k, v in request.headers.items() if k not in ("authorization", "api-key")}
        call = Call(f"c{number}", path, headers, body, time.time())
        self.calls.append(call)
        exchange = Exchange(call, connection, self._notify)
        self._notify()
        if script.held:
            self._held.setdefault(str(body.get("user", "")), []).append(exchange)
        answer = partial(self._answer, exchange, model, script)
        if script.header_delay:
            self._wheel.at(asyncio.get_running_loop().time() + script.header_delay, answer)
        else:
            answer()

    def _script_of(self, body: Json) -> tuple[str, Script]:
        """Raises ValueError."""
        model, script = script_of(body)
        if script.fails:
            user = str(body.get("user", ""))
            self._failed[user] += 1
            if self._failed[user] > script.fails:
                script = msgspec.structs.replace(script, status=0, fault="")
        if script.held and str(body.get("user", "")) in self._released:
            script = msgspec.structs.replace(script, held=False)
        return model, script

    def _answer(self, exchange: Exchange, model: str, script: Script) -> None:
        body = exchange.call.body
        if exchange.call.outcome != "open":
            return
        if script.status:
            exchange.refuse(script.status, "as scripted", script.retry_after)
        elif script.prompt_filtered:
            exchange.filter_prompt()
        elif exchange.call.path.endswith("/embeddings"):
            exchange.respond(_embeddings(body))
        elif script.reject_stream_options and "stream_options" in body:
            exchange.refuse(400, "Unrecognized request argument supplied: stream_options", "")
        else:
            answer = Answer(exchange.call.id, model, body, script)
            if answer.streamed:
                exchange.stream(self._wheel, answer.frames(), script)
            else:
                now = asyncio.get_running_loop().time()
                self._wheel.at(now + answer.seconds(), partial(exchange.respond, answer.whole()))

    def _notify(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


_AZURE = re.compile(r"/openai/deployments/(?P<name>[^/]+)/(?:chat/completions|embeddings)")


def _key_in(request: Request) -> str:
    """Azure's way to say a key, on its paths alone, or everybody's."""
    if request.path.startswith("/openai/") and "api-key" in request.headers:
        return request.headers["api-key"]
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def _embeddings(body: Json) -> bytes:
    """Small vectors of length one, the same for the same text; floats or base64, as asked."""
    given = body.get("input", "")
    texts = cast("list[object]", given) if isinstance(given, list) else [given]
    dimensions = body.get("dimensions")
    size = dimensions if isinstance(dimensions, int) else 8
    vectors = [_vector(str(text), size) for text in texts]
    base64 = body.get("encoding_format") == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": b64encode(pack(f"<{size}f", *vector)).decode() if base64 else vector,
        }
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(len(str(text).split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "model": body.get("model"), "data": data, "usage": usage})


def _vector(text: str, size: int) -> list[float]:
    digits = (sha256(f"{i}:{text}".encode()).digest()[0] - 127.5 for i in range(size))
    raw = list(digits)
    length = sum(x * x for x in raw) ** 0.5
    return [x / length for x in raw]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
