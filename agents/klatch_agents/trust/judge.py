"""The port behind which judges stand, and the passages of text they are given.

A judge is handed a batch of passages, of one request or of many, and answers with the findings of each, in order.
It decides nothing: what a finding means for a use case is the policy's business (`policy.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from klatch_schemas.events import Finding

Path = tuple[str | int, ...]


class Passage(NamedTuple):
    """A piece of text and where it stands in a Chat Completions body.

    `path` leads from the body to the text: `("messages", 3, "content", 1, "text")`. The arguments of a tool call
    are JSON inside a string; there the path goes on into the parsed value:
    `("messages", 3, "tool_calls", 0, "function", "arguments", "address", "street")`.
    """

    path: Path
    text: str


class JudgeFailed(Exception):
    """A judge could not answer. The policy's `on_judge_failure` says what happens to the request."""


class Judge(Protocol):
    """Finds what is sensitive or hostile in text."""

    async def judge(self, passages: Sequence[Passage]) -> Sequence[Sequence[Finding]]:
        """One sequence of findings a passage, in the order of `passages`; raises `JudgeFailed`.

        `start` and `end` of a finding are indices into the passage's Python string, that is Unicode code points:
        not bytes, and not the UTF-16 units of JavaScript.
        """
        ...

    async def close(self) -> None:
        """Releases what the judge holds; it is not used afterwards."""
        ...
