"""Whether a deployment is worth a call just now: a circuit breaker, and the cool-down that a server asked for.

closed ── `failures` calls in a row failed ──► open ── cool-down over ──► half open: one call, the probe
   ▲                                               ▲                             │
   └────────────────── it said something ──────────┼─────────────────────────────┤
                                                   └─── it failed: twice as long ─┘

Knows no request and no server; the clock is given. A server's `Retry-After` cools a deployment down without
counting as a failure. A call that its caller leaves says nothing about health.
"""

from collections.abc import Callable

from klatch_schemas.events import CircuitBreaker

LONGEST_COOL_DOWN = 8
"""Doubled at most so far, as a multiple of the first cool-down."""
LONGEST_ASKED_S = 3600.0
"""The longest pause that a server is believed to need: a slip of its clock must not take it out for days."""
PROBE_LOOK_S = 1.0
"""How soon to look again while another call probes."""


class Breaker:
    """The health of one deployment, as seen from this process. Times are seconds of `now`."""

    def __init__(self, terms: CircuitBreaker, now: Callable[[], float]) -> None:
        self.terms = terms
        self._now = now
        self._failures = 0
        self._opened = 0
        """How many times it opened since it was last well: each doubles the cool-down."""
        self._until = 0.0
        self._probing = False

    @property
    def open(self) -> bool:
        """Whether it has failed so often that only a probe may try it."""
        return self._opened > 0

    @property
    def probed(self) -> bool:
        """Whether nothing but another call's probe is waited for."""
        return self._probing and self._until <= self._now()

    def cooling(self) -> float:
        """Seconds until a call may be made; 0 when one may be made now."""
        left = self._until - self._now()
        if left > 0:
            return left
        return PROBE_LOOK_S if self._probing else 0.0

    def begin(self) -> bool:
        """A call is about to be made; returns whether it is the probe, which has to be ended as one."""
        if self.open and not self._probing:
            self._probing = True
            return True
        return False

    def spoke(self, *, probe: bool) -> None:
        """The call's first token came."""
        if probe:
            # Closed, but not trusted yet: the next failure opens it again.
            self._probing = False
            self._opened, self._failures = 0, max(0, self.terms.failures - 1)

    def finished(self, *, probe: bool) -> None:
        """The call came to its end."""
        self.spoke(probe=probe)
        self._failures = 0

    def failed(self, *, probe: bool) -> None:
        """The call failed, and it was the server's doing."""
        self._failures += 1
        if probe:
            self._probing = False
        if self.terms.failures and (probe or (self._failures >= self.terms.failures and not self.open)):
            doubled = min(2**self._opened, LONGEST_COOL_DOWN)
            self._opened += 1
            self._wait(self.terms.cool_down_s * doubled)

    def told_to_wait(self, seconds: float, *, probe: bool) -> None:
        """The server asked for a pause; more than `LONGEST_ASKED_S` it does not get."""
        self.left(probe=probe)
        if self.terms.failures:
            self._wait(min(seconds, LONGEST_ASKED_S))

    def left(self, *, probe: bool) -> None:
        """The caller left, or was refused for its own doing: nothing was learnt."""
        if probe:
            self._probing = False

    def _wait(self, seconds: float) -> None:
        self._until = max(self._until, self._now() + seconds)
