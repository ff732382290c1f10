"""What is left of a request once its stream has ended: its usage, and its turn.

Both are made from the log's own account of the stream, so they agree with what every reader saw, and making them
again after a crash makes the same records under the same ids. The billing rule: what the model server counted;
where it sent no count (cancelled, cut, superseded), klatch's own of the text that stands and of the prompt.
Of a reply that was continued, the tokens of every attempt: klatch's own count of what stood when the last one began,
and what that one counted; the prompt is the last one's, in which its server also read the text it continued. Text that
an attempt took back (`restart`) is not billed: the tenant did not get it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final, cast

from pydantic import JsonValue

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.chunks import Json, Reply, objects_in
from klatch_schemas.events import (
    ChatAdmitted,
    Prices,
    Status,
    TurnFinished,
    Usage,
    UsageSettled,
)
from klatch_streams.counting import tokens_in
from klatch_streams.estimate import Estimate
from klatch_workers.generation.aside import aside

_PROMPT: Final = Estimate(bytes_per_token=4, per_message=4, overhead=0)
"""How a prompt is counted that no server counted: as it was reserved, images and files among it, with less to spare."""
PriceOf = Callable[[str, str], Prices | None]
"""What a model costs at a deployment, where it is known."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the model was asked with, as far as preparing got."""

    messages: tuple[Json, ...] = ()
    """The request's own messages, redacted."""
    prompt_version: int | None = None
    recalled: tuple[str, ...] = ()
    spoke: bool = False
    """Whether a model got the prompt, and did not fail."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When, in milliseconds since the epoch."""

    finished_ms: int
    first_token_ms: int | None = None


def reply_of(assembly: Assembly) -> Reply:
    """The text that stands, put together, without log probabilities: no turn holds them, and they are most of it."""
    reply = Reply()
    for said in assembly.standing:
        chunk = codec.loads(bytes(said.chunk))
        for choice in objects_in(chunk.get("choices")):
            choice.pop("logprobs", None)
        reply.add(chunk)
    return reply


def usage_of(admitted: ChatAdmitted, assembly: Assembly, spoke: bool) -> Usage:
    """What the request is billed for."""
    if assembly.end and assembly.end.usage:
        return assembly.end.usage
    # An end without a usage is no generation's own: what its model was sent is not known.
    return usage_without_count(admitted.request.body, own_count(assembly), spoke or bool(assembly.standing))


def usage_without_count(body: Mapping[str, object], tokens: int, spoke: bool) -> Usage:
    """Klatch's own count of a reply, and of the body that its model was sent."""
    if not spoke and not tokens:
        return Usage()
    prompt = _PROMPT.of(cast("Mapping[str, JsonValue]", body)).prompt
    return Usage(prompt_tokens=prompt, completion_tokens=tokens, estimated=True)


def at_least(usage: Usage, tokens: int) -> Usage:
    """The model server's count of a part of what was said, where klatch counts so many tokens of all of it."""
    if tokens <= usage.completion_tokens:
        return usage
    return usage.model_copy(update={"completion_tokens": tokens, "estimated": True})


def own_count(assembly: Assembly, written: int = 0) -> int:
    """The tokens of the text that stands (`counting.py`).

    Of `written` deltas those that have not been read back yet are a token each.
    """
    unread = max(0, written - len(assembly.standing))
    return tokens_in(bytes(said.chunk) for said in assembly.standing) + unread


def settlement(
    admitted: ChatAdmitted, assembly: Assembly, asked: Asked, timing: Timing, prices: PriceOf
) -> UsageSettled:
    """The record that settles the request's reservation."""
    request = admitted.request
    first = timing.first_token_ms
    usage, model = usage_of(admitted, assembly, asked.spoke), _model(admitted, assembly)
    deployment = assembly.end.deployment if assembly.end else ""
    return UsageSettled(
        request=request.request,
        tenant=request.tenant,
        person=request.person,
        use_case=request.use_case,
        model=model,
        deployment=deployment,
        status=_status(assembly),
        usage=usage,
        cost_micros=cost_micros(usage, prices(model, deployment)),
        first_token_ms=None if first is None else max(0, first - admitted.requested_ms),
        total_ms=max(0, timing.finished_ms - admitted.requested_ms),
    )


def cost_micros(usage: Usage, prices: Prices | None) -> int:
    """What tokens cost, in millionths of a US dollar, rounded up: that is dollars a million tokens, times tokens."""
    if prices is None:
        return 0
    cached = prices.prompt if prices.cached is None else prices.cached
    fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
    return ceil(fresh * prices.prompt + usage.cached_tokens * cached + usage.completion_tokens * prices.completion)


def has_turn(assembly: Assembly) -> bool:
    """Whether there is anything to remember: text that stands, and was not taken back with its turn."""
    return bool(assembly.standing) and not assembly.state.undone


def turn(
    admitted: ChatAdmitted, assembly: Assembly, asked: Asked, timing: Timing, previous: int | None
) -> TurnFinished | None:
    """The finished turn, if there is one to remember."""
    if not has_turn(assembly):
        return None
    request, reply = admitted.request, reply_of(assembly)
    prompt = request.prompt and request.prompt.model_copy(update={"version": asked.prompt_version})
    return TurnFinished(
        request=request.request,
        tenant=request.tenant,
        conversation=request.conversation,
        person=request.person,
        use_case=request.use_case,
        status=_status(assembly),
        messages=asked.messages,
        reply=tuple(reply.messages()),
        model=_model(admitted, assembly),
        prompt=prompt,
        usage=usage_of(admitted, assembly, asked.spoke),
        arms=request.context.experiments,
        recalled=asked.recalled,
        store=request.memory.store,
        attempt=assembly.state.attempt,
        started_ms=admitted.requested_ms,
        finished_ms=timing.finished_ms,
        previous=previous,
    )


async def turn_aside(
    admitted: ChatAdmitted, assembly: Assembly, asked: Asked, timing: Timing, previous: int | None
) -> TurnFinished | None:
    """`turn`, without holding up the event loop; nothing of a stream that has ended changes meanwhile."""
    return await aside(len(assembly.standing), lambda: turn(admitted, assembly, asked, timing, previous))


def _status(assembly: Assembly) -> Status:
    return assembly.state.status or "failed"


def _model(admitted: ChatAdmitted, assembly: Assembly) -> str:
    if assembly.end and assembly.end.model:
        return assembly.end.model
    return str(admitted.request.body.get("model") or "")
