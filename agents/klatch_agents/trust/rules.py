"""The judge that ships with klatch: rules without a model, a few microseconds a message.

Finds what has a form (addresses, numbers, keys, broken encoding, well-known override wordings) and text that is too
long. It knows no meaning and no language but English for the overrides; put a model behind the same port for that.
"""

import asyncio
from collections.abc import Iterator, Sequence

from klatch_agents.trust.judge import Passage
from klatch_agents.trust.patterns import SCANNERS, Span
from klatch_schemas.events import Finding

CATEGORIES = ("too_large", *SCANNERS)
"""Every category that the rules can find."""

_CUT = "[TRUNCATED]"
# Below this a scan costs less than handing it to a thread.
_THREAD_FROM = 32_768
# A verdict is a record in a topic: text of nothing but addresses must not make it grow with the text.
_MOST_FINDINGS = 128
# Replacing a span can lay bare another that had been glued to it, so what is left is scanned again; a text without
# findings, nearly every one, is scanned once.
_MOST_SCANS = 8


class RulesJudge:
    """Finds the categories of `CATEGORIES`; offsets are Unicode code points of the passage.

    `max_characters` is the longest passage that is not `too_large`; what is longer is judged all the same, since a
    policy may allow it.
    """

    def __init__(self, max_characters: int = 400_000) -> None:
        if max_characters <= len(_CUT):
            raise ValueError(f"max_characters is {max_characters}: set it above {len(_CUT)}")
        self._max_characters = max_characters

    async def judge(self, passages: Sequence[Passage]) -> Sequence[Sequence[Finding]]:
        """Judges in this thread, or in another when the text is long."""
        if sum(len(passage.text) for passage in passages) < _THREAD_FROM:
            return [self.find(passage) for passage in passages]
        return await asyncio.to_thread(lambda: [self.find(passage) for passage in passages])

    async def close(self) -> None:
        """Nothing is held."""

    def find(self, passage: Passage) -> list[Finding]:
        """The findings of one passage, by category and then by place."""
        found = [_finding("too_large", passage, span) for span in self._too_large(passage.text)]
        text = passage.text
        for _ in range(_MOST_SCANS):
            fresh = [(category, span) for category, scan in SCANNERS.items() for span in _bounded(scan(text))]
            if not fresh:
                break
            found += [_finding(category, passage, span) for category, span in fresh]
            text = _mask(text, [span for _, span in fresh])
        return found

    def _too_large(self, text: str) -> Iterator[Span]:
        if len(text) > self._max_characters:
            # The cut leaves room for the mark, so that redacted text is within the limit itself.
            yield Span(self._max_characters - len(_CUT), len(text), _CUT)


def _bounded(spans: Iterator[Span]) -> list[Span]:
    """At most `_MOST_FINDINGS` spans: those past the limit become one that covers them all."""
    kept: list[Span] = []
    for span in spans:
        if len(kept) < _MOST_FINDINGS:
            kept.append(span)
        else:
            last = kept[-1]
            kept[-1] = Span(last.start, max(last.end, span.end), last.replacement)
    return kept


def _mask(text: str, spans: list[Span]) -> str:
    """`text`, as long as before, with brackets over the spans: to its neighbours a span looks as if redacted."""
    pieces: list[str] = []
    position = 0
    for span_start, end, _ in sorted(spans):
        start = max(span_start, position)
        pieces += [text[position:start], "[" * (end - start)]
        position = max(position, end)
    return "".join(pieces) + text[position:]


def _finding(category: str, passage: Passage, span: Span) -> Finding:
    return Finding(
        category=category,
        path=passage.path,
        start=span.start,
        end=span.end,
        replacement=span.replacement,
    )
