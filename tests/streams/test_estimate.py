"""What admission reserves for a body."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from klatch_streams.estimate import Estimate

ESTIMATE = Estimate(bytes_per_token=3, per_message=8, per_media=1_200, overhead=16, completion=1_000)
Body = dict[str, JsonValue]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 1_016),
        ({"max_tokens": 5}, 21),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 23),
        ({"max_completion_tokens": 1, "max_tokens": 100_000}, 100_016),
        ({"max_completion_tokens": None, "max_tokens": 5}, 21),
        ({"max_completion_tokens": 1, "max_tokens": -1}, 1_016),
        ({"max_completion_tokens": 5_000, "max_tokens": "no end"}, 5_016),
        ({"max_tokens": 5, "n": 2_000}, 10_016),
        ({"max_tokens": "5", "n": "2000"}, 10_016),
        ({"max_tokens": 5.0, "n": 2e3}, 10_016),
        ({"max_tokens": 5.5, "n": float("nan")}, 1_016),
        ({"max_tokens": float("inf"), "n": -3}, 1_016),
        ({"max_tokens": "9" * 5_000}, 1_016),
        ({"max_tokens": 5, "n": 3}, 31),
        ({"max_tokens": -5}, 1_016),
        ({"max_tokens": True}, 1_016),
        ({"max_tokens": "many", "n": "some", "messages": 3}, 1_019),
        ({"max_tokens": 10**30, "n": 10**30}, 10**9),
        ({"max_tokens": 0, "n": 0}, 16),
        # "role", "user", "content" and the text: 4 + 4 + 7 + 6 bytes.
        ({"max_tokens": 0, "messages": [{"role": "user", "content": "hello!"}]}, 16 + 8 + 7),
        ({"max_tokens": 0, "messages": [{"role": "user", "content": "日本"}]}, 16 + 8 + 7),
        ({"max_tokens": 0, "messages": ["\ud800"]}, 16 + 8 + 1),
        ({"max_tokens": 1, "n_predict": 4_000}, 16 + 4_000),
        ({"max_tokens": 0, "documents": [{"text": "abcde"}], "chat_template": "fgh"}, 16 + 4),
        ({"max_tokens": 0, "messages": [{"image_url": {"url": "data:" + 9_000 * "A"}}]}, 16 + 8 + 1_200),
    ],
)
def test_the_estimate_follows_its_formula(body: Body, tokens: int) -> None:
    assert ESTIMATE.tokens(body) == tokens


@pytest.mark.parametrize(
    ("body", "bounded"),
    [
        ({}, False),
        ({"max_tokens": 5}, True),
        ({"max_completion_tokens": 1, "max_tokens": 100_000}, True),
        ({"max_completion_tokens": 1, "max_tokens": -1}, False),
        ({"max_completion_tokens": 1, "max_tokens": True}, False),
        ({"max_completion_tokens": 1, "max_tokens": None}, True),
        ({"max_completion_tokens": 1, "max_tokens": [5]}, False),
        ({"max_tokens": 1, "n_predict": 4_000}, True),
        ({"max_tokens": 1, "n_predict": -1}, False),
        ({"n_predict": 5}, False),
    ],
)
def test_a_reply_is_bounded_only_by_what_every_server_reads_as_a_bound(body: Body, bounded: bool) -> None:
    assert ESTIMATE.of(body).bounded is bounded


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.sampled_from(["messages", "tools", "n", "max_tokens", "max_completion_tokens", "x"]), _json))
def test_any_body_has_an_estimate(body: Body) -> None:
    assert 16 <= ESTIMATE.tokens(body) <= 10**9


@given(st.text(), st.text())
def test_more_text_never_costs_less(text: str, more: str) -> None:
    assert ESTIMATE.tokens({"messages": [text]}) <= ESTIMATE.tokens({"messages": [text + more]})


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ("hello!", 2 + 2),
        (["hello!", "日本"], 4 + 2 * 2),
        ([101, 2, 102], 3),
        ([[1, 2], [3]], 3),
        ([], 0),
        (None, 1),
        ({"x": "y"}, 1),
    ],
)
def test_what_is_embedded_is_estimated_by_its_texts_or_counted_by_its_tokens(said: object, tokens: int) -> None:
    assert ESTIMATE.of_input(said) == tokens


def test_a_body_nested_deeper_than_the_recursion_limit_is_walked() -> None:
    deep: JsonValue = "x"
    for _ in range(100_000):
        deep = [deep]
    assert ESTIMATE.tokens({"messages": deep, "max_tokens": 0}) == 16 + 8 + 1
