"""What one door process remembers of the streams it was asked for: where each begins.

Only a short cut: any other door finds the same by reading the log.
"""

from collections import OrderedDict
from dataclasses import dataclass

from klatch_schemas.ids import Conversation
from klatch_workers.http.reader import Stream


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream stands: no record of it is before `start` in partition `number`."""

    number: int
    start: int
    conversation: Conversation


class Recent:
    """The places of the last `size` streams."""

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._places: OrderedDict[Stream, Place] = OrderedDict()

    def get(self, stream: Stream) -> Place | None:
        """Where the stream stands, if this door remembers."""
        return self._places.get(stream)

    def put(self, stream: Stream, place: Place) -> None:
        """Remember, and forget the oldest."""
        self._places[stream] = place
        self._places.move_to_end(stream)
        if len(self._places) > self._size:
            self._places.popitem(last=False)
