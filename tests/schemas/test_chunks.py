"""How chunks become a whole reply, whatever their deltas look like (traps 17 and 19 of docs/fidelity.md)."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.schemas.conftest import json_values

from klatch_schemas import codec
from klatch_schemas.chunks import Reply, usage_of
from klatch_schemas.events import Usage

WEATHER = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
WHOLE = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}


def put_together(*deltas: Any) -> dict[str, Any]:
    """The message that deltas of one choice make."""
    reply = Reply()
    for delta in deltas:
        reply.add({"id": "c", "choices": [{"index": 0, "delta": delta}]})
    return reply.messages()[0]


def more(arguments: Any, **said: Any) -> dict[str, Any]:
    """A later fragment of call 0."""
    return {"tool_calls": [{"index": 0, **said, "function": {"arguments": arguments}}]}


@given(st.lists(json_values, min_size=1, max_size=4))
def test_what_is_put_together_stays_as_it_was(values: list[Any]) -> None:
    deltas = [{"content": value, "details": {"parts": value, "of": {"parts": [value]}}} for value in values]
    before = codec.dumps(deltas)
    put_together(*deltas)
    assert codec.dumps(deltas) == before


def test_a_server_that_says_null_for_tool_calls_on_every_chunk_may_still_call_tools() -> None:
    """As SGLang does."""
    opened = {"role": "assistant", "content": "", "tool_calls": None}
    said = put_together(opened, {"tool_calls": [WEATHER]}, opened, more('{"city":'), more('"Rome"}'), opened)
    assert said == {"role": "assistant", "content": "", "tool_calls": [WHOLE]}
    # A list without calls is refused where the turn is sent again.
    assert "tool_calls" not in put_together(opened, {"tool_calls": []})


@pytest.mark.parametrize("nothing", ["", None])
def test_what_is_repeated_as_nothing_keeps_what_was_said(nothing: str | None) -> None:
    """As Qwen does with ids."""
    fragments = [more(part, id=nothing, type=nothing) for part in ('{"city":', '"Rome"}')]
    said = put_together({"role": "assistant"}, {"tool_calls": [WEATHER]}, *fragments, {"role": nothing})
    assert said == {"role": "assistant", "content": None, "tool_calls": [WHOLE]}


def test_an_id_may_follow_an_empty_one() -> None:
    assert put_together({"tool_calls": [{**WEATHER, "id": ""}]}, more('{"city":"Rome"}', id="call_1"))[
        "tool_calls"
    ] == [WHOLE]


@pytest.mark.parametrize("odd", [None, "", [], {}])
@pytest.mark.parametrize("name", ["content", "refusal", "reasoning_content", "function_call", "nobody_knows"])
@pytest.mark.parametrize("said", ["text", [{"a": 1}], {"a": "b"}, 7])
def test_nothing_takes_no_place_before_or_after(name: str, said: Any, odd: Any) -> None:
    assert put_together({name: odd}, {name: said}, {name: odd})[name] == said


@pytest.mark.parametrize("odd", [None, "", [], {}])
def test_nothing_takes_no_place_beside_a_delta_or_beside_the_choices(odd: Any) -> None:
    """As in Azure's last chunk, whose `content_filter_results` are `{}`."""
    filtered = {"hate": {"filtered": False, "severity": "safe"}}
    reply = Reply()
    for beside in (odd, filtered, odd):
        choice = {"index": 0, "delta": {}, "content_filter_results": beside}
        reply.add({"choices": [choice], "prompt_filter_results": beside})
    whole: Any = reply.completion()
    assert whole["choices"][0]["content_filter_results"] == filtered
    assert whole["prompt_filter_results"] == filtered


def test_objects_beside_a_delta_are_put_together_and_their_members_are_the_last_that_said_something() -> None:
    """As Azure's annotations, each of which tells of some categories."""
    said: list[Any] = [{"a": {"x": "low", "y": 1}}, {"a": {}, "b": 2}, {"a": {"x": "high"}, "b": None}, 7, {"c": [3]}]
    before = codec.dumps(said)
    wholes = list[Any]()
    reply = Reply()
    for one in said:
        reply.add({"choices": [{"index": 0, "delta": {}, "found": one}]})
        wholes.append(codec.loads(codec.dumps(reply.completion()))["choices"][0]["found"])
    assert wholes == [said[0], {"a": {"x": "low", "y": 1}, "b": 2}, {"a": {"x": "high"}, "b": 2}, 7, {"c": [3]}]
    assert codec.dumps(said) == before


