"""An attempt that continues: the call that asks for the rest, and chunks that look like one reply.

The server answers as if it began: with an id of its own, a role, and a count of what it wrote itself. The writer, not
each reader, makes the rest fit what stands (traps 12, 13 and 30): `id`, `created`, `model` and `system_fingerprint` are
those of the first chunk that has an id, no delta repeats the role, and a count of tokens holds what stood before, as
klatch counts it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

from klatch_agents.gateway.port import ModelCall
from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.chunks import Json
from klatch_schemas.events import OnCrash, Usage
from klatch_streams.continuing import Begun, begun
from klatch_workers.generation.aside import aside

_CONSTANT: Final = ("id", "created", "model", "system_fingerprint")
_LIMITS: Final = ("max_tokens", "max_completion_tokens")


async def begun_aside(body: Mapping[str, object], on_crash: OnCrash, assembly: Assembly) -> Begun | None:
    """`begun`, without holding up the event loop; of what stands when it is asked."""
    standing = list(assembly.standing)
    return await aside(len(standing), lambda: begun(body, on_crash, replace(assembly, standing=standing)))


def rest_of(call: ModelCall, begun: Begun) -> ModelCall:
    """The call for what is missing. A limit on tokens is lowered by what stands, and leaves one at least."""
    body = dict(call.body)
    for name in _LIMITS:
        if isinstance(limit := body.get(name), int):
            body[name] = max(1, limit - begun.tokens)
    return replace(call, body=body, prefix=begun.text)


def fitted(raw: bytes, begun: Begun) -> bytes:
    """A chunk of the rest as a chunk of the whole."""
    chunk: Json = codec.loads(raw)
    for name in _CONSTANT:
        if name in chunk and name in begun.first:
            chunk[name] = begun.first[name]
    for choice in cast("list[Any]", chunk.get("choices") or []):
        if isinstance(delta := choice.get("delta"), dict):
            cast("Json", delta).pop("role", None)
    if isinstance(usage := chunk.get("usage"), dict):
        chunk["usage"] = _with_before(usage, begun.tokens)
    return codec.dumps(chunk)


def whole_usage(usage: Usage, begun: Begun) -> Usage:
    """What the whole reply used, of what the server counted for the rest."""
    tokens = usage.completion_tokens + begun.tokens
    return usage.model_copy(update={"completion_tokens": tokens, "estimated": True})


def _with_before(usage: Mapping[str, Any], tokens: int) -> Json:
    known = {name: count for name in ("completion_tokens", "total_tokens") if isinstance(count := usage.get(name), int)}
    return {**usage, **{name: count + tokens for name, count in known.items()}}
