"""Owners of the conversation's partition: what they take, read, write and save. What becomes of each request is in
`running.py`.

Each step is one that a kill, a zombie's pause or another process may stand before or behind. What is written is on
its way first, then stands in the log, then is read back.
"""

from collections.abc import Iterator

from tests.model.logs import Book, Place, Said
from tests.model.parts import Broken, Parts
from tests.model.running import Requests
from tests.model.strands import Strand
from tests.model.world import Bounds, Owner, Step, World

from klatch_schemas.assembly import Opened, Spoke

LONGEST = 60
"""Records of chat.stream: a log that grows further grows for ever."""


class Generation:
    """The steps of owners of the conversation's partition."""

    def __init__(self, bounds: Bounds, parts: Parts, book: Book) -> None:
        self._bounds, self._parts = bounds, parts
        self._requests = Requests(bounds, parts, book)

    def steps(self, world: World) -> Iterator[Step]:
        """What any of them may do next."""
        for number, owner in enumerate(world.generation):
            current = number == len(world.generation) - 1
            for step in self._of(world, number, owner):
                yield step._replace(name=f"owner {number} {step.name}", fair=step.fair and current)

    def successor(self, world: World) -> Owner:
        """A new owner, who has restored. Raises Broken if what it needs is not there."""
        saved = world.saved
        for offset, one in enumerate(world.admitted):
            first = world.stream.first[one.request]
            if offset >= saved.applied and one.kind == "admitted" and 0 <= first < saved.floor:
                raise Broken(f"the snapshot's floor {saved.floor} lies behind the stream of r{one.request} at {first}")
        return Owner(world.committed, world.stream, saved.seen, saved, saved.applied, saved.applied)

    def read_on(self, world: World) -> World:
        """The world once its owners have read what makes no difference to them: sooner or later is the same."""
        for number, owner in enumerate(world.generation):
            view = owner.view
            while view is not world.stream and self._is_idle_talk(number, owner, world.stream.at(view.depth + 1)):
                view = world.stream.at(view.depth + 1)
            if view is not owner.view:
                world = world.with_owner(number, owner._replace(view=view))
        return world

    def _is_idle_talk(self, number: int, owner: Owner, place: Place) -> bool:
        if place.request in owner.concluded:
            return True
        strand = place.strands[place.request]
        for one in owner.running:
            if one.request == place.request:
                if place.depth - 1 in {one.opened, one.ended}:
                    return False
                own = self._parts.writer(number, one.request, one.attempt)
                return strand.heard is None or (isinstance(strand.heard, Spoke) and strand.state.writer == own)
        return strand.heard is None

    def _of(self, world: World, number: int, owner: Owner) -> Iterator[Step]:
        if owner.view is not world.stream:
            to = owner._replace(view=world.stream.at(owner.view.depth + 1))
            yield Step("reads", world.with_owner(number, to))
        if owner.pending:
            over = world.stream.strands[owner.pending[0].request].state.settled
            yield Step("lands", self._land(world, number, owner), alone=over)
        if not self._nobody_restores(world):
            yield from self._checkpoint(world, number, owner)
        for one in owner.running:
            yield from self._requests.steps(world, number, one)
        if owner.at < len(world.admitted):
            yield Step("takes", world.with_owner(number, self._take(world, owner)))

    def _land(self, world: World, number: int, owner: Owner) -> World:
        said, *rest = owner.pending
        place = world.stream.then(said)
        if place.depth > LONGEST:
            raise Broken("the stream grows without end")
        self._check_order(world, said, place.strands[said.request])
        owner = owner._replace(pending=tuple(rest))
        one = next((one for one in owner.running if one.request == said.request), None)
        if one and said.kind == "opening" and not any(_is_like(said, other) for other in rest):
            owner = owner.with_running(one._replace(opened=place.depth - 1))
        elif one and said.kind == "end" and one.phase == "ending":
            owner = owner.with_running(one._replace(ended=place.depth - 1))
        return world._replace(stream=place).with_owner(number, owner)

    def _check_order(self, world: World, said: Said, strand: Strand) -> None:
        if not isinstance(strand.heard, Opened):
            return
        for earlier in world.admitted:
            if earlier.request == said.request:
                return
            if world.stream.strands[earlier.request].state.status is None:
                raise Broken(f"r{said.request} was opened before r{earlier.request} had ended")

    def _take(self, world: World, owner: Owner) -> Owner:
        one = world.admitted[owner.at]
        offset, owner = owner.at, owner._replace(at=owner.at + 1)
        repeated = offset < owner.done_before or one.cause <= owner.seen
        owner = owner._replace(seen=max(owner.seen, one.cause))
        if repeated or one.kind == "refused":
            return owner if self._nobody_restores(world) else _advanced(world, owner)
        running = self._requests.begin(owner, one.request, offset)
        return owner._replace(running=(*owner.running, running))

    # --- snapshots and commits

    def _nobody_restores(self, world: World) -> bool:
        return len(world.generation) > self._bounds.takeovers

    def _checkpoint(self, world: World, number: int, owner: Owner) -> Iterator[Step]:
        owner = _advanced(world, owner)
        saved = owner.saved._replace(applied=self._parts.may_commit(owner.saved.applied, owner.at))
        if saved.applied > owner.wrote:
            saved = saved._replace(floor=_floor(world, owner))
            to = world._replace(saved=max(world.saved, saved))
            yield Step("saves", to.with_owner(number, owner._replace(wrote=saved.applied)))
        current = number == len(world.generation) - 1
        if current and world.committed < saved.applied <= world.saved.applied:
            # The group refuses a zombie's commit, and nobody its snapshot.
            yield Step("commits", world._replace(committed=saved.applied))


def _advanced(world: World, owner: Owner) -> Owner:
    """The owner with what it may save: all before its first request under way is concluded."""
    applied = max(owner.saved.applied, min([owner.at, *(one.offset for one in owner.running)]))
    seen = max([owner.saved.seen, *(one.cause for one in world.admitted[:applied])])
    return owner._replace(saved=owner.saved._replace(applied=applied, seen=seen))


def _floor(world: World, owner: Owner) -> int:
    concluded = {one.request for one in world.admitted[: owner.saved.applied]}
    firsts = [first for request, first in enumerate(owner.view.first) if request not in concluded and first >= 0]
    return min([owner.view.depth, *firsts])


def _is_like(said: Said, other: Said) -> bool:
    return (said.request, said.kind) == (other.request, other.kind)
