"""HTTP to a model server: opens responses, and turns all that goes wrong into `ModelError`.

The session is made on first use, in the loop that uses it. Nothing here retries, follows a
redirect (the key would travel), keeps cookies, or reads proxies from the environment.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict, CIMultiDictProxy

from klatch_agents.gateway.errors import (
    ConnectError,
    MalformedError,
    MisconfiguredError,
    ModelError,
    RefusedError,
    StalledError,
    TruncatedError,
    told_in_a_good_answer,
)
from klatch_agents.gateway.facts import read_error
from klatch_agents.gateway.port import KeyOf, Timeouts

_LONGEST_ERROR_BODY = 2**20
LONGEST_RETRY_AFTER_S = 366 * 86400.0
"""What a server asks for beyond that is told as this."""


class _Looking(aiohttp.BytesPayload):
    """A body that has a last look, on the connection it is to leave on; the headers leave with its first bytes."""

    def __init__(self, body: bytes, look: Callable[[], Awaitable[None]]) -> None:
        super().__init__(body)
        self._look = look
        self.objection: Exception | None = None
        """What kept it from leaving. aiohttp tells only that it did not."""

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        try:
            await self._look()
        except Exception as error:
            self.objection = error
            raise
        await super().write_with_length(writer, content_length)


class Client:
    """Connections to one server, with its key and the header that says it."""

    def __init__(self, key_of: KeyOf, key_headers: Callable[[str], Mapping[str, str]]) -> None:
        self._key_of = key_of
        self._key_headers = key_headers
        self._key = ""
        self._refused = ""
        """The last key that a 401 was the answer to."""
        self._session: aiohttp.ClientSession | None = None
        self._lingering: set[aiohttp.ClientResponse] = set()
        self._closed = False

    async def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        timeouts: Timeouts,
        body: bytes = b"",
        before_send: Callable[[], Awaitable[None]] | None = None,
    ) -> aiohttp.ClientResponse:
        """A response whose status is 200-299, its body unread. The caller closes it.

        Raises ConnectError, RefusedError, StalledError, MalformedError for a redirect, and what `before_send` raises.
        """
        data = _Looking(body, before_send) if before_send else body or None
        sent = CIMultiDict(headers)
        sent["Content-Type"] = "application/json"
        key = self._key = await self._key_within(timeouts.first_token)
        sent.update(self._key_headers(key))
        try:
            response = await self._answer(method, url, data, sent, timeouts)
        except ModelError:
            if isinstance(data, _Looking) and data.objection:
                raise data.objection from None
            raise
        if response.status < 300:
            if key == self._refused:
                self._refused = ""  # by mistake
            return response
        if response.status == 401:
            self._refused = key
        try:
            raise await self._refusal(response, url, timeouts, key)
        finally:
            response.close()

    async def _key_within(self, seconds: float) -> str:
        try:
            async with asyncio.timeout(seconds):
                return await self._key_of(self._refused)
        except TimeoutError as error:
            raise MisconfiguredError(f"the key of the model server was not there within {seconds:g} s") from error

    async def _answer(
        self, method: str, url: str, data: bytes | _Looking | None, headers: CIMultiDict[str], timeouts: Timeouts
    ) -> aiohttp.ClientResponse:
        with _named_failures(url, timeouts):
            async with asyncio.timeout(timeouts.first_token):
                return await self._open_session().request(
                    method,
                    url,
                    data=data,
                    headers=headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None, connect=timeouts.connect, sock_connect=timeouts.connect),
                )

    async def fetch(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        timeouts: Timeouts,
        body: bytes = b"",
    ) -> bytes:
        """The whole body of a good response. Raises as `open` does, and TruncatedError."""
        async with await self.open(method, url, headers, timeouts, body) as response:
            return await self.whole(response, timeouts)

    async def whole(self, response: aiohttp.ClientResponse, timeouts: Timeouts) -> bytes:
        """All of a good response's body. Raises StalledError, TruncatedError."""
        try:
            async with asyncio.timeout(timeouts.first_token):
                return await response.read()
        except TimeoutError as error:
            raise StalledError(f"{response.url} sent half an answer and fell silent") from error
        except aiohttp.ClientError as error:
            raise TruncatedError(f"{response.url} broke off in the middle of its answer") from error

    def not_as_asked(self, response: aiohttp.ClientResponse, body: bytes, asked: str) -> ModelError:
        """Why a 200 that is not what was asked for is no answer: it is an error in disguise, or this is no
        server of OpenAI's API."""
        upstream = request_id(response)
        if b'"error"' in body:
            return told_in_a_good_answer(read_error(self._without_key(body)), upstream_request_id=upstream)
        return MalformedError(
            f"{response.url} answered {response.content_type} where {asked} was asked for; "
            "is the URL that of an OpenAI-compatible API, ending in /v1?",
            upstream_request_id=upstream,
        )

    async def read(self, response: aiohttp.ClientResponse, seconds: float = 10.0) -> bytes:
        """The beginning of a body that explains a failure; what cannot be had is left out."""
        read = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while len(read) < _LONGEST_ERROR_BODY and (more := await response.content.readany()):
                    read += more
        except (aiohttp.ClientError, OSError):  # TimeoutError is an OSError
            pass
        return bytes(read)

    def linger(self, response: aiohttp.ClientResponse) -> None:
        """Leaves a response whose body is about to end, so that its connection can be used again.

        aiohttp gives the connection back when the end comes, mostly in the read that held
        `[DONE]`. Nobody waits for it, and after a second it is hung up.
        """
        if response.content.is_eof():
            response.close()
        else:
            self._lingering.add(response)
            asyncio.get_running_loop().call_later(1.0, self._hang_up, response)

    def _hang_up(self, response: aiohttp.ClientResponse) -> None:
        self._lingering.discard(response)
        response.close()

    async def close(self) -> None:
        self._closed = True
        for response in list(self._lingering):
            self._hang_up(response)
        if self._session is not None:
            await self._session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise ConnectError("this gateway was closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Below the 5 s of uvicorn: the server must not be first to close an idle
                # connection, or a call can meet its end.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    async def _refusal(self, response: aiohttp.ClientResponse, url: str, timeouts: Timeouts, key: str) -> ModelError:
        upstream = request_id(response)
        if response.status < 400:
            return MalformedError(
                f"{url} answered with a redirect ({response.status}); give its final URL instead",
                upstream_request_id=upstream,
            )
        said = self._without_key(await self.read(response, min(10.0, timeouts.idle)), key)
        return RefusedError(
            response.status,
            read_error(said),
            retry_after=retry_after(response.headers),
            upstream_request_id=upstream,
            said=said,
        )

    def _without_key(self, said: bytes, sent: str = "") -> bytes:
        """A server may quote the key it refuses."""
        for key in filter(None, (sent, self._key, self._refused)):
            said = said.replace(key.encode(), b"***")
        return said


def request_id(response: aiohttp.ClientResponse) -> str | None:
    """The server's own id of a call, in the header that OpenAI, Azure or Anthropic use for it."""
    headers = response.headers
    return headers.get("x-request-id") or headers.get("apim-request-id") or headers.get("request-id")


def retry_after(headers: CIMultiDictProxy[str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `Retry-After` (seconds or a date): 0 to `LONGEST_RETRY_AFTER_S`."""
    for header, seconds in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(header, "").strip()
        if value.replace(".", "", 1).isdecimal():
            return min(float(value) * seconds, LONGEST_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, OverflowError):
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return min(max(0.0, (at - datetime.now(UTC)).total_seconds()), LONGEST_RETRY_AFTER_S)


@contextmanager
def _named_failures(url: str, timeouts: Timeouts) -> Generator[None]:
    try:
        yield
    except aiohttp.ServerTimeoutError as error:
        raise ConnectError(f"no connection to the model server at {url} within {timeouts.connect:g} s") from error
    except TimeoutError as error:
        raise StalledError(f"the model server at {url} did not answer within {timeouts.first_token:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectError(
            f"cannot reach the model server at {url} ({type(error).__name__}: {error}); "
            "check that it runs and that its URL is right"
        ) from error
