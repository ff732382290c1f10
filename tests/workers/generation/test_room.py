"""Tenants share the room of a partition: none takes so much of it that nothing is left for one more."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from klatch_workers.generation.shares import Shares


def let_in(shares: Shares) -> list[int]:
    """All for whom there is room now."""
    offsets = list[int]()
    while (offset := shares.next()) is not None:
        offsets.append(offset)
    return offsets


def test_a_tenant_that_floods_leaves_room_for_whoever_comes_behind_it() -> None:
    shares = Shares(room=9)
    for offset in range(50):
        shares.ask("flood", offset)
    assert let_in(shares) == [0, 1, 2, 3, 4]
    for offset in range(50, 100):
        shares.ask("another flood", offset)
    assert let_in(shares) == [50, 51]
    shares.ask("one question", 100)
    shares.ask("another question", 101)
    assert let_in(shares) == [100, 101]


def test_room_that_is_given_back_goes_to_who_has_least_and_each_tenant_is_served_in_order() -> None:
    shares = Shares(room=4)
    tenants = ["a", "a", "a", "b", "b", "a"]
    # In whatever order they come to ask: of one conversation the second asks when the first has left.
    for offset in (5, 4, 3, 2, 1, 0):
        shares.ask(tenants[offset], offset)
    assert let_in(shares) == [0, 3, 1]
    shares.leave("a", 0)
    assert let_in(shares) == [2], "both have one, and 2 is older than 4"
    shares.leave("a", 1)
    assert let_in(shares) == [4], "both have one, and 4 is older than 5"


def test_who_leaves_while_it_waits_keeps_nobody_from_a_share() -> None:
    shares = Shares(room=2)
    for offset in range(3):
        shares.ask("a", offset)
    assert let_in(shares) == [0]
    shares.leave("a", 1)
    assert let_in(shares) == []
    shares.leave("a", 0)
    assert let_in(shares) == [2]
    assert [shares.has(offset) for offset in range(3)] == [False, False, True]


@settings(max_examples=100, deadline=None)
@given(
    tenants=st.lists(st.sampled_from("abcd"), max_size=40),
    room=st.integers(1, 8),
    order=st.randoms(use_true_random=False),
)
def test_nobody_who_has_nothing_under_way_waits_while_there_is_room_and_all_are_served_in_order(
    tenants: list[str], room: int, order: Random
) -> None:
    shares, running, begun = Shares(room), set[int](), list[int]()
    waiting = set(range(len(tenants)))
    for offset in waiting:
        shares.ask(tenants[offset], offset)
    while waiting or running:
        came = let_in(shares)
        begun += came
        running |= set(came)
        waiting -= set(came)
        assert 0 < len(running) <= room
        starved = {tenants[offset] for offset in waiting} - {tenants[offset] for offset in running}
        assert not starved or len(running) == room
        # One that waits may leave as well as one that is under way.
        leaving = order.choice(sorted(running | waiting))
        shares.leave(tenants[leaving], leaving)
        running.discard(leaving)
        waiting.discard(leaving)
    for tenant in "abcd":
        served = [offset for offset in begun if tenants[offset] == tenant]
        assert served == sorted(served)
