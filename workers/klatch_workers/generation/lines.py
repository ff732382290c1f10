"""The conversations of one partition as lines of requests: one speaks at a time, in the order of admission.

Every request that was met has its place until it is concluded. Those behind the first wait, and so does a first for
which its tenant has no share of the room left. They can be ended while they wait, for nobody needs their turn: only
what said something has to be remembered in order.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from klatch_schemas.events import IfBusy
from klatch_streams.generation import WhenBusy, when_met
from klatch_streams.keyed_owner import GivenBack
from klatch_workers.generation.shares import Shares
from klatch_workers.generation.table import Tracked


class Lines:
    """All lines of a partition."""

    def __init__(self, room: int) -> None:
        """At most `room` requests have their turn at once."""
        self._lines: dict[Hashable, list[Place]] = {}
        self._firsts: dict[int, Place] = {}
        """Of every line, by offset: they have their share of the room, or wait for it."""
        self._shares = Shares(room)
        self.closed = False

    def join(self, tracked: Tracked, conversation: str, offset: int) -> "Place":
        """Take the next place in the line of a conversation; the offset is the request's on `chat.admitted`."""
        key = (tracked.tenant, conversation)
        line = self._lines.setdefault(key, [])
        place = Place(self, key, tracked, offset, given_up=tracked.assembly.state.attempt)
        # An owner meets them in this order, and only one that fails is met again.
        assert not line or line[-1].offset < offset  # noqa: S101
        line.append(place)
        if line[0] is place:
            self._is_first_now(place)
        return place

    def close(self) -> None:
        """The partition is given back: nobody who waits has a turn here any more."""
        self.closed = True
        for line in self._lines.values():
            for place in line:
                place.tracked.tell()

    def before(self, place: "Place") -> list["Place"]:
        """Those before a place, first come first."""
        line = self._lines[place.key]
        return line[: line.index(place)]

    def is_first(self, place: "Place") -> bool:
        """Whether nobody is before a place."""
        return place.offset in self._firsts

    def is_up(self, place: "Place") -> bool:
        """Whether a place is the first and has its share of the room."""
        return self._shares.has(place.offset)

    def leave(self, place: "Place") -> None:
        """A place is free."""
        line = self._lines[place.key]
        line.remove(place)
        if self._firsts.pop(place.offset, None):
            self._shares.leave(place.tracked.tenant, place.offset)
            if line:
                self._is_first_now(line[0])
            else:
                del self._lines[place.key]
            self._let_in()

    def _is_first_now(self, place: "Place") -> None:
        # Only firsts ask: whoever has a share waits for nobody who needs one.
        self._firsts[place.offset] = place
        self._shares.ask(place.tracked.tenant, place.offset)
        place.tracked.tell()
        self._let_in()

    def _let_in(self) -> None:
        while (offset := self._shares.next()) is not None:
            self._firsts[offset].tracked.tell()


@dataclass(slots=True, eq=False)
class Place:
    """One request's place in its conversation."""

    lines: Lines
    key: Hashable
    tracked: Tracked
    offset: int
    given_up: int
    """Attempts up to this one were nobody's any more when it was met: their owner is succeeded. One that is opened
    while the request waits is that of somebody who has succeeded us."""
    stands_aside: bool = False
    """It ends without a word: nobody is kept from anything by it."""

    def running(self) -> list["Place"]:
        """The earlier requests of the conversation that have not ended, as far as the log was read."""
        return [
            place
            for place in self.lines.before(self)
            if place.tracked.assembly.state.status is None and not place.stands_aside
        ]

    def when_met(self, if_busy: IfBusy) -> WhenBusy:
        """What the request does now, if it is not its turn."""
        # Who waits in any case does not look at a line that may be thousands long.
        busy = if_busy != "enqueue" and bool(self.running())
        return when_met(if_busy, self.tracked.assembly.state, busy)

    @property
    def is_up(self) -> bool:
        """Whether it is the first and has its share of the room, or nothing begins any more."""
        return self.lines.is_up(self) or self.lines.closed

    async def turn(self) -> None:
        """Wait until it may begin. Raises GivenBack: nothing begins any more."""
        await self.tracked.until(lambda: self.is_up)
        if self.lines.closed:
            raise GivenBack

    async def first(self) -> None:
        """Wait until every earlier request of the conversation is concluded. Raises GivenBack."""
        await self.tracked.until(lambda: self.lines.is_first(self) or self.lines.closed)
        if not self.lines.is_first(self):
            raise GivenBack

    def leave(self) -> None:
        """The request is concluded, or its owner gives up on it."""
        self.lines.leave(self)
