"""Visits every state of the small model within its bounds, and looks for one in which a promise is broken.

Promises about what has happened are checked where it happens (`strands`, `logs`, `generation`); that everything can
still come to its end is checked here, on the whole graph: from every state a way without faults, without clients and
without the help of zombies leads to a state in which every request is concluded.
"""

import gc
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.model.admission import Admissions
from tests.model.generation import Generation
from tests.model.logs import Book, Intake, Place, cancelled
from tests.model.parts import Broken, Parts, Saved
from tests.model.world import AdmissionOwner, Bounds, Owner, Step, World


@dataclass
class Explored:
    """What was visited."""

    states: int = 0
    steps: int = 0
    interleavings: int = 0
    """Different ways from the first state to one in which nothing more can happen."""
    streams: int = 0
    """Different streams of a request."""
    readers: int = 0
    """Readers, live, late and resumed, that were compared."""
    outcomes: dict[str, int] = field(default_factory=dict[str, int])
    """Last states by how their requests ended."""
    superseded: int = 0
    """Last states in which a text was superseded."""

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.states:,} states, {self.steps:,} steps, {self.interleavings:.3g} interleavings; "
            f"{self.streams:,} streams, {self.readers:,} readers; ended: {ends}"
        )


def explore(bounds: Bounds, parts: Parts | None = None) -> Explored:
    """Visit all states. Raises Broken, with the steps that lead there."""
    # Millions of tuples are made, none of them garbage: looking for it takes a third of the time.
    was_on = gc.isenabled()
    gc.disable()
    try:
        return _Search(bounds, parts or Parts()).run()
    finally:
        if was_on:
            gc.enable()


