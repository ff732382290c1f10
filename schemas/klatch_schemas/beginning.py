"""Whether the records of a stream begin with its first, where somebody reads from a place that was guessed.

Nobody ends or continues an attempt before its opening was read back from the log. So an end, or an attempt that goes
on, without an opening before it tells of a beginning further back: one that the log has lost, if it holds nothing
there. What comes behind a later opening that begins anew is whole all the same.

A place that is right is never called wrong: deltas name no tenant, and prove nothing by themselves.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

from klatch_schemas.codec import Delta
from klatch_schemas.events import Event, StreamAttempt, StreamCancel, StreamEnd

SaidT = TypeVar("SaidT", bound=Event | Delta)


class Beginning(Generic[SaidT]):
    """Looks for the beginning of one stream."""

    def __init__(self) -> None:
        self._found = self._spoke = self._over = False
        self._held = list[tuple[int, SaidT]]()
        self.missing = False
        """Whether what was heard began before it. Who reads what stands in the log asks when it has caught up: a later
        opening may begin anew."""

    def sift(self, heard: Sequence[tuple[int, SaidT]]) -> list[tuple[int, SaidT]]:
        """Take the stream's next records into account; returns those that are not of a beginning that is missing, in
        order. A cancel of which it is not known yet comes with the record that tells."""
        kept = list[tuple[int, SaidT]]()
        for offset, said in heard:
            self._hear(said)
            if self.missing:
                self._held = []
            elif self._over and not self._found:
                self._held.append((offset, said))
            else:
                kept += [*self._held, (offset, said)]
                self._held = []
        return kept

    def _hear(self, said: Event | Delta) -> None:
        match said:
            case Delta():
                self._spoke = True
            case StreamAttempt(attempt=1):
                self._found, self.missing, self._over = True, False, False
            case StreamAttempt(mode="restart") if not self._over:
                self._found, self.missing = True, False
            case StreamCancel() if not self._found:
                # It ends the stream, whatever comes behind it: all of it, if nothing was said before. Deltas before it
                # may be those of another tenant's stream under the same id: the end that follows tells.
                self._found = not (self.missing or self._spoke)
                self._over = True
            case StreamEnd(attempt=0) if self._over:
                self._found = not self.missing
            case StreamAttempt() | StreamEnd() if said.attempt and not self._found:
                self.missing = True
                self._over = self._over or isinstance(said, StreamEnd)
            case _:
                pass
