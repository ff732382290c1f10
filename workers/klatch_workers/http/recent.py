"""What one door process remembers of the streams it was asked for: where each begins.

Only a short cut: any other door finds the same by reading the log.
"""

from collections import OrderedDict
from dataclasses import dataclass

from klatch_schemas.ids import Conversation
from klatch_streams.seen import LONGEST_MS
from klatch_workers.http.reader import Stream


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream stands: no record of it is before `start` in partition `number`."""

    number: int
    start: int
    began_ms: int
    """When that record was written, or read at the latest."""
    conversation: Conversation


class Recent:
    """The places of the last `size` streams."""

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._places: OrderedDict[Stream, Place] = OrderedDict()

    def get(self, stream: Stream) -> Place | None:
        """Where the stream stands, if this door remembers."""
        return self._places.get(stream)

    def under_key(self, stream: Stream, now_ms: int) -> Place | None:
        """Where the stream of a key stands; None, and forgotten, if the key may name another by now."""
        place = self.get(stream)
        if place and place.began_ms < now_ms - LONGEST_MS:
            del self._places[stream]
            return None
        return place

    def put(self, stream: Stream, place: Place) -> None:
        """Remember, and forget the oldest."""
        self._places[stream] = place
        self._places.move_to_end(stream)
        if len(self._places) > self._size:
            self._places.popitem(last=False)
