"""From the chunks of a streamed reply to the whole reply, as the Chat Completions API would have sent it.

State is kept per choice and per tool call *index* (OpenAI's streaming reference); unknown fields of a delta survive:
strings are concatenated, lists extended, a string beside a list (of content parts) becomes a text part, and anything
else is taken from the last chunk that had it. So is what stands beside a delta, but that objects (Azure's annotations,
each of some categories) are put together member by member, as klatch's own is. What says nothing (null, an empty text,
list or object) never takes the place of what was said. It is total: any JSON a server sends is kept or left out, and
raises nothing.
"""

from collections.abc import Mapping
from typing import Any, cast

from pydantic import JsonValue

from klatch_schemas.events import Usage

Json = dict[str, JsonValue]

# A delta repeats these whole; concatenating them would double them.
_REPEATED = frozenset({"role", "id", "type", "index"})
_NOTHING: tuple[JsonValue, ...] = (None, "", [], {})
"""What servers write where they have nothing to say: SGLang `"tool_calls": null`, Qwen `"id": ""`."""
_DEEPEST = 100
"""Objects within objects that are put together; what is deeper is taken from the last chunk."""
_MOST = 2**53
"""More is no count of tokens."""
_OF_CHUNKS = frozenset({"id", "model", "object", "choices", "obfuscation"})
"""Beside `choices`: kept elsewhere, or (padding against eavesdroppers) of a chunk alone."""

_OURS = "klatch"
"""Which budget stopped a reply, which deployment gave it."""


class Reply:
    """A reply being put together, chunk by chunk."""

    def __init__(self) -> None:
        self.id = ""
        self.model = ""
        self._top: Json = {}
        self._ours: Json = {}
        self._choices: dict[int, Json] = {}
        self._usage: Json | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take one `chat.completion.chunk`; events without choices only add their top-level fields."""
        # An Azure prompt-filter event has an empty id and model: the first that says something counts.
        self.id = self.id or str(chunk.get("id") or "")
        self.model = self.model or str(chunk.get("model") or "")
        for name, value in chunk.items():
            if name == "usage":
                self._usage = cast("Json", value) if value and isinstance(value, dict) else self._usage
            elif name == _OURS and isinstance(value, dict):
                self._ours.update(cast("Json", value))
            elif name not in _OF_CHUNKS and value not in (None, "") and (value or name != "created"):
                self._top[name] = self._top.get(name, value) if value in _NOTHING else value
        for choice in objects_in(chunk.get("choices")):
            self._choice(choice)

    def _choice(self, said: Json) -> None:
        choice = self._choices.setdefault(_index(said), {"message": {}, "finish_reason": None})
        message = choice["message"]
        assert isinstance(message, dict)  # noqa: S101 - made two lines above
        _merge(message, _object(said.get("delta")))
        if said.get("finish_reason"):
            choice["finish_reason"] = said["finish_reason"]
        for name, value in said.items():
            if name == "logprobs":
                _merge(choice, {name: value})
            elif name == "message":
                # What a server repeats whole beside its deltas adds only what they have not said.
                _merge(message, {own: one for own, one in _object(value).items() if message.get(own) in _NOTHING})
            elif name not in {"index", "delta", "finish_reason"}:
                _take(choice, name, value)

    @property
    def finish_reasons(self) -> dict[int, str | None]:
        """The finish reason of each choice that was heard of; None while it goes on."""
        return {index: _text(choice["finish_reason"]) for index, choice in self._choices.items()}

    @property
    def usage(self) -> Usage | None:
        """The last usage that a chunk carried: cumulative usage is never summed."""
        return usage_of(self._usage) if self._usage else None

    def messages(self) -> list[Json]:
        """The assistant's message of each choice, by index."""
        return [_message(self._choices[index]) for index in sorted(self._choices)]

    def completion(self) -> Json:
        """The whole reply as a `chat.completion` object."""
        choices: list[JsonValue] = [
            {**self._choices[index], "index": index, "message": _message(self._choices[index])}
            for index in sorted(self._choices)
        ]
        whole: Json = {"id": self.id, "object": "chat.completion", "model": self.model, **self._top}
        if self._ours:
            whole[_OURS] = self._ours
        whole["choices"] = choices
        whole["usage"] = self._usage
        return whole


def usage_of(said: Mapping[str, Any]) -> Usage:
    """Read a usage object; what is missing, null or no count is 0."""
    prompt, completion = _object(said.get("prompt_tokens_details")), _object(said.get("completion_tokens_details"))
    return Usage(
        prompt_tokens=_count(said.get("prompt_tokens")),
        completion_tokens=_count(said.get("completion_tokens")),
        cached_tokens=_count(prompt.get("cached_tokens")),
        reasoning_tokens=_count(completion.get("reasoning_tokens")),
    )


