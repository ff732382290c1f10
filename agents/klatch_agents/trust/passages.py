"""Walks a Chat Completions body: yields every text that a model would read, and puts replaced text back.

Read are all strings inside `messages` and `prediction`, whatever their key, so that a field we do not know is
judged too, inside what vLLM's templates put into a prompt (`documents`, `chat_template`, `chat_template_kwargs`), and
the descriptions inside `tools`, `functions` and `response_format`. Left out are names of structure (roles, types,
ids), media (images, audio, files), and the keys of objects, which cannot be replaced in place.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from klatch_agents.trust.judge import Passage, Path

_SPOKEN = ("messages", "prediction", "documents", "chat_template", "chat_template_kwargs")
_DESCRIBED = ("tools", "functions", "response_format")
_STRUCTURE = frozenset({"role", "type", "id", "tool_call_id"})
_MEDIA = frozenset({"image_url", "input_audio", "audio", "video_url", "audio_url", "file"})
# An identifier or card number is long; a shorter number in tool arguments is not worth a passage of its own.
_LEAST_DIGITS = 8


def passages(body: Mapping[str, object]) -> Iterator[Passage]:
    """Every passage of `body`, in the order of the body. Never raises, whatever the body holds."""
    for field in _SPOKEN:
        if field in body:
            yield from _texts((field,), body[field])
    for field in _DESCRIBED:
        if field in body:
            yield from (p for p in _texts((field,), body[field]) if p.path[-1] == "description")


def replace_at(body: Mapping[str, object], path: Path, change: Callable[[str], str]) -> None:
    """Applies `change` to the text at `path`, in place; raises `LookupError` where `path` leads nowhere."""
    _replace(body, path, change)


def is_json_text(path: Path) -> bool:
    """True for a path whose text is JSON that goes on inside the string: the arguments of a tool call."""
    return path[-2:] in {("function", "arguments"), ("function_call", "arguments")}


def _texts(path: Path, value: object) -> Iterator[Passage]:
    # An explicit stack: a body nested deeper than Python's recursion limit must not stop a worker.
    stack: list[tuple[Path, object]] = [(path, value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            inner = parse_container(value) if is_json_text(path) else None
            if inner is None:
                yield Passage(path, value)
            else:
                stack.append((path, inner))
        else:
            if is_long_number(value):
                yield Passage(path, str(value))
            stack.extend(reversed(_children(path, value)))


def _children(path: Path, value: object) -> list[tuple[Path, object]]:
    if isinstance(value, Mapping):
        members = cast("Mapping[str, object]", value)
        # Inside tool arguments every key is the model's own: nothing there is structure or media.
        everything = "arguments" in path
        return [
            ((*path, key), child)
            for key, child in members.items()
            if everything or not (key in _MEDIA or (key in _STRUCTURE and isinstance(child, str)))
        ]
    if isinstance(value, list):
        return [((*path, index), child) for index, child in enumerate(cast("list[object]", value))]
    return []


def is_long_number(value: object) -> bool:
    """True for a number that may be a card, account or telephone number written without quotes."""
    return type(value) is int and abs(value) >= 10**_LEAST_DIGITS


def parse_container(text: str) -> object:
    """The object or list that `text` is the JSON of, or None."""
    if text.lstrip()[:1] not in {"{", "["}:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _replace(holder: object, path: Path, change: Callable[[str], str]) -> None:
    for depth, step in enumerate(path):
        value = _member(holder, step)
        rest = path[depth + 1 :]
        if isinstance(value, str) and rest:
            inner = json.loads(value)
            _replace(inner, rest, change)
            _set_member(holder, step, _json(inner))
            return
        if not rest:
            _set_member(holder, step, change(str(value)))
            return
        holder = value


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate that a policy lets pass was an escape in the original, and has to stay one.
    return text if _has_utf8(text) else json.dumps(value, separators=(",", ":"))


def _has_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _member(holder: object, step: str | int) -> object:
    if isinstance(holder, dict) and isinstance(step, str):
        return cast("dict[str, object]", holder)[step]
    if isinstance(holder, list) and isinstance(step, int):
        return cast("list[object]", holder)[step]
    raise LookupError(f"the body has no member {step!r} here: the finding is of another body")


def _set_member(holder: object, step: str | int, value: object) -> None:
    cast("dict[str | int, object]", holder)[step] = value
