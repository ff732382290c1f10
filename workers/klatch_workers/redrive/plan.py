"""What becomes of a letter when its record is redriven, and which letters are not: one judgement a letter, pure.

Topics differ in what a record means that comes again, late: see `_REFUSED` and `docs/operations.md`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from klatch_schemas import codec
from klatch_schemas.events import QuotaLimitSet, Status
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, CHAT_TURNS, TRUST_VERDICTS
from klatch_workers.redrive.letters import Asked, Letter, Shelf

MAX_REDRIVES: Final = 3

State = Literal["ready", "redriven", "answered", "refused", "guarded", "failed"]
"""
ready     to be redriven; after it was, `redriven`
redriven  it was, and has not died again
answered  the stream of its request has ended
refused   records of this kind are not redriven
guarded   it was redriven too often already
failed    it should have been redriven, and could not be
"""


class Judgement(NamedTuple):
    """A letter, what becomes of it, and why."""

    letter: Letter
    state: State
    why: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """How far to go."""

    max_redrives: int = MAX_REDRIVES
    again: bool = False
    """Whether to redrive also what was redriven or answered."""
    limit: int | None = None
    """The most letters to redrive."""


_TAKEN: Final = frozenset({topic.name for topic in (CHAT_REQUESTS, CHAT_ADMITTED, TRUST_VERDICTS, CHAT_TURNS)})
_REFUSED: Final[Mapping[str, str]] = {
    CHAT_STREAM.name: "what a record of a stream means is its place in the stream: late, it would mean something else"
}


def judge(
    letters: Iterable[Letter], shelf: Shelf, answers: Mapping[Asked, Status], policy: Policy
) -> Iterator[Judgement]:
    """A judgement on each letter, until as many as the limit says are ready."""
    ready = 0
    for letter in letters:
        if policy.limit is not None and ready >= policy.limit:
            return
        judged = _judge(letter, shelf.redriven_ms(letter) is not None, answers, policy)
        ready += judged.state == "ready"
        yield judged


def _judge(letter: Letter, was_redriven: bool, answers: Mapping[Asked, Status], policy: Policy) -> Judgement:
    if why := refusal(letter):
        return Judgement(letter, "refused", why)
    ended = answers.get(letter.asked) if letter.asked else None
    if ended and not policy.again:
        return Judgement(letter, "answered", f"its request has ended: {ended}")
    if was_redriven and not policy.again:
        return Judgement(letter, "redriven", "it was redriven and has not come back; --again does it again")
    if letter.redriven >= policy.max_redrives:
        return Judgement(letter, "guarded", f"redriven {letter.redriven} times already; --max-redrives allows more")
    return Judgement(letter, "ready")


def refusal(letter: Letter) -> str:
    """Why letters like this one are never redriven; empty if they are."""
    if letter.topic not in _TAKEN:
        return _REFUSED.get(letter.topic, f"nothing reads {letter.topic or 'its topic'} again")
    if letter.kind == codec.LOST:
        return "it stands for records that nobody could unpack: who wrote them has to write them again, readably"
    if letter.topic == CHAT_REQUESTS.name and letter.kind.startswith(QuotaLimitSet.KIND.rsplit(".v", 1)[0]):
        return (
            "a limit that comes late would undo a newer one: set it anew with `klatch tenants apply FILE --again`, "
            "or what the ledger holds with `klatch quota set TENANT --again`"
        )
    return ""
