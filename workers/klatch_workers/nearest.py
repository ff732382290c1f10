"""What somebody may have meant who misspelt a name."""

import difflib
from collections.abc import Iterable


def did_you_mean(said: str, known: Iterable[str]) -> str:
    """`did you mean NAME?`, of the nearest that is known; empty if none is near."""
    near = difflib.get_close_matches(said, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""
