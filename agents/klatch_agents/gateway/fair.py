"""Whose turn it is when the places at a deployment are all taken: weighted fair queueing over tenants, pure.

Between tenants, start-time fair queueing. What a tenant uses is the time that its calls hold places, divided by its
weight: its tag. The lowest tag is served next, and virtual time follows what is served. So those who want places
share them by weight, whoever floods waits behind his own requests, and nothing is kept free that somebody wants. A
tenant that was quiet may catch up, by `rounds` calls a place, and no more.

Classes 0 to 9 (0 is first) order the requests of one tenant; a request that waits rises by one class every `age_s`
seconds, so that none starves. Between tenants a class is a head start, the time of one call against the next class:
a tenant borrows it from its own later share, so that urgency reorders and takes nothing from others for good. Age
counts for nothing there: who floods has the oldest requests.

Formulas: Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996; the head start is the warp of Duda, Cheriton,
"Borrowed-virtual-time scheduling", SOSP 1999. Knows no clock: the time, in seconds, is given with each call.
"""

import heapq
import math
from dataclasses import dataclass, field
from itertools import count

LEAST_WEIGHT = 1e-3

_SLOWLY = 0.05
"""By how much a call moves the mean once there were some."""

_SHORTEST_S = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A call that wants a place. Two claims are never equal."""

    tenant: str = ""
    weight: float = 1.0
    priority: int = 5
    expires: float | None = None
    """After this moment it is worth no place any more."""
    since: float | None = None
    """From when on it ages, wherever it waited since; None: from when it asks."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a change of the queue brings about: whose turn it is, and who came too late for it."""

    granted: tuple[Claim, ...] = ()
    shed: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True)
class FairTerms:
    """`rounds`: by how many calls a place a tenant may lag behind its share and catch up; `age_s`: see above."""

    rounds: float = 8.0
    age_s: float = 2.0


@dataclass(slots=True)
class _Tenant:
    tag: float = -math.inf
    waiting: list[tuple[float, int, Claim]] = field(default_factory=list[tuple[float, int, Claim]])
    """By class and time of arrival in one number: rank grows by one a class, and by one every `age_s`."""
    left: int = 0
    """At least so many of these do not wait any more."""


class FairQueue:
    """Places at one deployment, and who waits for them. `limit` None: there are always places."""

    def __init__(self, limit: int | None, terms: FairTerms = FairTerms()) -> None:
        self.limit = limit
        self._terms = terms
        self._tenants: dict[str, _Tenant] = {}
        self._holding: dict[Claim, tuple[float, float]] = {}
        """Since when a place is held, and what was charged for it beforehand."""
        self._waiting: dict[Claim, int] = {}
        """By their numbers in their lines."""
        self._backlogged: set[str] = set()
        self._virtual = 0.0
        self._usual_s = 1.0
        """How long a place is usually held: the mean of the first calls, then a running one. Until one is over it is
        the unit of time that tags are in."""
        self._over = 0
        self._numbers = count()

    @property
    def full(self) -> bool:
        """Whether a claim would have to wait."""
        return self.limit is not None and len(self._holding) >= self.limit

    @property
    def used(self) -> int:
        """Places held."""
        return len(self._holding)

    @property
    def waiting(self) -> int:
        """Claims that wait."""
        return len(self._waiting)

    def ask(self, claim: Claim, now: float) -> Turn:
        """Want a place; it may be granted at once."""
        tenant = self._tenants.setdefault(claim.tenant, _Tenant())
        if not tenant.waiting:
            credit = self._terms.rounds * (self.limit or 1) * self._usual_s / _weight(claim)
            tenant.tag = max(tenant.tag, self._virtual - credit)
        rank = claim.priority + (now if claim.since is None else claim.since) / self._terms.age_s
        number = self._waiting[claim] = next(self._numbers)
        heapq.heappush(tenant.waiting, (rank, number, claim))
        self._backlogged.add(claim.tenant)
        return self._next(now)

    def give_back(self, claim: Claim, now: float, *, used: bool = True) -> Turn:
        """The holder of a place is done with it. `used`: it made a call there; else it is charged nothing, and tells
        nothing of how long calls are."""
        since, charged = self._holding.pop(claim)
        held_s = 0.0
        if used:
            held_s = max(0.0, now - since)
            charged *= self._learn(held_s)
        self._tenants[claim.tenant].tag += (held_s - charged) / _weight(claim)
        return self._next(now)

    def withdraw(self, claim: Claim) -> None:
        """A claim that waits does so no longer."""
        if self._waiting.pop(claim, None) is None:
            return
        tenant = self._tenants[claim.tenant]
        tenant.left += 1
        if tenant.left > len(tenant.waiting) / 2:
            tenant.waiting = [entry for entry in tenant.waiting if self._waits(entry)]
            heapq.heapify(tenant.waiting)
            tenant.left = 0
        self._tidy(claim.tenant)

    def resize(self, limit: int | None, now: float) -> Turn:
        """There are more places now, or fewer; those that are held are held on."""
        self.limit = limit
        return self._next(now)

    def _learn(self, held_s: float) -> float:
        """A call is over; returns by how much that changed the unit of time."""
        factor = 1.0 if self._over else self._measure(held_s)
        self._over += 1
        self._usual_s += max(_SLOWLY, 1 / self._over) * (held_s - self._usual_s)
        return factor

    def _measure(self, first_s: float) -> float:
        """From calls to seconds, by the first call that is over: what was charged and credited so far was in calls."""
        factor = max(first_s, _SHORTEST_S) / self._usual_s
        for tenant in self._tenants.values():
            tenant.tag *= factor
        self._virtual *= factor
        self._holding = {claim: (since, charged * factor) for claim, (since, charged) in self._holding.items()}
        return factor

    def _next(self, now: float) -> Turn:
        granted, shed = list[Claim](), list[Claim]()
        while self._backlogged and not self.full:
            name = min(self._backlogged, key=self._score)
            tenant = self._tenants[name]
            _, _, claim = heapq.heappop(tenant.waiting)
            del self._waiting[claim]
            self._tidy(name)
            if claim.expires is not None and claim.expires <= now:
                shed.append(claim)
            else:
                self._grant(tenant, claim, now)
                granted.append(claim)
        return Turn(tuple(granted), tuple(shed))

    def _score(self, name: str) -> tuple[float, int]:
        tenant = self._tenants[name]
        _, number, head = tenant.waiting[0]
        return tenant.tag + head.priority * self._usual_s, number

    def _grant(self, tenant: _Tenant, claim: Claim, now: float) -> None:
        start = tenant.tag
        tenant.tag += self._usual_s / _weight(claim)
        self._holding[claim] = (now, self._usual_s)
        lowest = min((self._tenants[name].tag for name in self._backlogged), default=start)
        self._virtual = max(self._virtual, lowest)

    def _tidy(self, name: str) -> None:
        """Have a tenant's line begin with somebody who waits: those who withdrew are dropped when they get there."""
        waiting = self._tenants[name].waiting
        while waiting and not self._waits(waiting[0]):
            heapq.heappop(waiting)
        if not waiting:
            self._backlogged.discard(name)

    def _waits(self, entry: tuple[float, int, Claim]) -> bool:
        """Whether an entry of a line is that of somebody who waits: who comes back has a new one."""
        _, number, claim = entry
        return self._waiting.get(claim) == number


def _weight(claim: Claim) -> float:
    return max(claim.weight, LEAST_WEIGHT)
