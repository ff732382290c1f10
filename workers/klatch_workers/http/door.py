"""What an HTTP door is given: one frozen object, and the small ports that it names.

A door holds no state that a client could miss after a restart: streams are in the log, keys in a ledger. Times are
seconds and sizes bytes, unless a name says otherwise.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from klatch_agents.gateway.port import Embedded, ModelCall
from klatch_schemas.events import Prices
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import MAX_BODY_BYTES, Namespace
from klatch_streams.log import Log
from klatch_streams.seen import LONGEST_MS


class Embeddings(Protocol):
    """Answers `POST /v1/embeddings`; a gateway to models is one."""

    async def embed(self, call: ModelCall) -> Embedded:
        """The answer to a call with this body. Raises KlatchError or ModelError."""
        ...


class Models(Protocol):
    """Lists the models on offer; a gateway to models is one."""

    async def models(self) -> list[str]:
        """The ids of the models. Raises KlatchError or ModelError."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """The patience and the appetite of a door."""

    max_body_bytes: int = MAX_BODY_BYTES
    """A request travels in one record, twice, so this stays below what a record may be."""
    off_loop_bytes: int = 256_000
    """Larger bodies are parsed in a thread: a megabyte of JSON would hold up every other stream."""
    buffer_bytes: int = 1_048_576
    """What one reader may leave unread before it leaves the hub and reads for itself."""
    hold_s: float = 10.0
    """How long the status line waits for the first token, so that a refusal can still be a status."""
    keepalive_s: float = 15.0
    """The silence after which a comment is sent: load balancers cut idle connections after 60."""
    write_timeout_s: float = 30.0
    """A client that takes nothing of what waits for it for so long is dead (`connections.py`)."""
    doubt_s: float = 5.0
    """The silence after which it is asked whether an `Idempotency-Key` named another request before: see `repeats`."""
    silence_s: float = 900.0
    """A stream that says nothing for so long is given up with an error, and stays resumable."""
    append_timeout_s: float = 15.0
    """How long the log may take to accept a request: brokers elect a new leader in 8 to 9 s."""
    intake_bytes: int = 64 * 1024 * 1024
    """How much may wait to be accepted, all requests together: more is refused while the log does not answer."""
    admission_timeout_s: float = 15.0
    """How long admission may take to decide on embeddings, whose client waits without a sign of life."""
    linger_s: float = 60.0
    """How long a partition is followed after its last reader left."""
    idempotency_window_ms: int = LONGEST_MS
    """How far back a stream is looked for that an `Idempotency-Key` names: as far as admission may know the key.

    Looking costs a read of the conversation's partition over this time, unless this door remembers the key.
    """
    clock_skew_ms: int = 60_000
    """By how much the clocks of doors, stages and brokers may differ when a stream is looked for by time."""


def _no_price(_model: str, _deployment: str) -> Prices | None:
    return None


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Door:
    """Everything an HTTP door works with."""

    log: Log
    keys: Mapping[str, Tenant]
    """sha256 of an API key, in hex, to the tenant who may use it; kept current by whoever made it."""
    namespace: Namespace = Namespace()
    embeddings: Embeddings | None = None
    models: Models | None = None
    prices: Callable[[str, str], Prices | None] = _no_price
    """What a model costs at a deployment, where it is known: embeddings are settled here."""
    ready: Callable[[], bool] = _always
    """Whether the ledgers are complete."""
    terms: Terms = Terms()


TextEmbedder = Callable[[list[str]], Awaitable[list[list[float]]]]
"""Vectors of texts, in order: what a local embedding model offers."""
