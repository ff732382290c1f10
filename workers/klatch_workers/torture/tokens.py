"""The text that the fake model writes, read again: which call said which token, and what is wrong with the whole.

A lineage is one call's tokens from the first on, in order, without a hole; or those of several calls, where an attempt
that continues the text put the next call behind a token that stood last. Anything else that a reader was shown is a
broken promise, and has a name.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

Fault = Literal["spliced", "duplicated", "reordered"]

_TOKEN = re.compile(r"<<(c\d+):(\d+)>>")


class Token(NamedTuple):
    """A token, and the model call that it comes from."""

    call: str
    number: int


def tokens_of(text: str) -> list[Token]:
    """All tokens in `text`; what is no token is left out (see `faults_of`)."""
    return [Token(call, int(number)) for call, number in _TOKEN.findall(text)]


def faults_of(text: str, joints: Collection[Token] = ()) -> Iterator[tuple[Fault, str]]:
    """What is wrong with a text that a reader was shown; behind `joints` another call may go on."""
    tokens = tokens_of(text)
    if _TOKEN.sub("", text):
        yield "spliced", "text that is no whole token"
    for before, after in pairwise(tokens):
        if before.call != after.call and before not in joints:
            yield "spliced", f"{after.call} goes on behind token {before.number} of {before.call}"
            return
    yield from _faults_of_numbers([token.number for token in tokens])


def _faults_of_numbers(numbers: Sequence[int]) -> Iterator[tuple[Fault, str]]:
    if len(set(numbers)) < len(numbers):
        doubled = next(number for at, number in enumerate(numbers) if number in numbers[:at])
        yield "duplicated", f"token {doubled} twice"
    if any(after < before for before, after in pairwise(numbers)):
        yield "reordered", "tokens of one call out of order"
    if numbers and (missing := set(range(max(numbers))) - set(numbers)):
        yield "spliced", f"a hole: token {min(missing)} is missing"
