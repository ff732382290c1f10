"""How many tokens a request may cost, estimated before any model has seen it.

An estimate, not a promise: admission counts it until the real usage is known. It is meant to be a little too high
for text in any script and cheap to compute (one walk over the body), and it is total: a body may hold anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from pydantic import JsonValue

_MOST_TOKENS = 1_000_000_000
_READ = (
    "messages",
    "prediction",
    "tools",
    "functions",
    "response_format",
    # vLLM's.
    "documents",
    "chat_template",
    "chat_template_kwargs",
)
"""What a model reads of a body."""
_LIMITS = ("max_completion_tokens", "max_tokens")
_OWN_LIMITS = ("n_predict",)
"""Which single servers put before those, and others do not know."""
_LONGEST_NUMBER = 40
_NUMBER = "12345678"
"""Stands for any number: writing out a huge one may raise."""
_AROUND = 2
"""Tokens that mark the beginning and the end of a text."""
_MEDIA = frozenset({"image_url", "input_audio", "audio", "video_url", "audio_url", "file"})


class Estimated(NamedTuple):
    """What a request may cost, in tokens; never more than 10**9 together."""

    prompt: int
    completion: int
    """Of all its choices."""
    bounded: bool
    """Whether the request says how long its reply may be, so that the model server keeps to it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """`prompt + n x completion`, where

    - prompt = bytes of all text in UTF-8 / `bytes_per_token` + `per_message` for each message + `per_media` for each
      image, recording or file + `overhead`;
    - completion = the largest of `max_completion_tokens`, `max_tokens` and llama.cpp's `n_predict`, else `completion`.

    The largest, because a server heeds the name that it knows and passes over the other. One that says no number
    (-1 is no limit to some) bounds nothing, and then at least `completion` is counted.

    Byte-pair tokens of the usual models average 4 bytes in English prose and code, 2.5 to 3.5 in other scripts.
    """

    bytes_per_token: int = 3
    per_message: int = 8
    per_media: int = 1_200
    overhead: int = 16
    completion: int = 1_024

    def tokens(self, body: Mapping[str, JsonValue]) -> int:
        """What a request with this body may cost in all."""
        prompt, completion, _ = self.of(body)
        return prompt + completion

    def of(self, body: Mapping[str, JsonValue]) -> Estimated:
        """What a request with this body may cost."""
        known = _limits(body, _LIMITS)
        limits = known + _limits(body, _OWN_LIMITS)
        bounded = bool(known) and None not in limits
        least = 0 if bounded else self.completion
        prompt = min(self._prompt(body), _MOST_TOKENS)
        completion = _choices(body) * max(least, *(limit or 0 for limit in limits), 0)
        return Estimated(prompt, min(completion, _MOST_TOKENS - prompt), bounded)

    def of_input(self, said: object) -> int:
        """What embedding an `input` may cost: texts as in prompts, and two more tokens each; a number is a token."""
        text = tokens = 0
        stack = [said]
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                text += _utf8_length(value)
                tokens += _AROUND
            elif isinstance(value, list):
                stack.extend(cast("list[object]", value))
            else:
                tokens += 1
        return min(tokens - (-text // self.bytes_per_token), _MOST_TOKENS)

    def _prompt(self, body: Mapping[str, JsonValue]) -> int:
        text, media = _text_and_media(body)
        messages = body.get("messages")
        count = len(messages) if isinstance(messages, list) else 0
        return self.overhead + count * self.per_message + media * self.per_media - (-text // self.bytes_per_token)


def _text_and_media(body: Mapping[str, JsonValue]) -> tuple[int, int]:
    """Bytes of text in what a model reads, object keys among them (they count in tools), and how many media."""
    text = media = 0
    # An explicit stack: a body nested deeper than Python's recursion limit must not stop admission.
    stack: list[JsonValue] = [body[name] for name in _READ if name in body]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            text += _utf8_length(value)
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            for name, member in value.items():
                if name in _MEDIA:
                    media += 1
                else:
                    text += _utf8_length(name)
                    stack.append(member)
        elif value is not None:
            text += len(_NUMBER)
    return text, media


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _limits(body: Mapping[str, JsonValue], names: Sequence[str]) -> list[int | None]:
    """What a request says of how long a reply may be, under these names; None for what is no limit."""
    return [_whole(said) for name in names if (said := body.get(name)) is not None]


def _choices(body: Mapping[str, JsonValue]) -> int:
    return max(_whole(body.get("n")) or 1, 1)


def _whole(value: JsonValue) -> int | None:
    """A whole number, also in what lenient servers read as one: `5.0`, `"5"`."""
    if isinstance(value, str):
        value = _number(value)
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return min(value, _MOST_TOKENS) if type(value) is int and value >= 0 else None


def _number(text: str) -> float | None:
    try:
        return float(text) if len(text) <= _LONGEST_NUMBER else None
    except ValueError:
        return None
