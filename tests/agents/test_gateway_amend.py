"""The running total of a chunk becomes null for clients, and no other byte of it changes (trap 27)."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_agents.gateway.amend import without_usage

TOTAL = '{"prompt_tokens": 3, "completion_tokens": 1}'
SAID = f'"usage" : {TOTAL}'
ESCAPED = json.dumps(SAID)


@pytest.mark.parametrize(
    "chunk",
    [
        '{"id": "c", @}',
        '{@, "metrics": {"usage" : $}}',
        '{"metrics": {"usage" : $}, @}',
        '{@, "choices": [{"index": 0, "delta": {"content": "hi"}, "usage" : $}]}',
        f'{{@, "choices": [{{"delta": {{"content": {ESCAPED}}}}}], "x": {{"y": [$]}}}}',
        '{"usage" : $, @, "odd": "a \\" { [ \\\\", "also": {"usage" : $}}',
        '{@, "object": "usage", "last": $}',
        '{@, "x": {"usage" : $}, "half": "\\ud83d"}',
    ],
)
def test_only_the_chunks_own_total_becomes_null(chunk: str) -> None:
    raw, meant = (chunk.replace("@", own).replace("$", TOTAL) for own in (SAID, '"usage" : null'))
    assert without_usage(raw.encode(), TOTAL.encode()) == meant.encode()


@pytest.mark.parametrize(
    "raw", ['{"usage":{"prompt_tokens":3},"id":"c"}', '{"\\u0075sage": {"a": {}}, "id":"c", "x": {}}']
)
def test_a_total_that_stands_there_in_other_bytes_becomes_null_too(raw: str) -> None:
    chunk = json.loads(without_usage(raw.encode(), b'{"prompt_tokens": 3}'))
    assert chunk == {**json.loads(raw), "usage": None}


_inner = st.recursive(
    st.just(json.loads(TOTAL)) | st.text(max_size=8) | st.just(SAID) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["usage", "x", "y"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "choices"]), _inner),
    st.dictionaries(st.sampled_from(["y", "z"]), _inner),
)
def test_whatever_stands_around_it_is_kept(before: dict[str, Any], after: dict[str, Any]) -> None:
    chunk = {**before, "usage": json.loads(TOTAL), **after}
    amended = without_usage(json.dumps(chunk).encode(), TOTAL.encode())
    assert amended == json.dumps({**chunk, "usage": None}).encode()
