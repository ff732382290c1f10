"""One turn of a chat over the HTTP door: the reply as it comes, through broken connections and restarts of the reply.

A reply that lost its connection is read on where it stopped (`Last-Event-ID`), from whichever door answers. A turn
that is not accepted is never sent twice by itself: who asks again is the person.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from klatch_agents.sse import Decoder, Event
from klatch_schemas import codec
from klatch_schemas.codec import Unreadable
from klatch_workers.cli.context import FAILED, MISUSED, UNREACHABLE, CommandFailed, ServerAddress

_TRIES: Final = 6
"""How often a broken connection is resumed without a new event in between."""
_SILENCE_S: Final = 60.0
"""The door sends a sign of life every 15 s."""
_READ_ON: Final = frozenset({"unavailable"})
"""Errors of a stream after which another door can go on."""


@dataclass(frozen=True, slots=True)
class Text:
    """Some text of the reply."""

    text: str


@dataclass(frozen=True, slots=True)
class StartsOver:
    """What was said so far is void: the reply begins anew."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person may want to know while waiting."""

    text: str


@dataclass(slots=True)
class Outcome:
    """What is known of a turn, while it goes on and at its end."""

    request: str = ""
    status: str = ""
    """`completed`, or an error's code; empty while it goes on."""
    text: str = ""
    error: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    first_token_ms: int | None = None
    total_ms: int = 0
    exit_code: int = 0


Happening = Text | StartsOver | Notice


class _Lost(Exception):
    """The connection broke before the reply was whole."""


class Turn:
    """A request and its reply: iterate over `happenings`, then read `outcome`."""

    def __init__(self, session: aiohttp.ClientSession, door: ServerAddress, body: Mapping[str, Any]) -> None:
        self._session = session
        self._door = door
        self._body = body
        self._began = time.monotonic()
        self._last_id = ""
        self._tries = 0
        self._accepted = asyncio.Event()
        self.outcome = Outcome()

    async def happenings(self) -> AsyncIterator[Happening]:
        """The reply as it comes. Raises CommandFailed when it never began."""
        async with self._posted() as response:
            try:
                async for one in self._read(response):
                    yield one
            except _Lost:
                pass
        while not self.outcome.status:
            async for one in self._read_on():
                yield one
        self.outcome.total_ms = self._elapsed_ms()

    async def cancel(self) -> None:
        """Ask for the reply to end where it is, as soon as its name is known. Raises CommandFailed."""
        await self._accepted.wait()
        if self.outcome.status:
            return
        try:
            async with self._session.delete(self._stream_url()) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CommandFailed(f"could not cancel: {error or type(error).__name__}", UNREACHABLE) from error

    @asynccontextmanager
    async def _posted(self) -> AsyncGenerator[aiohttp.ClientResponse]:
        url = f"{self._door.url}/v1/chat/completions"
        try:
            async with self._session.post(url, data=codec.dumps(self._body)) as response:
                self.outcome.request = response.headers.get("x-request-id", "")
                self._accepted.set()
                if response.status != 200:
                    raise await refusal(response, self._door)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise unreached(self._door, error) from error
        finally:
            self._accepted.set()

    async def _read_on(self) -> AsyncIterator[Happening]:
        self._tries += 1
        if self._tries > _TRIES:
            self._fail("connection_lost", f"the connection was lost {_TRIES} times; the reply goes on without you")
            return
        if self._tries > 1:
            yield Notice("the connection was lost; reading on")
            await asyncio.sleep(min(0.2 * 2**self._tries, 5.0))
        headers = {"last-event-id": self._last_id} if self._last_id else {}
        try:
            async with self._session.get(self._stream_url("&include_usage=1"), headers=headers) as response:
                if response.status == 200:
                    async for one in self._read(response):
                        yield one
                elif (error := await refusal(response, self._door)).exit_code != UNREACHABLE:
                    self._fail("resume_refused", str(error))
        except (aiohttp.ClientError, TimeoutError, _Lost):
            return

    async def _read(self, response: aiohttp.ClientResponse) -> AsyncIterator[Happening]:
        """The events of one connection. Raises _Lost when it ends before the reply does."""
        decoder = Decoder()
        try:
            async for read in response.content.iter_any():
                for event in decoder.feed(read):
                    if isinstance(event, Event):
                        for one in self._take(event):
                            yield one
                if self.outcome.status:
                    return
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _Lost from error
        raise _Lost

    def _take(self, event: Event) -> list[Happening]:
        if event.data == b"[DONE]":
            self.outcome.status = "completed"
            return []
        try:
            said: Any = codec.loads(event.data)
        except Unreadable:
            return []
        if "error" in said:
            return self._take_error(said["error"])
        if event.id:
            self._last_id, self._tries = event.id.decode(), 0
        self.outcome.usage = said.get("usage") or self.outcome.usage
        text = ""
        for choice in said.get("choices") or ():
            if choice.get("index", 0) == 0:
                delta: Mapping[str, Any] = choice.get("delta") or {}
                text += str(delta.get("content") or delta.get("refusal") or "")
                self.outcome.finish_reason = choice.get("finish_reason") or self.outcome.finish_reason
        if not text:
            return []
        if self.outcome.first_token_ms is None:
            self.outcome.first_token_ms = self._elapsed_ms()
        self.outcome.text += text
        return [Text(text)]

    def _take_error(self, error: Mapping[str, Any]) -> list[Happening]:
        ours: Mapping[str, Any] = error.get("klatch") or {}
        code = str(ours.get("code") or error.get("code") or "internal")
        if code in _READ_ON:
            raise _Lost
        if code == "superseded":
            # Another attempt took over: its reply is read from the beginning.
            self._last_id, self.outcome.text = "", ""
            return [StartsOver()]
        self._fail(code, sentence(error))
        return []

    def _fail(self, code: str, message: str) -> None:
        self.outcome.status, self.outcome.error, self.outcome.exit_code = code, message, FAILED

    def _stream_url(self, more: str = "") -> str:
        conversation = quote(str(self._body["klatch"]["conversation"]), safe="")
        return f"{self._door.url}/v1/streams/{quote(self.outcome.request, safe='')}?conversation={conversation}{more}"

    def _elapsed_ms(self) -> int:
        return round((time.monotonic() - self._began) * 1000)


