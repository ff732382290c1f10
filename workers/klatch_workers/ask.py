"""One HTTP call with the standard library, for commands that work in the bare install.

It blocks: call it in a thread where something else goes on. Answers of any status are returned; whoever asks judges
them. A proxy that the environment names is never asked for this machine's own addresses.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_MOST_BYTES = 1_000_000


class Unreached(Exception):
    """Nobody answered; the message says who did not, and why."""


class Answer(NamedTuple):
    """What was answered."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def reason(self) -> str:
        """The message of an error in OpenAI's shape, else the status."""
        try:
            return str(self.json["error"]["message"])
        except (KeyError, TypeError):
            return f"HTTP status {self.status}"


def ask(
    method: str, url: str, *, key: str | None = None, body: Mapping[str, Any] | None = None, timeout_s: float = 10.0
) -> Answer:
    """Make the call, `key` as bearer. Raises Unreached."""
    headers = {"content-type": "application/json"} if body is not None else {}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise Unreached(f"{url!r} is no HTTP address: it has the form http://host:port")
    request = urllib.request.Request(url, data=data, headers=headers, method=method)  # noqa: S310 - checked above
    proxies = urllib.request.ProxyHandler({} if parts.hostname in _LOOPBACK else None)
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=timeout_s) as response:
            return Answer(response.status, response.read(_MOST_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read(_MOST_BYTES))
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise Unreached(f"{url} does not answer: {reason or type(error).__name__}") from error