@pytest.mark.parametrize("odd", [None, "", "x", 3, {}, {"index": 0}, [None, "x", 3]])
def test_odd_tool_calls_and_functions_leave_the_real_ones_as_they_are(odd: Any) -> None:
    real = [{"tool_calls": [WEATHER]}, more('{"city":"Rome"}')]
    for place in range(3):
        assert put_together(*real[:place], {"tool_calls": odd}, *real[place:])["tool_calls"] == [WHOLE]
    without = {name: one for name, one in WEATHER.items() if name != "function"}
    said = put_together(
        {"tool_calls": [{**without, "function": None}]}, *real, {"tool_calls": [{"index": 0, "function": None}]}
    )
    assert said["tool_calls"] == [WHOLE]


def test_a_message_beside_the_deltas_adds_only_what_they_have_not_said() -> None:
    reply = Reply()
    for delta, message in (
        ({"content": "a"}, None),
        ({"content": "b"}, {"content": "ab", "role": "assistant", "x": 1}),
    ):
        reply.add({"choices": [{"index": 0, "delta": delta, "message": message}]})
    assert reply.messages() == [{"role": "assistant", "content": "ab", "x": 1}]


THOUGHT: Any = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}


def test_parts_and_texts_in_turn_are_all_kept_in_order() -> None:
    """As Mistral's reasoning models say them: a list of parts for a thought, plain strings for the answer."""
    said = put_together({"content": ""}, *({"content": one} for one in ([THOUGHT], "Hel", "lo", [THOUGHT], "!")))
    hello, shout = ({"type": "text", "text": text} for text in ("Hello", "!"))
    assert said["content"] == [THOUGHT, hello, THOUGHT, shout]
    assert put_together({"content": "Hel"}, {"content": "lo"}, {"content": [THOUGHT]})["content"] == [hello, THOUGHT]


NAMES = [
    "role",
    "content",
    "tool_calls",
    "function",
    "id",
    "index",
    "type",
    "refusal",
    "reasoning_content",
    "arguments",
]
_odd = st.recursive(
    json_values,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)
_deltas = _odd | st.dictionaries(st.sampled_from(NAMES), _odd, max_size=4)
_choices = _odd | st.lists(
    _odd
    | st.fixed_dictionaries(
        {}, optional={"delta": _deltas, "index": _odd, "message": _odd, "logprobs": _odd, "finish_reason": _odd}
    ),
    max_size=3,
)
_chunks = st.fixed_dictionaries({}, optional={"id": _odd, "choices": _choices, "usage": _odd, "klatch": _odd})


@given(st.lists(_chunks, max_size=5))
def test_no_shape_raises(chunks: list[dict[str, Any]]) -> None:
    reply = Reply()
    for chunk in chunks:
        reply.add(chunk)
    assert reply.usage is None or reply.usage.prompt_tokens >= 0
    assert len(reply.finish_reasons) == len(reply.messages())
    codec.dumps(reply.completion())


def test_deep_objects_are_put_together_within_the_interpreters_limits() -> None:
    deep: Any = "x"
    for _ in range(2_000):
        deep = {"a": deep}
    assert put_together({"vendor": deep}, {"vendor": deep})["vendor"]["a"]


@given(_odd, _odd)
def test_what_is_no_count_of_tokens_counts_nothing(odd: Any, odder: Any) -> None:
    said = {"prompt_tokens": 3, "completion_tokens": odd, "prompt_tokens_details": odder}
    assert usage_of(said).prompt_tokens == 3
    nothing: list[Any] = [-1, "5", 10**30, [], {"a": 1}]
    for no_count in nothing:
        assert usage_of({"completion_tokens": no_count, "completion_tokens_details": no_count}) == Usage()


@given(st.permutations([None, "", "stop"]), st.sampled_from([0, 1]))
def test_a_finish_reason_outlives_null(said: list[str | None], index: int) -> None:
    reply = Reply()
    for each in itertools.chain(said, said):
        reply.add({"choices": [{"index": index, "delta": None, "finish_reason": each}]})
    assert reply.finish_reasons == {index: "stop"}
