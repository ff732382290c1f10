"""Owners of the tenant's partition: effects, then the snapshot, then the offset, with a kill possible between any two.

The decisions are production's (`logs.Intake`). Where no owner of it is ever succeeded, the three are one step.
"""

from collections.abc import Iterator

from tests.model.logs import Admitted, Effect
from tests.model.world import AdmissionOwner, Bounds, Step, World


class Admissions:
    """The steps of owners of the tenant's partition."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds

    def steps(self, world: World) -> Iterator[Step]:
        """What any of them may do next."""
        for number, owner in enumerate(world.admission):
            current = number == len(world.admission) - 1
            alone = not self._bounds.admission_takeovers and self._bounds.concurrent is None
            for name, to in self._of(world, number, owner):
                yield Step(f"admission {number} {name}", to, current, alone)

    def successor(self, world: World) -> AdmissionOwner:
        """A new owner, who has restored."""
        return AdmissionOwner(world.admission_committed, world.admission_saved)

    def _of(self, world: World, number: int, owner: AdmissionOwner) -> Iterator[tuple[str, World]]:
        if owner.pending:
            one, *rest = owner.pending
            to = self._with(self._append(world, one), number, owner._replace(pending=tuple(rest)))
            yield "lands", to
            return
        if not self._bounds.admission_takeovers:
            if owner.at < world.requests.depth:
                yield "decides", self._all_at_once(world, owner)
            return
        if owner.at < world.requests.depth:
            yield "takes", self._with(world, number, self._take(world, owner))
        if owner.applied > world.admission_saved:
            yield "saves", world._replace(admission_saved=owner.applied)
        current = number == len(world.admission) - 1
        if current and world.admission_committed <= world.admission_saved < owner.at:
            yield "commits", world._replace(admission_committed=world.admission_saved + 1)

    def _take(self, world: World, owner: AdmissionOwner) -> AdmissionOwner:
        if owner.at <= owner.applied:
            return owner._replace(at=owner.at + 1)
        effects = world.requests.path[owner.at + 1].effects
        return owner._replace(at=owner.at + 1, applied=owner.at, pending=(*owner.pending, *effects))

    def _all_at_once(self, world: World, owner: AdmissionOwner) -> World:
        taken = self._take(world, owner)
        for effect in taken.pending:
            world = self._append(world, effect)
        return self._with(world, 0, taken._replace(pending=()))

    def _append(self, world: World, effect: Effect) -> World:
        if isinstance(effect, Admitted):
            return world._replace(admitted=(*world.admitted, effect))
        return world._replace(stream=world.stream.then(effect))

    def _with(self, world: World, number: int, owner: AdmissionOwner) -> World:
        owners = world.admission
        return world._replace(admission=(*owners[:number], owner, *owners[number + 1 :]))
