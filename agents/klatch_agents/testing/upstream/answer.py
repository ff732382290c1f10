"""What the server writes for a request: whole completions, and events with the time each is due.

Pure: a body, a script and a call id give the bytes. Shapes follow OpenAI's API reference of Chat
Completions and its streaming chunks, Azure's "content streaming" page, and vLLM's reasoning field.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple, cast

import msgspec

from klatch_agents.testing.upstream.script import Script

Json = dict[str, object]

_NEWLINES = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}
_WORDS = ["The", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "Zoë", "thinks", "."]
_ARGUMENTS = '{"city": "Zürich", "note": "a \\"quoted\\" one \U0001f600", "days": 3}'


class Frame(NamedTuple):
    """Bytes of a body, due so many seconds after the status line; infinitely many: once they are released."""

    due: float
    data: bytes


class Answer:
    """The answer to one request for a chat completion."""

    def __init__(self, call_id: str, model: str, body: Json, script: Script) -> None:
        self._script = script
        self._body = body
        self._call_id = call_id
        self._head: Json = {"id": f"chatcmpl-{call_id}", "created": 1_790_000_000, "model": model}
        self._n = max(1, _int(body.get("n"), 1))
        self._deltas = [self._choice_deltas(index) for index in range(self._n)]
        self._prompt = prompt_tokens(body)
        options = body.get("stream_options")
        given = cast("Json", options) if isinstance(options, dict) else {}
        self._usage_asked = bool(given.get("include_usage"))
        self._running_usage_asked = bool(given.get("continuous_usage_stats"))

    @property
    def streamed(self) -> bool:
        return self._body.get("stream") is True and not self._script.ignore_stream

    def seconds(self) -> float:
        """How long the whole answer takes to make after the status line."""
        steps = max(len(deltas) for deltas in self._deltas)
        return self._script.first_delay + (steps / self._script.rate if self._script.rate else 0.0)

    def whole(self) -> bytes:
        """The completion as one JSON document, for a request without `stream`."""
        choices = [
            {
                "index": index,
                "message": _merge(deltas),
                "logprobs": None,
                "finish_reason": self._finish(index),
            }
            for index, deltas in enumerate(self._deltas)
        ]
        made = sum(map(len, self._deltas))
        return _encode({**self._head, "object": "chat.completion", "choices": choices} | {"usage": self._usage(made)})

    def frames(self) -> Iterator[Frame]:
        """The events of the stream in order. What follows the last token goes out with it."""
        script = self._script
        if script.keep_alive:
            for beat in itertools.count(1):
                if beat * script.keep_alive >= script.first_delay:
                    break
                yield Frame(beat * script.keep_alive, self._line(b": keep-alive") + self._line(b""))
        opening = b"".join(map(self._event, self._opening()))
        due, spoken = script.first_delay, 0
        limit = self._tokens_before_fault()
        yield Frame(due, opening)
        for step, index in itertools.product(range(max(map(len, self._deltas), default=0)), range(self._n)):
            if step >= len(self._deltas[index]):
                continue
            if spoken == limit:
                break
            spoken += 1
            due = script.first_delay + (step / script.rate if script.rate else 0.0)
            yield Frame(due, self._event(self._chunk(index, self._deltas[index][step], step + 1)))
        yield Frame(math.inf if script.held else due, b"".join(self._closing(spoken)))
        if script.end_delay:
            yield Frame(due + script.end_delay, b"")

    # -- the parts of a stream ------------------------------------------------------------------

    def _opening(self) -> Iterator[Json]:
        if self._script.azure:
            safe = {"hate": {"filtered": False, "severity": "safe"}}
            filtered = [{"prompt_index": 0, "content_filter_results": safe}]
            empty: Json = {"id": "", "object": "", "created": 0, "model": "", "choices": []}
            yield {**empty, "prompt_filter_results": filtered}
        silent = self._script.refusal or self._script.tool_calls
        for index in range(self._n):
            yield self._chunk(index, {"role": "assistant", "content": None if silent else ""}, 0)

    def _closing(self, spoken: int) -> Iterator[bytes]:
        fault = self._script.fault
        if fault in ("drop", "reset", "stall", "no-finish"):
            return
        if fault in ("error-event", "named-error-event"):
            yield self._error_event(named=fault == "named-error-event")
        elif fault == "garbage":
            yield self._event(b'{"id": "chatcmpl-')
        elif fault != "done-without-finish":
            yield from map(self._event, self._finishing(spoken))
        if fault == "bare-done":
            yield b"data: [DONE]"
        elif fault in ("", "named-error-event", "done-without-finish"):
            yield self._event(b"[DONE]")

    def _finishing(self, spoken: int) -> Iterator[Json]:
        if self._script.azure:
            offsets = {"check_offset": 0, "start_offset": 0, "end_offset": 40}
            note: Json = {"index": 0, "finish_reason": None, "content_filter_offsets": offsets}
            yield {"id": "", "object": "", "created": 0, "model": "", "choices": [note]}
        for index in range(self._n):
            yield self._chunk(index, {}, len(self._deltas[index]), finish=self._finish(index))
        if self._usage_asked:
            yield self._whole_chunk([], self._usage(spoken))

    def _chunk(self, index: int, delta: Json, said: int, finish: str | None = None) -> Json:
        """A chunk of a choice that has said so many tokens; as in vLLM a running count is the choice's alone."""
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if self._body.get("logprobs") and isinstance(token := delta.get("content"), str) and token:
            choice["logprobs"] = {"content": [_logprob(token)], "refusal": None}
        running = self._script.running_usage or self._running_usage_asked or (self._script.early_usage and not said)
        return self._whole_chunk([choice], self._usage(said) if running and self._usage_asked else None)

    def _whole_chunk(self, choices: list[Json], usage: Json | None) -> Json:
        chunk: Json = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._usage_asked:
            chunk["usage"] = usage
        return chunk

    def _error_event(self, *, named: bool) -> bytes:
        error = {"message": "the engine died", "type": "server_error", "param": None, "code": 500}
        return (self._line(b"event: error") if named else b"") + self._event({"error": error})

    def _event(self, data: Json | bytes) -> bytes:
        encoded = data if isinstance(data, bytes) else _encode(data)
        comment = self._line(b": PROCESSING") if self._script.comments else b""
        return comment + self._line(b"data: " + encoded) + self._line(b"")

    def _line(self, line: bytes) -> bytes:
        return line + _NEWLINES[self._script.newline]

    # -- what is said ---------------------------------------------------------------------------

    def _choice_deltas(self, index: int) -> list[Json]:
        script = self._script
        thoughts: list[Json] = [{"reasoning_content": f"hm{i} "} for i in range(script.reasoning)]
        if script.tool_calls:
            return thoughts + list(_tool_calls(script.tool_calls, self._call_id))
        member = "refusal" if script.refusal else "content"
        limit = _int(self._body.get("max_completion_tokens") or self._body.get("max_tokens"), 2**31)
        tokens = self._tokens(index)[:limit]
        return thoughts + [{member: token} for token in tokens]

    def _tokens(self, index: int) -> list[str]:
        """What is said, less what a final assistant message has said already."""
        tokens = self._whole_answer(index)
        return tokens[said_already(tokens, _partial(self._body)) :]

    def _whole_answer(self, index: int) -> list[str]:
        script = self._script
        if script.big:
            return ["x" * script.big]
        text = script.text or self._echo()
        if text or script.reply.startswith("echo"):
            tokens = [text[i : i + 4] for i in range(0, len(text), 4)]
        elif script.reply == "unique":
            name = self._call_id if index == 0 else f"{self._call_id}.{index}"
            tokens = [f"<<{name}:{i}>>" for i in range(script.tokens)]
        else:
            tokens = [f"{word} " for word in itertools.islice(itertools.cycle(_WORDS), script.tokens)]
        return [*tokens, "\ud83d", "\ude00"] if script.surrogates else tokens

    def _echo(self) -> str:
        messages = cast("list[Json]", self._body.get("messages", []))
        if self._script.reply == "echo-messages":
            return json.dumps(messages, ensure_ascii=False)
        roles = {"echo-user": ("user",), "echo-system": ("system", "developer")}
        said = [m.get("content") for m in messages if m.get("role") in roles.get(self._script.reply, ())]
        if not said:
            return ""
        return said[-1] if isinstance(said[-1], str) else json.dumps(said[-1], ensure_ascii=False)

    def _tokens_before_fault(self) -> int:
        made = sum(map(len, self._deltas))
        if self._script.fault in ("", "no-done", "bare-done") or "after" in self._script.fault:
            return made
        return self._script.fault_after if self._script.fault_after >= 0 else made // 2

    def _finish(self, index: int) -> str:
        reasons = self._script.finish.split(",") if self._script.finish else []
        if index < len(reasons):
            return reasons[index]
        if self._script.tool_calls:
            return "tool_calls"
        limit = _int(self._body.get("max_completion_tokens") or self._body.get("max_tokens"), 2**31)
        return "length" if len(self._tokens(index)) > limit else "stop"

    def _usage(self, made: int) -> Json:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": made,
            "total_tokens": self._prompt + made,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": self._script.reasoning * self._n},
        }


