"""How servers are asked to go on with an answer that broke off.

OpenAI's API has no word for it. vLLM, SGLang and Hugging Face's servers take a final assistant
message with `continue_final_message` (vLLM's OpenAI-compatible server, "Extra parameters");
llama.cpp's server, Anthropic and Mistral take a final assistant message for the beginning of the
answer ("prefill"). All of them answer with what follows, not with the whole. A chat template may
strip blanks at the end of that message: then a space may be doubled where the answer goes on.
"""

from collections.abc import Mapping
from typing import Literal, assert_never, cast

Continues = Literal["none", "vllm", "prefill"]
"""How a server goes on from a partial answer; `none`: it does not, or nobody knows."""


def continuing_body(body: Mapping[str, object], prefix: str, how: Continues) -> dict[str, object]:
    """The request that has the answer go on behind `prefix`. Raises ValueError for `none`."""
    match how:
        case "vllm":
            joined = body.get("continue_final_message") is True
            asked = {"continue_final_message": True, "add_generation_prompt": False}
            return {**body, "messages": _with_prefix(body, prefix, join=joined), **asked}
        case "prefill":
            return {**body, "messages": _with_prefix(body, prefix, join=True)}
        case "none":
            raise ValueError("this server is not known to go on from a partial answer")
    assert_never(how)


def _with_prefix(body: Mapping[str, object], prefix: str, *, join: bool) -> list[object]:
    """The messages and the answer's beginning. With `join`, a beginning that the caller gave already
    is one message with it: servers go on from one."""
    given = body.get("messages")
    messages = list(cast("list[object]", given)) if isinstance(given, list) else []
    if join and messages and (begun := _begun_by_caller(messages[-1])) is not None:
        return [*messages[:-1], {**cast("dict[str, object]", messages[-1]), "content": begun + prefix}]
    return [*messages, {"role": "assistant", "content": prefix}]


def _begun_by_caller(message: object) -> str | None:
    if not isinstance(message, dict):
        return None
    said = cast("dict[str, object]", message)
    content = said.get("content")
    return content if said.get("role") == "assistant" and isinstance(content, str) else None
