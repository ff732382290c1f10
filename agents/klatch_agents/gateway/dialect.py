"""What differs from one kind of model server to the next: where it is asked, how a key is said, what a body needs.

Pure, and no more than translation: one HTTP client (`http.py`) and one adapter (`openai_compatible.py`) serve all
kinds. What a deployment is used for, and when, is `routing.py`.

Azure: https://learn.microsoft.com/azure/ai-services/openai/reference. vLLM: https://docs.vllm.ai, "OpenAI-Compatible
Server", extra parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import quote

Kind = Literal["openai", "azure", "vllm", "openai-compatible"]

Options = Literal["all", "usage", "none"]
"""Which `stream_options` are sent: the caller's and klatch's, the one that tells the usage, or none."""

AZURE_VERSION = "2024-10-21"
"""The API version asked of Azure unless a deployment names another: the latest that is generally available."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server of one kind is spoken to."""

    kind: Kind = "openai-compatible"
    api_version: str | None = None
    auth: Literal["key", "token"] = "key"
    priority: bool = False
    """vLLM: pass a call's priority on, in place of what its body asks for."""

    def path(self, what: Literal["chat/completions", "embeddings", "models"], model: str) -> str:
        """What follows the base URL."""
        if self.kind != "azure":
            return f"/{what}"
        where = what if what == "models" else f"deployments/{quote(model, safe='')}/{what}"
        return f"/openai/{where}?api-version={quote(self.api_version or AZURE_VERSION, safe='')}"

    def key_headers(self, key: str) -> dict[str, str]:
        """The header that says the key."""
        if not key:
            return {}
        if self.kind == "azure" and self.auth == "key":
            return {"api-key": key}
        return {"Authorization": f"Bearer {key}"}

    def streaming(self, body: Mapping[str, object], model: str, priority: int, options: Options) -> dict[str, object]:
        """The body of a streamed chat completion."""
        sent = {**body, "stream": True}
        if model:
            sent["model"] = model
        asked = sent.pop("stream_options", None)
        if options != "none":
            given = cast("dict[str, object]", asked) if isinstance(asked, dict) and options == "all" else {}
            sent["stream_options"] = {**given, "include_usage": True}
        match self.kind:
            case "vllm":
                return self._vllm(sent, priority, running_usage=options == "all")
            case "openai":
                return _newer_limit(sent)
            case "azure" | "openai-compatible":
                return sent

    def _vllm(self, sent: dict[str, object], priority: int, *, running_usage: bool) -> dict[str, object]:
        options = sent.get("stream_options")
        if running_usage and isinstance(options, dict):
            # A running total on every chunk: what a stream has cost is known wherever it is cut.
            sent["stream_options"] = {**cast("dict[str, object]", options), "continuous_usage_stats": True}
        if self.priority:
            sent["priority"] = priority
        return sent


def _newer_limit(sent: dict[str, object]) -> dict[str, object]:
    """OpenAI's reasoning models refuse `max_tokens`; all its models take the newer name."""
    if "max_tokens" in sent and "max_completion_tokens" not in sent:
        sent["max_completion_tokens"] = sent.pop("max_tokens")
    return sent
