"""One request as the stream log tells of it, and what readers are shown who come at other times.

All of it is the contract's own fold (`klatch_schemas.assembly`) over the records as they were read back; nothing here
knows how klatch made them.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Ended, Opened, ReplyReader, Spoke, Standing
from klatch_schemas.codec import Delta
from klatch_schemas.errors import KlatchError, Superseded
from klatch_schemas.ids import RequestId
from klatch_workers.torture.evidence import Entry, Observation
from klatch_workers.torture.tokens import Token, tokens_of

_CUTS = 3
ENDS: Final = {
    "cancelled": "cancelled",
    "deadline_exceeded": "expired",
    "model_error": "failed",
    "content_filter": "blocked",
    "rate_limit_exceeded": "rejected",
    "conversation_busy": "rejected",
    "stream_broken": "broken",
}
"""Codes of errors that mean one end, whatever else is said: who is told `deadline_exceeded` of a stream that was
cancelled was told of another end. What other codes mean, such as `unavailable`, only the status beside them says."""


@dataclass(slots=True)
class Told:
    """A stream, folded from its first record to its last."""

    entries: Sequence[Entry]
    assembly: Assembly = field(default_factory=Assembly)
    opened: Entry | None = None
    """The first opening that counted."""
    reopened: Entry | None = None
    """The last that counted."""
    ended: Entry | None = None
    """The record that ended it."""
    attempts: int = 0
    """Openings that counted."""
    ignored: int = 0
    """Deltas that counted for nothing: a zombie's, or of an attempt that was over."""
    spoken_ms: list[int] = field(default_factory=list[int])
    """When each token came that counted."""
    text: str = ""
    """What stands in the end."""
    joints: set[Token] = field(default_factory=set[Token])
    """The last tokens that stood when an attempt continued: only behind them may another call go on."""
    continued: int = 0
    """Attempts that continued a text."""
    _last: Token | None = None

    @property
    def outcome(self) -> str | None:
        """How it ended for every reader."""
        if self.assembly.gap:
            return "broken"
        return self.assembly.state.status

    @property
    def raced(self) -> bool:
        """Whether a cancel came before an end that meant another outcome."""
        end = self.assembly.end
        return self.assembly.state.status == "cancelled" and end is not None and end.status != "cancelled"

    @property
    def written(self) -> int:
        """The most deltas that one attempt wrote, whether they count or not: what a model was made to say at once.

        Of a reply that was continued, those of all attempts.
        """
        said = [(one.said.attempt, one.said.writer) for one in self.entries if isinstance(one.said, Delta)]
        return len(said) if self.continued else max(Counter(said).values(), default=0)

    def hear(self, entry: Entry) -> None:
        """Fold one record."""
        before = self.assembly.state.status
        match self.assembly.hear(entry.offset, entry.said):
            case Opened(mode=mode):
                self._open(entry, mode)
            case Spoke(_, chunk) if content := content_of(bytes(chunk)):
                self.spoken_ms.append(entry.timestamp_ms)
                if tokens := tokens_of(content):
                    self._last = tokens[-1]
            case None if isinstance(entry.said, Delta):
                self.ignored += 1
            case _:
                pass
        if before is None and self.assembly.state.status is not None:
            self.ended = entry

    def _open(self, entry: Entry, mode: str) -> None:
        self.attempts += 1
        self.opened, self.reopened = self.opened or entry, entry
        if mode == "restart":
            self._last = None
        elif self._last:
            self.continued += 1
            self.joints.add(self._last)


def fold_stream(entries: Sequence[Entry]) -> Told:
    """Fold the records of one stream, in log order."""
    told = Told(entries)
    for entry in entries:
        told.hear(entry)
    told.text = text_of(told.assembly.standing)
    return told


def outcome_told(ended: Ended) -> str:
    """How a stream ended for a reader that goes by the error it is told of, as clients do."""
    return outcome_of(ended.error.code if ended.error else ended.status, ended.status) or ended.status


def outcome_of(code: str, ended: str | None) -> str | None:
    """How a stream ended whose reader was told of this error; None: it was no end, and the reader asks again.

    `ended` is the status that the error names beside its code, if it says that it is the end of a stream.
    """
    return ENDS.get(code, ended)


def content_of(chunk: bytes) -> str:
    """What choice 0 says in a chunk."""
    choices = codec.loads(chunk).get("choices") or ()
    return "".join(choice["delta"].get("content") or "" for choice in choices if not choice["index"])


def text_of(standing: Sequence[Standing]) -> str:
    """The text of deltas that stand."""
    return "".join(content_of(bytes(said.chunk)) for said in standing)


def resumed(request: RequestId, entries: Sequence[Entry]) -> Iterator[Observation]:
    """What readers are shown who go live, or go away and resume, at some of the log's offsets."""
    chance = random.Random(request)  # noqa: S311 - no secret
    for cut in sorted(chance.sample(range(len(entries) + 1), min(_CUTS, len(entries) + 1))):
        yield _reads(f"live from {cut}", request, entries, cut)
        yield _resumes(request, entries, cut)


def _reads(reader: str, request: RequestId, entries: Sequence[Entry], cut: int) -> Observation:
    """A reader that finds the first `cut` records in the log, and hears the others live."""
    reply, shown = ReplyReader(), list[Standing | Ended]()
    try:
        _feed(reply, entries[:cut])
        shown += reply.go_live()
        for entry in entries[cut:] if reply.state.status is None else ():
            shown += _heard(reply, entry)
            if reply.state.status is not None:
                break
    except KlatchError as error:
        return _observed(reader, request, shown, error)
    return _observed(reader, request, shown)


def _resumes(request: RequestId, entries: Sequence[Entry], cut: int) -> Observation:
    """A reader that hears the first `cut` records live, goes away, and comes back when all is over."""
    first, shown = ReplyReader(), list[Standing | Ended]()
    reader = f"resumed at {cut}"
    try:
        shown += first.go_live()
        for entry in entries[:cut]:
            shown += _heard(first, entry)
            if first.state.status is not None:
                return _observed(reader, request, shown)
        last = max((one.offset for one in shown if isinstance(one, Standing)), default=None)
        again = ReplyReader(last)
        _feed(again, entries)
        shown += again.go_live()
    except KlatchError as error:
        return _observed(reader, request, shown, error)
    return _observed(reader, request, shown)


def _feed(reply: ReplyReader, entries: Sequence[Entry]) -> None:
    for entry in entries:
        reply.hear(entry.offset, entry.said)


def _heard(reply: ReplyReader, entry: Entry) -> list[Standing | Ended]:
    heard = reply.hear(entry.offset, entry.said)
    return [heard] if heard else []


def _observed(
    reader: str, request: RequestId, shown: Sequence[Standing | Ended], error: KlatchError | None = None
) -> Observation:
    text = text_of([one for one in shown if isinstance(one, Standing)])
    ends = tuple(outcome_told(one) for one in shown if isinstance(one, Ended))
    if isinstance(error, Superseded):
        # It was told that its text is void, and begins anew, as a late reader does.
        return Observation(reader, request, "", None, voided=(text,), left=True)
    return Observation(reader, request, text, "broken" if error else (ends[-1] if ends else None), outcomes=ends)
