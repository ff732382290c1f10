"""Whether the records of a stream begin with its first, where somebody reads from a place that was guessed.

Nobody ends or continues an attempt before its opening was read back from the log. So an end, or an attempt that goes
on, without an opening before it tells of a beginning further back: one that the log has lost, if it holds nothing
there. What comes behind a later opening that begins anew is whole all the same.
"""

from collections.abc import Sequence
from typing import TypeVar

from klatch_schemas.codec import Delta
from klatch_schemas.events import Event, StreamAttempt, StreamCancel, StreamEnd

SaidT = TypeVar("SaidT", bound=Event | Delta)


class Beginning:
    """Looks for the beginning of one stream."""

    def __init__(self) -> None:
        self._found = self._spoke = self._over = False
        self.missing = False
        """Whether what was heard began before it."""

    def sift(self, heard: Sequence[tuple[int, SaidT]]) -> list[tuple[int, SaidT]]:
        """Take the stream's next records into account; returns those that are not of a beginning that is missing."""
        return [(offset, said) for offset, said in heard if self._hear(said)]

    def _hear(self, said: Event | Delta) -> bool:
        match said:
            case Delta():
                self._spoke = True
            case StreamAttempt(attempt=1):
                self._found, self.missing, self._over = True, False, False
            case StreamAttempt(mode="restart") if not self._over:
                self._found, self.missing = True, False
            case StreamCancel() if not self._found:
                # It ends the stream, whatever comes behind it: all of it, if nothing was said before.
                self._found = not (self.missing or self._spoke)
                self.missing = not self._found
                self._over = True
            case StreamAttempt() | StreamEnd() if said.attempt and not self._found:
                self.missing = True
                self._over = self._over or isinstance(said, StreamEnd)
            case _:
                pass
        return not self.missing
