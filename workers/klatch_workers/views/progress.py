"""How far one partition has been taken since it was assigned, pure: which record is next, repeated, or comes too early.

Offsets only grow within a partition. A record that comes too early has a hole before it: either the log has none
there (retention, a transaction's marker), or what delivers lost one, and nothing after it may be counted.
"""

from typing import Literal


class Progress:
    """Of one partition, from the offset that was committed when it was assigned."""

    def __init__(self, committed: int) -> None:
        self.next = committed
        """The lowest offset that has not been taken."""
        self.committed = committed

    def place(self, offset: int) -> Literal["next", "repeated", "early"]:
        """Where a record stands."""
        if offset < self.next:
            return "repeated"
        return "next" if offset == self.next else "early"

    def take(self, offset: int) -> None:
        """What lies before `offset`, and the record there, has been dealt with."""
        self.next = offset + 1
