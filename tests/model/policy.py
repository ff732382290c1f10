"""The production policy as an automaton: generators cannot be copied, so their states are found by running them.

A node stands for a state of `lifecycle`: two runs that have come to the same line with the same locals go on alike.
"""

from types import FrameType, GeneratorType
from typing import cast

from klatch_streams.generation import Command, Lifecycle, Report, lifecycle


class Node:
    """A state of the policy: what it commands (None: it has returned), and how it was reached the first time."""

    def __init__(self, command: Command | None, reports: tuple[Report, ...]) -> None:
        self.command, self.reports = command, reports


class Policies:
    """All states of the policy that were met."""

    def __init__(self) -> None:
        self._nodes: dict[object, Node] = {}
        self._next: dict[tuple[Node, Report], Node] = {}

    def start(self) -> Node:
        """The policy of a request that was just met."""
        return self._node(())

    def send(self, node: Node, report: Report) -> Node:
        """The state after a report."""
        found = self._next.get((node, report))
        if found is None:
            found = self._next[node, report] = self._node((*node.reports, report))
        return found

    def _node(self, reports: tuple[Report, ...]) -> Node:
        policy = lifecycle()
        command: Command | None = next(policy)
        for report in reports:
            try:
                command = policy.send(report)
            except StopIteration:
                command = None
        key = None if command is None else (command, _frames(policy))
        return self._nodes.setdefault(key, Node(command, reports))


def _frames(policy: Lifecycle) -> tuple[object, ...]:
    """Where a generator, and those that it delegates to, have come, and with what."""
    found: list[object] = []
    running: object = policy
    while isinstance(running, GeneratorType):
        frame = cast("FrameType", running.gi_frame)
        values = sorted((name, repr(value)) for name, value in frame.f_locals.items())
        found += [frame.f_code.co_qualname, frame.f_lasti, *values]
        running = cast("object", running.gi_yieldfrom)
    return tuple(found)
