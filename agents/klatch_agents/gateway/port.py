"""The port to models: what a stage may ask of a gateway and what it can rely on.

A reply arrives as batches of chunks, one batch a socket read, each chunk the upstream's own bytes
with a few facts beside it, but for what the log could not hold (`facts.py`). Where a vendor departs
from OpenAI's API in what clients act on, a chunk is put right: a choice that called tools finishes
with `tool_calls`, and a counted total is told once, on a chunk of its own at the end. A reply ends
in exactly one of three ways: the iteration ends and `finished` says how, a `ModelError` is raised,
or the caller leaves, which closes the upstream connection at once. No finish_reason is ever
invented, and nothing is retried behind the caller's back once a byte of the reply has come.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from klatch_agents.gateway.errors import ModelError


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The longest silences a call bears, in seconds. There is no limit on the whole reply: how
    long a generation may take is the caller's deadline, not the wire's.

    A comment (`: keep-alive`) ends a silence. `first_token` also covers the wait for the status
    line, and holds until a chunk speaks; `idle` holds from then on.
    """

    connect: float = 10.0
    first_token: float = 300.0
    idle: float = 60.0


DEFAULT_TIMEOUTS = Timeouts()


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One chat completion to make. `body` is the caller's request as it stands, with members this
    code has never heard of; only `model`, `stream` and `stream_options` are set by the gateway.

    `prefix`, if any, is the beginning of the answer, which somebody has read already: the reply
    goes on right behind it and does not repeat it. Give one only where `Gateway.continues` said
    yes, and only for one choice of plain text: no server goes on inside a tool call, a JSON schema
    or log probabilities.
    """

    body: Mapping[str, object]
    model: str | None = None
    timeouts: Timeouts = DEFAULT_TIMEOUTS
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    request: str = ""
    """Names the request: which of several deployments serves it is a hash of this."""
    tenant: str = ""
    weight: float = 1.0
    """The tenant's, where a deployment's places are shared."""
    priority: int = 5
    """0 to 9, 0 first."""
    deadline: float | None = None
    """Seconds since 1970: a call that still waits for its turn then is not made."""
    prefix: str = ""
    avoid: frozenset[str] = frozenset()
    """Deployments that failed this request before: taken only where there is no other."""
    before_try: Callable[[], Awaitable[None]] | None = None
    """Awaited before each try of a stream, behind whatever was waited for; what it raises is the end of the call."""
    before_send: Callable[[str], Awaitable[None]] | None = None
    """Awaited once the connection to the server stands, right before the request leaves on it, with `deployment`:
    late, where a process was stopped while it connected. What it raises is the end of the call; nothing has left."""
    failed: Callable[[ModelError], None] | None = None
    """Told of each try that came to nothing, before anything else is waited for."""
    deployment: str = ""
    """Which deployment it is sent to, where a route names one."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the upstream counted them. `cached_tokens` are part of `prompt_tokens` and
    `reasoning_tokens` part of `completion_tokens`: never add or subtract them. `raw` is the usage
    object as it was sent."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    raw: bytes = b""


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """One `chat.completion.chunk`: the upstream's bytes, and what was read from them beside.

    `speaks`: its delta carries something of the answer (content, refusal, reasoning, a call, audio,
    what a vendor has thought of) and not only a role. `usage_only`: the accounting chunk
    after the last finish, to be hidden from a client that did not ask for it. `choices` are the
    indexes it tells of; `finishes` gives `(index, finish_reason)` of those that end here, `calls` the
    indexes of those that call tools here.
    """

    raw: bytes
    speaks: bool = False
    usage_only: bool = False
    choices: tuple[int, ...] = ()
    finishes: tuple[tuple[int, str], ...] = ()
    usage: Usage | None = None
    calls: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """How a whole reply ended: every choice that was seen has its finish_reason.

    `ending` tells what the wire did after the last one: the `[DONE]` marker, a clean end of the
    body, or neither (`cut`, or what cannot be read: then the usage may be missing though the text is whole). `usage` is
    the last that was sent, for servers that send a running total on every chunk.
    """

    finish_reasons: Mapping[int, str]
    usage: Usage | None
    ending: Literal["done", "eof", "cut"]


class ModelReply(Protocol):
    """A reply under way. Iterate once; `finished` is None until the end has been read, which may be
    known with the last batch."""

    @property
    def model(self) -> str:
        """The model that was asked for."""
        ...

    @property
    def upstream_request_id(self) -> str | None:
        """The server's name for this call: the only handle for a ticket with its vendor."""
        ...

    @property
    def deployment(self) -> str:
        """Which deployment of a route serves it; empty where there is no route."""
        ...

    @property
    def finished(self) -> Finished | None: ...

    def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        """Batches in the order of the wire, never empty. Raises `ModelError`."""
        ...


class Gateway(Protocol):
    """Models behind a URL. Entering `stream` sends the call and waits for the status line; leaving
    it, in whatever way, closes or releases the upstream connection without waiting for it. A task
    that is cancelled anywhere inside, also while it waits for the first token, has hung up when
    its `CancelledError` arrives. All of it raises `ModelError`.
    """

    def stream(self, call: ModelCall) -> AbstractAsyncContextManager[ModelReply]: ...

    def continues(self, call: ModelCall) -> bool:
        """Whether whoever answers this call would go on from a `prefix`. Asks nobody, raises
        nothing; what the call's own `prefix` is does not matter."""
        ...

    async def close(self) -> None:
        """Hangs up every call and frees the connections. May be called twice."""
        ...


class Embedded(NamedTuple):
    """Texts that were embedded: the raw answer to `POST /embeddings`, and who gave it."""

    answer: bytes
    deployment: str = ""
    """Which deployment of a route; empty where there is no route."""
    estimated: bool = False
    """Whether the usage in the answer is klatch's own count."""


class Catalogue(Protocol):
    """What else a model server answers. Raises `ModelError`."""

    async def embed(
        self,
        body: Mapping[str, object],
        timeouts: Timeouts | None = None,
        before_send: Callable[[], Awaitable[None]] | None = None,
    ) -> bytes:
        """The raw answer to `POST /embeddings`, a list of embeddings. `first_token` covers the wait for its status
        line, and then the wait for all of its body; None: the server's own time-outs. `before_send`: as in a
        `ModelCall`."""
        ...

    async def models(self, timeouts: Timeouts | None = None) -> list[str]:
        """The ids that the server lists; time-outs as for `embed`."""
        ...


class KeyOf(Protocol):
    """Gives the key of the moment; empty: none."""

    async def __call__(self, refused: str = "") -> str:
        """`refused`: a key that the server answered with 401; another one is had if it can be. Raises ModelError."""
        ...
