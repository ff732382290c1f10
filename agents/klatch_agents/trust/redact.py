"""Replaces what was found, in a copy of the body; what lies outside the findings stays as it was.

Pure functions. Where findings overlap, their union is replaced once. The arguments of a tool call are written anew
(compact JSON) when something inside them is replaced, and only then.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TypeVar

from klatch_agents.trust.judge import Path
from klatch_agents.trust.passages import replace_at
from klatch_schemas.events import Finding

_Body = TypeVar("_Body", bound=Mapping[str, object])


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """The findings ordered by path and place, overlapping ones made one.

    The union is called by the category and replacement of its longest part. Findings that only touch stay apart;
    empty ones are dropped.
    """
    merged: list[Finding] = []
    for path, group in sorted(_by_path(findings).items(), key=lambda item: _sortable(item[0])):
        merged += _merge_passage(path, group)
    return merged


def redact(body: _Body, findings: Iterable[Finding]) -> _Body:
    """A copy of `body` with every finding replaced; raises `LookupError` for a path the body does not have."""
    redacted = copy.deepcopy(body)
    for path, group in _by_path(merge(findings)).items():
        replace_at(redacted, path, partial(_replaced, group))
    return redacted


def replace_spans(text: str, findings: Iterable[Finding]) -> str:
    """`text` with the (merged) findings replaced; a finding without a replacement becomes its category."""
    # From the right, so that the offsets of what is still to come stay true.
    for finding in sorted(findings, key=lambda finding: finding.start, reverse=True):
        mark = finding.replacement
        if mark is None:
            mark = f"[{finding.category.upper()}]"
        text = text[: finding.start] + mark + text[finding.end :]
    return text


def _replaced(findings: list[Finding], text: str) -> str:
    return replace_spans(text, findings)


def _merge_passage(path: Path, findings: list[Finding]) -> list[Finding]:
    merged: list[Finding] = []
    longest = 0
    for finding in sorted(findings, key=lambda finding: (finding.start, -finding.end)):
        size = finding.end - finding.start
        last = merged[-1] if merged else None
        if last is None or finding.start >= last.end:
            merged.append(finding)
            longest = size
        elif size > longest or finding.end > last.end:
            name = finding if size > longest else last
            longest = max(longest, size)
            merged[-1] = Finding(
                category=name.category,
                path=path,
                start=last.start,
                end=max(last.end, finding.end),
                replacement=name.replacement,
            )
    return merged


def _by_path(findings: Iterable[Finding]) -> dict[Path, list[Finding]]:
    groups: dict[Path, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.end > finding.start:
            groups[finding.path].append(finding)
    return groups


def _sortable(path: Path) -> tuple[tuple[bool, int, str], ...]:
    # Numbers before names, so that steps of both kinds can be compared.
    return tuple((True, 0, step) if isinstance(step, str) else (False, step, "") for step in path)