def prompt_tokens(body: Json) -> int:
    """How many tokens this server counts in a prompt: words of its JSON."""
    return len(json.dumps(body.get("messages", "")).split())


_UNIQUE = re.compile(r"<<c\d+(?:\.\d+)?:(\d+)>>\Z")


def said_already(tokens: list[str], partial: str) -> int:
    """How many of an answer's tokens stand in the partial answer that it is to continue.

    A unique token, `<<c17:5>>`, is known by its number, since it was another call that wrote it: this
    call goes on with its own `<<c18:6>>`. Any other text is known by its letters; what is not the
    beginning of this answer is continued by the whole of it.
    """
    if last := _UNIQUE.search(partial):
        return int(last[1]) + 1
    at = 0
    for count, token in enumerate(tokens, 1):
        if not partial.startswith(token, at):
            return 0
        at += len(token)
        if at == len(partial):
            return count
    return 0


def _partial(body: Json) -> str:
    """The final assistant message: a partial answer (llama.cpp's prefill, vLLM's `continue_final_message`)."""
    messages = body.get("messages")
    last: object = cast("list[object]", messages)[-1] if isinstance(messages, list) and messages else None
    said = cast("Json", last) if isinstance(last, dict) else {}
    content = said.get("content")
    return content if said.get("role") == "assistant" and isinstance(content, str) else ""


