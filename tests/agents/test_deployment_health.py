"""The circuit breaker on a clock that the test moves."""

import pytest

from klatch_agents.gateway.health import LONGEST_ASKED_S, LONGEST_COOL_DOWN, PROBE_LOOK_S, Breaker
from klatch_schemas.events import CircuitBreaker

TERMS = CircuitBreaker(failures=3, cool_down_s=10)


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


def broken(clock: Clock, terms: CircuitBreaker = TERMS) -> Breaker:
    breaker = Breaker(terms, clock)
    for _ in range(terms.failures):
        assert breaker.cooling() == 0
        breaker.failed(probe=breaker.begin())
    return breaker


def test_failures_in_a_row_open_it_for_the_cool_down(clock: Clock) -> None:
    breaker = broken(clock)
    assert breaker.cooling() == 10
    clock.at += 4
    assert breaker.cooling() == 6


def test_a_call_that_came_to_its_end_in_between_starts_the_count_anew(clock: Clock) -> None:
    breaker = Breaker(TERMS, clock)
    for _ in range(3):
        for _ in range(2):
            breaker.failed(probe=breaker.begin())
        breaker.finished(probe=breaker.begin())
    assert breaker.cooling() == 0


def test_after_the_cool_down_one_call_probes_and_the_others_look_again_later(clock: Clock) -> None:
    breaker = broken(clock)
    clock.at += 10
    assert breaker.cooling() == 0
    assert (breaker.begin(), breaker.probed) == (True, True)
    assert breaker.cooling() == PROBE_LOOK_S


def test_a_cool_down_that_begins_beside_a_probe_is_waited_for_as_one(clock: Clock) -> None:
    breaker = broken(clock)
    assert not breaker.probed
    clock.at += 10
    assert breaker.begin()
    breaker.told_to_wait(3, probe=False)
    assert (breaker.cooling(), breaker.probed) == (3, False)
    clock.at += 3
    assert (breaker.cooling(), breaker.probed) == (PROBE_LOOK_S, True)


def test_a_probe_that_speaks_closes_it_and_the_next_failure_opens_it_again(clock: Clock) -> None:
    breaker = broken(clock)
    clock.at += 10
    breaker.spoke(probe=breaker.begin())
    assert breaker.cooling() == 0
    breaker.failed(probe=breaker.begin())
    assert breaker.cooling() == 10


def test_a_probe_that_ends_well_makes_all_well(clock: Clock) -> None:
    breaker = broken(clock)
    clock.at += 10
    breaker.finished(probe=breaker.begin())
    breaker.failed(probe=breaker.begin())
    assert breaker.cooling() == 0


def test_each_probe_that_fails_doubles_the_cool_down_up_to_a_bound(clock: Clock) -> None:
    breaker = broken(clock)
    waits = list[float]()
    for _ in range(6):
        waits.append(breaker.cooling())
        clock.at += breaker.cooling()
        breaker.failed(probe=breaker.begin())
    assert waits == [10, 20, 40, 80, 80, 80]
    assert waits[-1] == 10 * LONGEST_COOL_DOWN


def test_a_probe_whose_caller_leaves_lets_the_next_call_probe(clock: Clock) -> None:
    breaker = broken(clock)
    clock.at += 10
    breaker.left(probe=breaker.begin())
    assert breaker.cooling() == 0
    assert breaker.begin()


def test_failures_of_calls_that_began_before_it_opened_do_not_open_it_further(clock: Clock) -> None:
    breaker = broken(clock)
    for _ in range(5):
        breaker.failed(probe=False)
    assert breaker.cooling() == 10


def test_a_pause_that_the_server_asks_for_is_kept_and_is_no_failure(clock: Clock) -> None:
    breaker = Breaker(TERMS, clock)
    breaker.told_to_wait(4, probe=breaker.begin())
    breaker.told_to_wait(1, probe=breaker.begin())
    assert breaker.cooling() == 4
    clock.at += 4
    assert breaker.cooling() == 0
    assert not breaker.begin(), "nothing is broken, so nothing is probed"


def test_a_pause_of_more_than_an_hour_is_not_believed(clock: Clock) -> None:
    breaker = Breaker(TERMS, clock)
    breaker.told_to_wait(10 * LONGEST_ASKED_S, probe=breaker.begin())
    assert breaker.cooling() == LONGEST_ASKED_S == 3600


def test_without_a_limit_of_failures_it_never_opens(clock: Clock) -> None:
    breaker = Breaker(CircuitBreaker(failures=0), clock)
    for _ in range(50):
        breaker.failed(probe=breaker.begin())
    breaker.told_to_wait(9, probe=False)
    assert breaker.cooling() == 0
