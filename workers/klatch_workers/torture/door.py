"""A reader over HTTP that means to have its reply: it asks again under the same key, and resumes by the last event id.

Whatever happens to its connection or to the door, it goes on until it is told of an end. Some readers go away in
mid-stream on purpose, to come back, or to be taken at their word as cancelled.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from klatch_schemas import codec
from klatch_schemas.errors import KlatchError
from klatch_workers.torture.evidence import Asked, Observation
from klatch_workers.torture.told import content_of, outcome_of

_AGAIN_S: Final = 0.3
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=25.0)
"""A keep-alive comes every 15 s."""
_DONE: Final = b"[DONE]"
_SERVICE_UNAVAILABLE: Final = 503


class Left(Exception):
    """The reader went away as it meant to."""


@dataclass(slots=True)
class HttpReader:
    """One reader of one reply."""

    session: aiohttp.ClientSession
    url: str
    key: str
    asked: Asked
    name: str = "http"
    resumes_only: bool = False
    """Whether it never asks, only reads what was asked."""
    troubles: Counter[str] = field(default_factory=Counter[str])
    """Errors that made it try again, by code."""
    acknowledged: asyncio.Event = field(default_factory=asyncio.Event)
    chunks: int = 0
    """How many it was shown since it last began."""
    _shown: list[bytes] = field(default_factory=list[bytes])
    _voided: list[str] = field(default_factory=list[str])
    _outcomes: list[str] = field(default_factory=list[str])
    _last_id: str | None = None
    _leaves: list[int] = field(default_factory=list[int])
    _left: bool = False
    _unfit: list[str] = field(default_factory=list[str])
    _deleted: bool = False
    _hung_up_ms: float = 0.0
    _called: bool = False
    _asking: bool = False
    """Whether it is in a call that asks, of which it knows that what the log holds of its request comes from there."""
    _leaving: asyncio.Timeout | None = None
    """Ends the connection when it means to go away for good."""
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        """Read until told of an end, or until it leaves for good."""
        turn = self.asked.turn
        self._leaves = list(turn.leaves_after) if turn.trouble.cancel is None and self.name == "http" else []
        while not self._outcomes and not self._left:
            try:
                async with asyncio.timeout(None) as self._leaving:
                    await self._once()
            except Left:
                pass
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if not self._left:
                    self.troubles[type(error).__name__] += 1
            finally:
                self._leaving, self._asking = None, False
            self._news.set()
            if not self._outcomes and not self._left:
                await asyncio.sleep(_AGAIN_S)

    def leave(self) -> None:
        """Go away for good, now."""
        self._hang_up()
        self._news.set()
        if self._leaving:
            self._leaving.reschedule(asyncio.get_running_loop().time())

    def _hang_up(self) -> None:
        self._left = True
        if self._asking:
            self._hung_up_ms = time.time() * 1000

    async def shown(self, chunks: int) -> None:
        """Wait until it was shown so many chunks, or reads no more."""
        while self.chunks < chunks and not self._outcomes and not self._left:
            self._news.clear()
            await self._news.wait()

    def observation(self) -> Observation:
        """What it was shown."""
        outcomes = tuple(self._outcomes)
        text = "".join(map(content_of, self._shown))
        last = outcomes[-1] if outcomes else None
        return Observation(
            self.name,
            self.asked.turn.request,
            text,
            last,
            tuple(self._voided),
            outcomes,
            self._left,
            tuple(self._unfit),
            self._deleted,
            self._hung_up_ms,
            time.time() * 1000,
        )

    # --- one connection

    async def _once(self) -> None:
        asks = not (self.acknowledged.is_set() or self.resumes_only)
        self._asking, self._called = asks and not self._called, True
        async with self._request() as answer:
            if answer.status != 200:
                self._error(await self._refusal(answer))
                return
            self.acknowledged.set()
            self._asking = asks
            async for name, data in _events(answer.content):
                self._take(name, data)
                self._news.set()
                self._leave_if_meant()

    async def _refusal(self, answer: aiohttp.ClientResponse) -> dict[str, Any]:
        """The error in an answer that is none of 2xx; notes what no door may answer."""
        error, status = _error_in(await answer.read()), answer.status
        if not error:
            error = {"code": f"HTTP {status}, and no error in JSON"}
            if status >= 500:
                self._unfit.append(f"{answer.method} was answered with a bare {status}")
        elif _is_end(error):
            pass
        elif status == _SERVICE_UNAVAILABLE and "retry-after" not in answer.headers:
            self._unfit.append(f"{answer.method} was answered with 503 and no Retry-After")
        elif error.get("code") == KlatchError.code:
            self._unfit.append(f"{answer.method} was answered with a failure of the door itself")
        return error

    def _request(self) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        turn, headers = self.asked.turn, {"authorization": f"Bearer {self.key}"}
        if self.acknowledged.is_set() or self.resumes_only:
            if self._last_id:
                headers["last-event-id"] = self._last_id
            where = f"{self.url}/v1/streams/{turn.request}"
            query = {"conversation": self.asked.conversation}
            return self.session.get(where, params=query, headers=headers, timeout=_TIMEOUT)
        headers["idempotency-key"] = turn.key
        return self.session.post(
            f"{self.url}/v1/chat/completions", json=self._body(), headers=headers, timeout=_TIMEOUT
        )

    def _body(self) -> dict[str, Any]:
        turn = self.asked.turn
        klatch: dict[str, Any] = {
            "on_crash": turn.on_crash,
            "if_busy": turn.if_busy,
            "on_disconnect": "cancel" if turn.trouble.cancel == "disconnect" else "continue",
        }
        if not turn.alone:
            klatch |= {"conversation": self.asked.conversation, "memory": {"recent": 2}}
        if turn.person:
            klatch["person"] = turn.person
        if turn.trouble.timeout_ms is not None:
            klatch["timeout_ms"] = turn.trouble.timeout_ms
        return {**body_of(self.asked), "stream": True, "klatch": klatch}

    def _take(self, name: str | None, data: bytes) -> None:
        if data == _DONE:
            self._outcomes.append("completed")
        elif data.startswith(b'{"error"'):
            self._error(codec.loads(data)["error"])
        else:
            if self._outcomes:
                self._outcomes.append("more text")
            self._shown.append(data)
            self.chunks += 1
            self._last_id = name or self._last_id

    def _error(self, error: dict[str, Any]) -> None:
        ours = error.get("klatch", {})
        code = str(ours.get("code", error.get("code")))
        if code == "superseded":
            self._voided.append("".join(map(content_of, self._shown)))
            self._shown, self._last_id, self.chunks = [], None, 0
        elif outcome := outcome_of(code, ours.get("status")):
            if code != "cancelled":
                # A cancel may be there before its request: then the door answers, and has nothing to accept.
                self.acknowledged.set()
            self._outcomes.append(outcome)
        else:
            # After any other error one asks again.
            self.troubles[code] += 1
        self._news.set()

    def _leave_if_meant(self) -> None:
        trouble = self.asked.turn.trouble
        if trouble.cancel == "disconnect" and self.name == "http" and self.chunks >= trouble.cancel_after:
            self._hang_up()
            raise Left
        if self._leaves and self.chunks >= self._leaves[0]:
            self._leaves.pop(0)
            raise Left

    # --- cancelling

    async def cancel(self) -> None:
        """`DELETE` the stream, again and again until the door has taken it."""
        url = f"{self.url}/v1/streams/{self.asked.turn.request}"
        query, headers = {"conversation": self.asked.conversation}, {"authorization": f"Bearer {self.key}"}
        while True:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self.session.delete(url, params=query, headers=headers, timeout=_TIMEOUT) as answer:
                    if answer.status == 202:
                        self._deleted = True
                        return
                    await self._refusal(answer)
                    self.troubles[f"DELETE {answer.status}"] += 1
            await asyncio.sleep(_AGAIN_S)


def body_of(asked: Asked) -> dict[str, Any]:
    """The Chat Completions request; `user` tells the model server's record whose call it is."""
    turn = asked.turn
    said = {"role": "user", "content": f"Question {turn.number}."}
    return {"model": turn.model, "messages": [said], "user": turn.request}


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return {}


def _is_end(error: dict[str, Any]) -> bool:
    """Whether it tells how a stream ended: then there is nothing to come again for."""
    return error.get("klatch", {}).get("status") is not None


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str | None, bytes]]:
    """Ids and data of server-sent events, as this door writes them: one line of data each."""
    name: str | None = None
    async for line in content:
        if line.startswith(b"id: "):
            name = line[4:].strip().decode()
        elif line.startswith(b"data: "):
            yield name, line[6:].strip()
            name = None