def _tool_calls(count: int, call_id: str) -> Iterator[Json]:
    """Names first, then the arguments in pieces of seven characters, in turns over the calls."""
    for index in range(count):
        function = {"name": f"skill_{index}", "arguments": ""}
        opened = {"index": index, "id": f"call_{call_id}_{index}", "type": "function"}
        yield {"tool_calls": [{**opened, "function": function}]}
    for at in range(0, len(_ARGUMENTS), 7):
        for index in range(count):
            fragment = {"arguments": _ARGUMENTS[at : at + 7]}
            yield {"tool_calls": [{"index": index, "function": fragment}]}


def _merge(deltas: list[Json]) -> Json:
    """The message that a choice's deltas add up to."""
    message: Json = {"role": "assistant", "content": None, "refusal": None}
    calls: list[Json] = []
    for delta in deltas:
        for member, value in delta.items():
            if isinstance(value, str):
                message[member] = cast("str", message.get(member) or "") + value
        for part in cast("list[Json]", delta.get("tool_calls", [])):
            if "id" in part:
                calls.append({k: v for k, v in part.items() if k != "index"})
            else:
                function = cast("dict[str, str]", calls[cast("int", part["index"])]["function"])
                function["arguments"] += cast("dict[str, str]", part["function"])["arguments"]
    return message | ({"tool_calls": calls} if calls else {})


def _logprob(token: str) -> Json:
    one: Json = {"token": token, "logprob": -0.25, "bytes": list(token.encode("utf-8", "replace"))}
    return {**one, "top_logprobs": [one]}


def _int(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _encode(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # lone surrogates travel as escapes
        return json.dumps(value, separators=(",", ":")).encode()
