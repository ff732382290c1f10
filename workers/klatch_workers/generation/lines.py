"""The conversations of one partition as lines of requests: one speaks at a time, in the order of admission.

Every request that was met has its place until it is concluded. Those behind the first wait, and can be ended while
they wait, for nobody needs their turn: only what said something has to be remembered in order.
"""

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field

from klatch_streams.keyed_owner import GivenBack
from klatch_workers.generation.table import Tracked


class Lines:
    """All lines of a partition."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, list[Place]] = {}
        self.closed = False

    def join(self, tracked: Tracked, conversation: str, offset: int) -> "Place":
        """Take the next place in the line of a conversation; the offset is the request's on `chat.admitted`."""
        key = (tracked.tenant, conversation)
        line = self._lines.setdefault(key, [])
        place = Place(self, key, tracked, offset)
        # An owner meets them in this order, and only one that fails is met again.
        assert not line or line[-1].offset < offset  # noqa: S101
        line.append(place)
        return place

    def close(self) -> None:
        """The partition is given back: nobody who waits has a turn here any more."""
        self.closed = True
        for line in self._lines.values():
            for place in line:
                place.news.set()

    def before(self, place: "Place") -> list["Place"]:
        """Those before a place, first come first."""
        line = self._lines[place.key]
        return line[: line.index(place)]

    async def first(self, place: "Place") -> None:
        """Wait until nobody is before a place. Raises GivenBack."""
        while self._lines[place.key][0] is not place:
            if self.closed:
                raise GivenBack
            place.news.clear()
            await place.news.wait()

    def leave(self, place: "Place") -> None:
        """A place is free."""
        line = self._lines[place.key]
        line.remove(place)
        if line:
            line[0].news.set()
        else:
            del self._lines[place.key]


@dataclass(slots=True, eq=False)
class Place:
    """One request's place in its conversation."""

    lines: Lines
    key: Hashable
    tracked: Tracked
    offset: int
    stands_aside: bool = False
    """It ends without a word: nobody is kept from anything by it."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def running(self) -> list["Place"]:
        """The earlier requests of the conversation that have not ended, as far as the log was read."""
        return [
            place
            for place in self.lines.before(self)
            if place.tracked.assembly.state.status is None and not place.stands_aside
        ]

    async def turn(self) -> None:
        """Wait until it is the first, to begin. Raises GivenBack: nothing begins any more."""
        await self.lines.first(self)
        if self.lines.closed:
            raise GivenBack

    async def first(self) -> None:
        """Wait until every earlier request of the conversation is concluded. Raises GivenBack."""
        await self.lines.first(self)

    def leave(self) -> None:
        """The request is concluded, or its owner gives up on it."""
        self.lines.leave(self)