def objects_in(listed: object) -> list[Json]:
    """The objects of a list; what is no list has none, and what in it is no object is left out."""
    items = cast("list[object]", listed) if isinstance(listed, list) else []
    return [cast("Json", item) for item in items if isinstance(item, dict)]


def _text(value: JsonValue) -> str | None:
    return value if isinstance(value, str) else None


def _object(value: object) -> Json:
    return cast("Json", value) if isinstance(value, dict) else {}


def _index(choice: Json) -> int:
    index = choice.get("index")
    return int(index) if isinstance(index, int | float) and index == index // 1 else 0


def _count(value: JsonValue) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < _MOST else 0


def _message(choice: Json) -> Json:
    message = choice["message"]
    assert isinstance(message, dict)  # noqa: S101 - made in `_choice`
    whole: Json = {"role": "assistant", "content": None, **message}
    calls = whole.get("tool_calls")
    if isinstance(calls, list):
        whole["tool_calls"] = [_without_index(call) for call in calls]
    return whole


def _without_index(call: JsonValue) -> JsonValue:
    return {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else call


def _merge(into: Json, said: Mapping[str, JsonValue], depth: int = 0) -> None:
    for name, value in said.items():
        old = into.get(name)
        if name == "tool_calls":
            _merge_calls(into, objects_in(value))
        elif value in _NOTHING and old is not None:
            continue
        elif old in _NOTHING or name in _REPEATED:
            into[name] = _own(value)
        elif isinstance(old, str | list) and isinstance(value, str | list):
            into[name] = _joined(old, value)
        elif isinstance(old, dict) and isinstance(value, dict) and depth < _DEEPEST:
            _merge(old, value, depth + 1)
        else:
            into[name] = _own(value)


def _take(into: Json, name: str, value: JsonValue) -> None:
    """The last that said something; of objects each member."""
    old = into.get(name)
    if isinstance(old, dict) and isinstance(value, dict):
        old.update({own: one for own, one in value.items() if one not in _NOTHING or old.get(own) is None})
    elif value not in _NOTHING or old is None:
        into[name] = {**value} if isinstance(value, dict) else value


def _joined(old: str | list[JsonValue], value: str | list[JsonValue]) -> JsonValue:
    """Both, in order; `old` is extended in place where it is a list."""
    if isinstance(old, str):
        return old + value if isinstance(value, str) else [_text_part(old), *value]
    if isinstance(value, list):
        old.extend(value)
        return old
    last = old[-1]
    # Deltas of one text are one part; a part that says more than its text is the server's own.
    if isinstance(last, dict) and last.keys() == {"type", "text"} and isinstance(text := last["text"], str):
        old[-1] = {**last, "text": text + value}
    else:
        old.append(_text_part(value))
    return old


def _text_part(text: str) -> JsonValue:
    return {"type": "text", "text": text}


def _own(value: JsonValue, depth: int = 0) -> JsonValue:
    """A copy as far down as `_merge` writes: to copy what is merged at every chunk would take time squared."""
    if isinstance(value, list):
        return [*value]
    if isinstance(value, dict) and depth <= _DEEPEST:
        return {name: _own(member, depth + 1) for name, member in value.items()}
    return value


def _merge_calls(message: Json, fragments: list[Json]) -> None:
    # Fragments belong together by `index`, never by position; a server that leaves it out, or numbers whole
    # calls all 0, tells them apart by id.
    if not fragments:
        return
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        calls = message["tool_calls"] = list[JsonValue]()
    for fragment in fragments:
        call = _call_for(calls, fragment)
        if call is None:
            call = {"index": fragment.get("index", len(calls))}
            calls.append(call)
        _merge(call, fragment)


def _call_for(calls: list[JsonValue], fragment: Json) -> Json | None:
    index = fragment.get("index")
    if index is None:
        last = calls[-1] if calls else None
        return last if isinstance(last, dict) and _may_be_one(last, fragment) else None
    for call in reversed(calls):
        if isinstance(call, dict) and call.get("index") == index:
            return call if _may_be_one(call, fragment) else None
    return None


def _may_be_one(call: Json, fragment: Json) -> bool:
    """Whether the ids do not tell a call and a fragment apart; most fragments have none, or an empty one."""
    name, theirs = fragment.get("id"), call.get("id")
    return not name or not theirs or name == theirs
