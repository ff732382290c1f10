"""Where a request stands with its limits, as headers: `x-ratelimit-*`, as OpenAI sends them.

The facts travel in the records that the door reads anyway: an attempt's opening, or the end of a stream that was
refused. A stream that has begun before they came, with a comment, goes without.
"""

from collections.abc import Sequence

from klatch_schemas.events import EmbeddingAdmitted, RateLimits, StreamAttempt, StreamEnd
from klatch_workers.http.errors import Headers
from klatch_workers.http.reader import Heard

PREFIX = b"x-ratelimit-"


def rate_limits_in(heard: Sequence[Heard]) -> RateLimits | None:
    """What these records say of limits, if they do; the last counts."""
    found: RateLimits | None = None
    for _, said in heard:
        if isinstance(said, StreamAttempt | StreamEnd | EmbeddingAdmitted) and said.rate_limits:
            found = said.rate_limits
    return found


def rate_limit_headers(said: RateLimits) -> Headers:
    """`x-ratelimit-limit-requests`, `-remaining-requests`, `-reset-requests`, and the same for tokens."""
    headers: Headers = []
    for what, one in ((b"requests", said.requests), (b"tokens", said.tokens)):
        if one:
            headers.append((PREFIX + b"limit-" + what, b"%d" % one.limit))
            headers.append((PREFIX + b"remaining-" + what, b"%d" % one.remaining))
            headers.append((PREFIX + b"reset-" + what, duration(one.reset_ms).encode()))
    return headers


def duration(ms: int) -> str:
    """Milliseconds as OpenAI writes them, which is Go's way: `17ms`, `1.5s`, `6m0s`, `12h0m0s`."""
    if ms < 1_000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    seconds = f"{rest / 1_000:.3f}".rstrip("0").rstrip(".") + "s"
    if not minutes:
        return seconds
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}" if hours else f"{minutes}m{seconds}"