async def open_session(door: ServerAddress) -> aiohttp.ClientSession:
    """A session with the door; patient with long replies, not with a dead connection."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=_SILENCE_S)
    headers = {"authorization": f"Bearer {door.key}", "content-type": "application/json"}
    return aiohttp.ClientSession(headers=headers, timeout=timeout)


async def first_model(session: aiohttp.ClientSession, door: ServerAddress) -> str:
    """The first model on offer. Raises CommandFailed."""
    try:
        async with session.get(f"{door.url}/v1/models") as response:
            if response.status != 200:
                raise await refusal(response, door)
            listed: list[Mapping[str, Any]] = codec.loads(await response.read())["data"]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise unreached(door, error) from error
    except (Unreadable, LookupError, TypeError) as error:
        raise CommandFailed(f"what answers at {door.url} is not klatch's door; say where it is with --http") from error
    return str(listed[0]["id"]) if listed else "default"


async def refusal(response: aiohttp.ClientResponse, door: ServerAddress) -> CommandFailed:
    """What the door said instead of a reply, as one sentence."""
    try:
        error: Mapping[str, Any] = codec.loads(await response.read())["error"]
        message = sentence(error)
    except (Unreadable, LookupError, TypeError):
        return CommandFailed(f"what answers at {door.url} is not klatch's door; say where it is with --http")
    codes = {401: MISUSED, 503: UNREACHABLE}
    return CommandFailed(message, codes.get(response.status, FAILED))


def unreached(door: ServerAddress, error: Exception) -> CommandFailed:
    """Nobody answered, or no longer."""
    reason = str(error) or type(error).__name__
    return CommandFailed(
        f"klatch's door at {door.url} does not answer ({reason}): start `klatch up`, or say where it is with --http",
        UNREACHABLE,
    )


_ADVICE: Final = {
    "invalid_api_key": "set KLATCH_API_KEY to a key of yours",
    "content_filter": "say it in other words",
    "model_error": "try again; `klatch doctor` says whether the model server answers",
    "unavailable": "try again in a moment",
    "deadline_exceeded": "try again",
}


def sentence(error: Mapping[str, Any]) -> str:
    """An error of the door in one sentence that says what to do."""
    ours: Mapping[str, Any] = error.get("klatch") or {}
    message = str(error.get("message") or "the door refused without a reason").rstrip(".")
    if wait := ours.get("retry_after_ms"):
        return f"{message}; try again in {max(1, -(-int(wait) // 1000))} s"
    advice = _ADVICE.get(str(ours.get("code") or error.get("code")))
    return f"{message}; {advice}" if advice else message
