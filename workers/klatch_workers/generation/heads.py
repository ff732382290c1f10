"""The last turn of every conversation of a partition, kept small: there may be millions, most of them silent for ever.

A head is an entry of one dict, its name as UTF-8 and two offsets in one number: less than 200 bytes for names of 36
characters (`docs/decisions/0004`). One whose turn the log holds no more serves nothing: `Aging` finds these, a few at
a time.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Final, NamedTuple

_BITS: Final = 64
_OFFSET: Final = (1 << _BITS) - 1


class Head(NamedTuple):
    """A conversation's last turn."""

    offset: int
    applied: int
    """Offset of its request on chat.admitted: in a conversation it only grows."""


class Heads:
    """Heads by `conversation_key`."""

    def __init__(self) -> None:
        self._packed = dict[bytes, int]()

    def __len__(self) -> int:
        return len(self._packed)

    def names(self) -> list[bytes]:
        """The keys as they are held."""
        return list(self._packed)

    def get(self, key: str) -> Head | None:
        """A conversation's head, if it has one."""
        packed = self._packed.get(_name(key))
        return None if packed is None else Head(packed & _OFFSET, packed >> _BITS)

    def put(self, key: str, head: Head) -> None:
        """A conversation's last turn is another one."""
        self._packed[_name(key)] = head.applied << _BITS | head.offset

    def forget(self, key: str) -> None:
        """A conversation has no last turn any more."""
        self._packed.pop(_name(key), None)


class Aging:
    """Goes through heads for those whose turns the log has given up, in steps that hold nobody up."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._first = 0
        self._left: Iterator[bytes] = iter(())

    def begin(self, first: int) -> None:
        """The log's first turn is now at `first`."""
        if first > self._first:
            self._first = first
            # A copy: heads come and go meanwhile. Those that come are younger.
            self._left = iter(self._heads.names())

    def step(self, before: int, most: int) -> list[tuple[str, Head]]:
        """Look at the next `most` heads for aged ones, whose requests stood before that offset on chat.admitted."""
        aged = list[tuple[str, Head]]()
        for name in islice(self._left, most):
            key = name.decode("utf-8", "surrogatepass")
            head = self._heads.get(key)
            if head and head.offset < self._first and head.applied < before:
                aged.append((key, head))
        return aged


def _name(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")
