"""A process that did not run for a while notices it, whoever looks first."""

from klatch_streams.stalls import Stalls


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_process_that_runs_has_no_stalls() -> None:
    clock = Clock()
    stalls = Stalls(clock=clock)
    for _ in range(40):
        clock.now_s += 0.25
        stalls.look()
        assert not stalls.lately


def test_who_asks_right_after_a_stall_hears_of_it_before_anybody_has_looked() -> None:
    clock = Clock()
    stalls = Stalls(longer_than_s=1.0, clock=clock)
    clock.now_s += 1.3
    assert stalls.lately


def test_a_stall_is_forgotten_after_a_while() -> None:
    clock = Clock()
    stalls = Stalls(lately_s=5.0, clock=clock)
    clock.now_s += 12.0
    stalls.look()
    for _ in range(19):
        clock.now_s += 0.25
        stalls.look()
    assert stalls.lately
    clock.now_s += 0.3
    assert not stalls.lately
