"""From a schedule that fails to the smallest part of it that still does: delta debugging on the list of faults.

The policy is a plain generator, so that it is tested with a predicate and driven by real runs. What a fault meets is
up to the machine, so a part that passed once may have been lucky: the result fails, but need not be the smallest.
"""

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")


def shrinking(items: Sequence[T]) -> Generator[list[T], bool, list[T]]:
    """Yields parts of `items`, is sent whether each still fails, and returns the smallest that did.

    Zeller and Hildebrandt's ddmin (2002), without the pass over single parts, which for a bug of several faults
    together is nearly always in vain: parts are left out, first halves, then ever smaller ones.
    """
    failing, parts = list(items), 2
    while len(failing) > 1:
        size = -(-len(failing) // parts)
        for at in range(0, len(failing), size):
            rest = failing[:at] + failing[at + size :]
            if rest and (yield rest):
                failing, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(failing), 2 * parts)
    return failing


async def shrink(
    items: Sequence[T], still_fails: Callable[[Sequence[T]], Awaitable[bool]], most: int
) -> tuple[list[T], int]:
    """The smallest failing part that at most so many runs find, and how many were made."""
    policy, smallest, runs = shrinking(items), list(items), 0
    try:
        candidate = next(policy)
        while runs < most:
            fails = await still_fails(candidate)
            runs += 1
            if fails:
                smallest = candidate
            candidate = policy.send(fails)
    except StopIteration:
        pass
    return smallest, runs
