"""A policy file decides what findings mean, and a bad file says what to write instead."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_agents.trust.policy import (
    PolicyError,
    decide,
    decide_unjudged,
    load_policy,
    parse_policy,
)
from klatch_agents.trust.redact import merge, redact, replace_spans
from klatch_agents.trust.rules import CATEGORIES
from klatch_schemas.events import Finding

POLICY = parse_policy(
    b"""
version = "7"
judge_categories = ["toxicity"]
[default]
other = "escalate"
[default.categories]
email = "redact"
secret = "block"
phone = "allow"
[use_case.support]
on_judge_failure = "open"
[use_case.support.categories]
secret = "redact"
toxicity = "escalate"
"""
)


def finding(category: str, start: int = 0, end: int = 4, *, path: tuple[str | int, ...] = ("m", 0)) -> Finding:
    return Finding(category=category, path=path, start=start, end=end, replacement=f"<{category}>")


@pytest.mark.parametrize(
    ("categories", "use_case", "decision"),
    [
        ([], "default", "allow"),
        (["phone"], "default", "allow"),
        (["email", "phone"], "default", "redact"),
        (["email", "secret"], "default", "block"),
        (["email", "secret"], "support", "redact"),
        (["email", "toxicity"], "support", "escalate"),
        (["unheard_of"], "default", "escalate"),
        (["secret"], "a use case of no table", "block"),
    ],
)
def test_the_strongest_action_of_a_use_case_decides(categories: list[str], use_case: str, decision: str) -> None:
    verdict = decide([finding(category) for category in categories], POLICY, use_case)
    assert verdict.decision == decision
    assert verdict.policy == "7"
    assert not verdict.degraded


def test_what_is_allowed_leaves_no_trace_in_the_verdict() -> None:
    verdict = decide([finding("phone", 0, 30), finding("email", 10, 20)], POLICY, "default")
    assert verdict.categories == ("email",)
    assert verdict.findings == (finding("email", 10, 20),)


def test_a_failed_judge_blocks_where_the_policy_is_closed_and_passes_where_it_is_open() -> None:
    closed, opened = decide_unjudged(POLICY, "default"), decide_unjudged(POLICY, "support")
    assert (closed.decision, closed.degraded) == ("block", True)
    assert (opened.decision, opened.degraded) == ("allow", True)
    assert closed.categories == opened.categories == ("judge_failure",)


def test_the_default_policy_names_every_category_of_the_rules() -> None:
    policy = load_policy()
    assert set(policy.default.actions) == set(CATEGORIES)
    assert policy.default.on_judge_failure == "closed"


def test_a_policy_without_a_version_is_named_by_its_content() -> None:
    one, same, other = (parse_policy(text) for text in (b"[default]\n", b"[default]\n", b"[default]\n#\n"))
    assert one.version == same.version != other.version


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"there is no \[default\]: add it"),
        ("[default", "is not TOML"),
        ("[defualt]", r'defualt is not known: use "default", "judge_categories", "use_case", "version"'),
        ("[default.categories]\nemial = 'redact'", r"default\.categories\.emial is not known: use .*\"email\""),
        ("[default.categories]\nemail = 'hide'", r"default\.categories\.email is 'hide': use \"allow\""),
        ("[default]\non_judge_failure = true", r"default\.on_judge_failure is True: use \"closed\", \"open\""),
        ("[default]\nother = 'x'", r"default\.other is 'x': use \"allow\""),
        ("version = 3\n[default]", "version is 3: write a string"),
        ("use_case = 3\n[default]", r"use_case is 3: write a table, \[use_case\]"),
        ("judge_categories = 'x'\n[default]", "judge_categories is 'x': write a list"),
        ("[default]\n[use_case.a]\nfoo = 1", r"use_case\.a\.foo is not known"),
    ],
)
def test_a_bad_policy_file_names_the_field_and_the_fix(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        parse_policy(text.encode(), "trust.toml")
    assert str(caught.value).startswith("trust.toml")


def test_a_missing_policy_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.toml cannot be read"):
        load_policy(tmp_path / "none.toml")


def test_overlapping_findings_become_one_called_after_the_longest() -> None:
    merged = merge([finding("b", 4, 12), finding("a", 0, 5), finding("c", 11, 13), finding("d", 20, 20)])
    assert merged == [finding("b", 0, 13)]


def test_findings_that_touch_and_findings_of_other_passages_stay_apart() -> None:
    findings = [finding("a", 0, 4), finding("b", 4, 8), finding("a", 2, 6, path=("m", 1))]
    assert merge(findings) == findings


def test_a_finding_without_a_replacement_becomes_its_category() -> None:
    assert replace_spans("a bob c", [Finding(category="who", path=("m",), start=2, end=5)]) == "a [WHO] c"


TEXT = st.text(alphabet="abc", max_size=30)
SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6)


@given(TEXT, SPANS)
def test_redaction_replaces_exactly_the_union_of_the_spans(text: str, spans: list[tuple[int, int]]) -> None:
    findings = [
        Finding(category="x", path=("messages", 0), start=min(s), end=min(max(s), len(text)), replacement="#")
        for s in spans
        if min(s) < min(max(s), len(text))
    ]
    body: dict[str, Any] = {"messages": [text, "untouched"], "other": [1]}
    before = copy.deepcopy(body)
    result = redact(body, findings)
    covered = {i for f in findings for i in range(f.start, f.end)}
    kept = "".join(letter for i, letter in enumerate(text) if i not in covered)
    assert result["messages"][0].replace("#", "") == kept
    assert result["messages"][1:] == ["untouched"]
    assert result["other"] == [1]
    assert body == before
    assert merge(merge(findings)) == merge(findings)


def test_a_finding_of_another_body_is_an_error() -> None:
    with pytest.raises(LookupError):
        redact({"messages": ["only one"]}, [finding("a", path=("messages", 1))])
