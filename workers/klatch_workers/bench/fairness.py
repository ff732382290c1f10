"""What a tenant waits beside one that floods, in simulated time: `python -m klatch_workers.bench.fairness`.

The queue is the one that decides in production (`klatch_agents.gateway.fair`); calls, arrivals and the clock are
simulated, from a fixed seed, so a run takes seconds and a busy machine changes nothing. Beside it stands what first
come, first served makes of the same arrivals. A wait for a first token is the wait for a place and the model's own
time; so much the client sees.
"""

import heapq
import json
import random
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Protocol

from klatch_agents.gateway.fair import Claim, FairQueue, Turn

SOLO, FLOOD = "solo", "flood"
FLOODS = 100
"""The other tenant asks for so many times as much."""
FIRST_TOKEN_S, REST_S = 0.6, 1.4
"""Of a call: the median until its first token (log-normal), and the mean of what follows (exponential)."""


@dataclass(frozen=True, slots=True)
class Case:
    """Arrivals of the tenant who is looked at."""

    places: int
    load: float
    """Of what the places could do, the part that it asks for."""
    burst: int = 1
    """Calls that arrive together."""


CASES = (Case(8, 0.2), Case(8, 0.4), Case(32, 0.2), Case(32, 0.4), Case(32, 0.2, burst=64))


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds, 99th percentiles."""

    place: float
    first_token: float


@dataclass(frozen=True, slots=True)
class Found:
    """One case: alone, beside the flood, and beside it where who comes first is served first."""

    case: Case
    calls: int
    alone: Waits
    flooded: Waits
    first_come: Waits

    @property
    def ratio(self) -> float:
        """By how much the flood lengthens the wait for a first token."""
        return self.flooded.first_token / self.alone.first_token


class Queue(Protocol):
    """Hands out places."""

    def ask(self, claim: Claim, now: float) -> Turn: ...

    def give_back(self, claim: Claim, now: float) -> Turn: ...


class FirstCome:
    """A queue without fairness."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting = deque[Claim]()

    def ask(self, claim: Claim, now: float) -> Turn:  # noqa: ARG002 - time is nothing to it
        self._waiting.append(claim)
        return self._next()

    def give_back(self, claim: Claim, now: float) -> Turn:  # noqa: ARG002 - nor is who it was
        self._free += 1
        return self._next()

    def _next(self) -> Turn:
        granted = list[Claim]()
        while self._free and self._waiting:
            granted.append(self._waiting.popleft())
            self._free -= 1
        return Turn(tuple(granted))


def worst(seconds: float) -> float:
    """The largest ratio of all cases."""
    return max(find(case, seconds).ratio for case in CASES)


def find(case: Case, seconds: float) -> Found:
    """Simulate a case for so long."""
    per_s = case.load * case.places / _mean_call_s()
    solo = list(_arrivals(per_s, case.burst, seconds))
    # More of the flood than can ever be served in the time would only take memory.
    enough = 1.3 * seconds * case.places / _mean_call_s()
    flood = [at / (per_s * FLOODS) for at in range(int(min(per_s * FLOODS * seconds, enough)))]
    return Found(
        case,
        len(solo),
        _simulate(FairQueue(case.places), solo, []),
        _simulate(FairQueue(case.places), solo, flood),
        _simulate(FirstCome(case.places), solo, flood),
    )


def _mean_call_s() -> float:
    return FIRST_TOKEN_S * 1.133 + REST_S  # the mean of a log-normal with sigma 0.5 is e^(sigma²/2) of its median


def _arrivals(per_s: float, burst: int, seconds: float) -> Iterator[float]:
    chance, at = random.Random(7), 0.0  # noqa: S311 - a simulation
    while (at := at + chance.expovariate(per_s / burst)) < seconds:
        yield from [at] * burst


def _simulate(queue: Queue, solo: list[float], flood: list[float]) -> Waits:
    chance, numbers = random.Random(1), count()  # noqa: S311 - a simulation
    events = [(at, next(numbers), Claim(SOLO)) for at in solo] + [(at, next(numbers), Claim(FLOOD)) for at in flood]
    heapq.heapify(events)
    asked, holding = dict[Claim, float](), set[Claim]()
    places, first_tokens = list[float](), list[float]()
    while events:
        now, _, claim = heapq.heappop(events)
        if claim in holding:
            holding.discard(claim)
            turn = queue.give_back(claim, now)
        else:
            asked[claim] = now
            turn = queue.ask(claim, now)
        for granted in turn.granted:
            holding.add(granted)
            first_token = FIRST_TOKEN_S * chance.lognormvariate(0, 0.5)
            heapq.heappush(events, (now + first_token + chance.expovariate(1 / REST_S), next(numbers), granted))
            waited = now - asked.pop(granted)
            if granted.tenant == SOLO:
                places.append(waited)
                first_tokens.append(waited + first_token)
    return Waits(_p99(places), _p99(first_tokens))


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def main() -> None:
    """Print one JSON object a case; the argument is the simulated seconds."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2_000.0
    for case in CASES:
        found = find(case, seconds)
        sys.stdout.write(json.dumps({**asdict(found), "ratio": round(found.ratio, 2)}) + "\n")


if __name__ == "__main__":
    main()