class _Search:
    def __init__(self, bounds: Bounds, parts: Parts) -> None:
        self._bounds, self._book = bounds, Book()
        self._generation = Generation(bounds, parts, self._book)
        self._admissions = Admissions(bounds)
        requests = Intake(None, None, self._book)
        if bounds.concurrent is not None:
            requests = requests.limit(bounds.concurrent)
        stream = Place.empty(bounds.requests, parts)
        owner = Owner(0, stream, -1, Saved(), 0, 0)
        first = World(requests, (), stream, (AdmissionOwner(0, -1),), (owner,))
        self._worlds = [first]
        self._numbers = {first: 0}
        self._came_from = array("l", [-1])
        self._next: list[array[int]] = []
        """Of each state, the numbers of the next ones: twice the number, and one more if the step is fair."""

    def run(self) -> Explored:
        number = 0
        stack = [0]
        self._next.append(array("l"))
        while stack:
            number = stack.pop()
            try:
                for step in self._first_of(list(self._steps(self._worlds[number]))):
                    to = self._number(self._generation.read_on(step.to), number, stack)
                    self._next[number].append(2 * to + (step.fair or step.alone))
            except Broken as error:
                raise Broken(f"{error}\n{self._way_to(number)}") from error
        self._check_ends()
        return self._summary()

    def _number(self, world: World, came_from: int, stack: list[int]) -> int:
        found = self._numbers.setdefault(world, len(self._worlds))
        if found == len(self._worlds):
            self._worlds.append(world)
            self._came_from.append(came_from)
            self._next.append(array("l"))
            stack.append(found)
        return found

    def _first_of(self, steps: list[Step]) -> list[Step]:
        alone = next((step for step in steps if step.alone), None)
        return steps if alone is None else [alone]

    # --- steps

    def _steps(self, world: World) -> Iterator[Step]:
        yield from self._admissions.steps(world)
        yield from self._generation.steps(world)
        yield from self._clients(world)
        yield from self._faults(world)

    def _clients(self, world: World) -> Iterator[Step]:
        bounds, published = self._bounds, world.requests.published
        for request in range(bounds.requests):
            if request not in published:
                yield Step(
                    f"r{request} is published", world._replace(requests=world.requests.publish(request)), fair=False
                )
                continue
            if world.repeats < bounds.repeats:
                to = world._replace(requests=world.requests.publish(request), repeats=world.repeats + 1)
                yield Step(f"r{request} is published again", to, fair=False)
            if world.cancels < bounds.cancels:
                yield Step(f"r{request} is cancelled", self._cancel(world, request), fair=False)

    def _cancel(self, world: World, request: int) -> World:
        said = cancelled(self._book, request, "user")
        return world._replace(stream=world.stream.then(said), cancels=world.cancels + 1)

    def _faults(self, world: World) -> Iterator[Step]:
        bounds = self._bounds
        if len(world.generation) <= bounds.takeovers and world.requests.published:
            yield Step("generation is taken over", self._take_over(world), fair=False)
        if len(world.admission) <= bounds.admission_takeovers and world.requests.published:
            admission = (*world.admission, self._admissions.successor(world))
            yield Step("admission is taken over", world._replace(admission=admission), fair=False)
        if bounds.deadlines and not world.expired and world.requests.published:
            yield Step("the deadline passes", world._replace(expired=True), fair=False)

    def _take_over(self, world: World) -> World:
        owners = (*world.generation, self._generation.successor(world))
        if len(owners) > self._bounds.takeovers:
            # The last one: nobody is going to restore what is saved from now on.
            owners = tuple(owner._replace(saved=Saved(), wrote=0) for owner in owners)
            world = world._replace(saved=Saved(), committed=0)
        return world._replace(generation=owners)

    # --- ends

    def _check_ends(self) -> None:
        before: list[array[int]] = [array("l") for _ in self._worlds]
        for number, after in enumerate(self._next):
            for coded in after:
                if coded & 1:
                    before[coded >> 1].append(number)
        stack = [number for number, world in enumerate(self._worlds) if _at_rest(world)]
        ends = set(stack)
        while stack:
            for number in before[stack.pop()]:
                if number not in ends:
                    ends.add(number)
                    stack.append(number)
        for number in range(len(self._worlds)):
            if number not in ends:
                raise Broken(f"a request cannot come to its end any more\n{self._way_to(number)}")

    def _summary(self) -> Explored:
        explored = Explored(len(self._worlds), sum(map(len, self._next)), self._interleavings())
        for number, world in enumerate(self._worlds):
            if not self._next[number]:
                ends = " ".join(str(strand.state.status) for strand in world.stream.strands)
                explored.outcomes[ends] = explored.outcomes.get(ends, 0) + 1
                explored.superseded += any(strand.state.attempt > 1 for strand in world.stream.strands)
        strands = {strand for world in self._worlds for strand in world.stream.strands}
        explored.streams, explored.readers = len(strands), sum(strand.readers_checked for strand in strands)
        return explored

    def _interleavings(self) -> int:
        """Ways through the graph, counted from its ends. Raises Broken where it runs in a circle."""
        waits_for = [len(after) for after in self._next]
        before: list[array[int]] = [array("l") for _ in self._worlds]
        for number, after in enumerate(self._next):
            for coded in after:
                before[coded >> 1].append(number)
        ways = [0 if after else 1 for after in self._next]
        stack = [number for number, count in enumerate(waits_for) if not count]
        done = 0
        while stack:
            done += 1
            number = stack.pop()
            for other in before[number]:
                ways[other] += ways[number]
                waits_for[other] -= 1
                if not waits_for[other]:
                    stack.append(other)
        if done < len(self._worlds):
            raise Broken("the world can run in a circle for ever")
        return ways[0]

    def _way_to(self, number: int) -> str:
        names = list[str]()
        while (before := self._came_from[number]) >= 0:
            steps = self._steps(self._worlds[before])
            to = self._worlds[number]
            names.append(next((step.name for step in steps if self._generation.read_on(step.to) == to), "?"))
            number = before
        return "\n".join(f"  {name}" for name in names[:_SHOWN][::-1])


_SHOWN = 100
"""Steps of a way that are told: the last ones."""


def _at_rest(world: World) -> bool:
    """Whether all that was asked is concluded, and known to be."""
    owner, admission = world.generation[-1], world.admission[-1]
    return (
        all(world.stream.strands[request].state.settled for request in world.requests.published)
        and not world.requests.ledger.held
        and not owner.running
        and not owner.pending
        and owner.at == len(world.admitted)
        and admission.at == world.requests.depth
        and not admission.pending
    )
