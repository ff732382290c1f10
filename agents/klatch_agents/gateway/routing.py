"""Which deployment a request is tried on, and what follows when it fails: the policy of routes, apart from all I/O.

`choose_until_served` is a plain generator, as httpx's `auth_flow` is: it yields a `Try`, is sent the `Outcome`, and
returns when there is nothing left to try. It touches no clock, no network and no randomness: which of several equal
deployments is taken is a hash of the request and the try, and jitter is added by whoever carries it out
(`router.py`).

The order of preference: not cooling down; not failed for this request yet; the lower tier; one with a free place, else
the one that has one first; then by weight. What a server's own words allow decides what follows a failure (`judge`):
the same deployment again, after a pause; only another one; or none.

Where nothing may be called, a request waits, within limits of its own (`_Patience`) beside the route's `tries`:
`PATIENCE_S` in all for cool-downs, and `MOST_LOOKS` looks, a second each, whether a probe is over. Together that is
20 seconds, up to a fifth of a second of jitter with each wait, and the pauses between tries. What it waits for a place
is not counted and not known here: the caller's deadline ends that, or the caller, who leaves. A place that was had in
vain is no reason to give up; `MOST_UNMADE` of them are, so that it ends whatever breakers and places do to each other.
A route that changes meanwhile costs nothing: what it says by now is followed, and what failed before stays failed.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

from klatch_agents.gateway.continuing import Continues
from klatch_agents.gateway.errors import MalformedError, MisconfiguredError, ModelError, RefusedError
from klatch_schemas.events import Deployment, ModelRouted

PATIENCE_S = 10.0
"""The longest that a request waits, in all, for deployments that all cool down; if they need longer, it is refused at
once."""
MOST_LOOKS = 10
"""How often it looks whether another's probe is over. Cool-downs may have taken all of its patience by then, and what
they were waited for is a probe that goes well."""
MOST_UNMADE = 100
"""Tries that may end without a call. Each waits for as long as its deployment cools down, so many are only had where
that is next to nothing."""
BACK_OFF_S = 0.4
"""The first pause before a deployment is tried a second time; it doubles."""
_LOOK_S = 0.5
"""How soon who waits for a place looks for the first time whether something better has recovered; then it doubles."""
_CLOSE_S = 0.01
"""Clocks are not that exact."""
SPREAD_S = BACK_OFF_S / 2
"""Over how long those who wait for the same cool-down come back, and never over longer than they waited."""


@dataclass(frozen=True, slots=True)
class View:
    """What is known of deployments at one moment, by name."""

    cooling: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds until a deployment may be called; absent: now."""
    full: frozenset[str] = frozenset()
    """Those whose places are all taken."""
    probed: frozenset[str] = frozenset()
    """Of those that cool down: the ones that only wait for another call's probe."""


@dataclass(frozen=True, slots=True)
class Try:
    """Call this deployment, after at least `after` and at most `after + spread` seconds."""

    deployment: Deployment
    after: float = 0.0
    spread: float = 0.0
    twins: tuple[Deployment, ...] = ()
    """As good as it is: where its places are taken, the first that is free at any of them will do."""
    look_after: float | None = None
    """Who waits for a place for so many seconds chooses anew: something that is as good cools down only until then."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a `Try` went; `error` is None when it was not made, since the deployment began to cool down meanwhile, or
    `moved`: the route changed, or it was time to look. `routed` is the route in force by now, `called` the one that was
    called of a `Try` with twins, and `waited` the seconds since the `Try`."""

    error: ModelError | None
    view: View
    routed: ModelRouted
    called: str
    waited: float
    moved: bool = False


@dataclass(frozen=True, slots=True)
class NothingLeft:
    """Nothing can be tried (any more). `retry_after`: seconds until something might."""

    retry_after: float | None = None


Policy = Generator[Try, Outcome, NothingLeft]
Verdict = Literal["again", "elsewhere", "stop"]


def judge(error: ModelError) -> Verdict:
    """What may follow a failed call: the same deployment again, only another, or nothing."""
    if error.spoke or error.filtered:
        return "stop"  # a filtered prompt does not go shopping for a vendor that takes it
    match error:
        case RefusedError(status=401 | 402 | 403 | 404):
            return "elsewhere"  # this deployment's key, bill or name
        case MalformedError() | MisconfiguredError():
            return "elsewhere"
        case _:
            return "again" if error.retriable else "stop"


def is_servers_doing(error: ModelError) -> bool:
    """Whether a failure tells against the deployment, and not against the request."""
    return not error.filtered and (error.spoke or judge(error) != "stop")


def choose_until_served(
    routed: ModelRouted, seed: str, view: View, *, continuing: bool = False, avoid: frozenset[str] = frozenset()
) -> Policy:
    """Try deployments of a route until one serves; `continuing`: only those that can continue a partial message;
    `avoid`: rather not these."""
    failed, waits, barred = dict[str, int](), dict[str, float](), set[str]()
    patience, tries = _Patience(), 0
    while tries < routed.tries:
        able = [one for one in able_in(routed, continuing=continuing) if one.name not in barred]
        # A server that said when to come back is taken at its word, whether or not it is known to others.
        cooling = {one.name: max(view.cooling.get(one.name, 0.0), waits.get(one.name, 0.0)) for one in able}
        liked = {one.name: (failed.get(one.name, 0) + (one.name in avoid), one.tier) for one in able}
        if not (equal := _best(able, cooling, liked)):
            return NothingLeft()
        chosen = _weighted([one for one in equal if one.name not in view.full] or equal, f"{seed}/{tries}")
        cools, probed = cooling[chosen.name], chosen.name in view.probed and chosen.name not in waits
        if not patience.lasts(cools, probed=probed):
            return NothingLeft(cools or None)
        pause = BACK_OFF_S * 2 ** (failed[chosen.name] - 1) if chosen.name in failed else 0.0
        outcome = yield Try(
            chosen,
            cools + pause / 2,
            max(pause / 2, min(cools, SPREAD_S)),
            tuple(one for one in equal if one is not chosen),
            patience.looks_after([cooling[name] for name in liked if liked[name] <= liked[chosen.name]], cools),
        )
        view, before, routed = outcome.view, routed, outcome.routed
        waits = {name: left - outcome.waited for name, left in waits.items() if left > outcome.waited + _CLOSE_S}
        if outcome.error is None:
            patience.unmade -= 1
            if outcome.moved or routed != before:
                patience.give_back(cools - outcome.waited, probed=probed)
            continue
        tries += 1
        verdict = judge(outcome.error)
        if verdict == "stop":
            break
        if verdict == "elsewhere":
            barred.add(outcome.called)
        failed[outcome.called] = failed.get(outcome.called, 0) + 1
        if outcome.error.retry_after is not None:
            waits[outcome.called] = outcome.error.retry_after
    return NothingLeft()


def able_in(routed: ModelRouted, *, continuing: bool) -> list[Deployment]:
    """The deployments of a route that a call may go to at all; `continuing`: as for `choose_until_served`."""
    return [one for one in routed.deployments if one.weight and (not continuing or how_it_continues(one) != "none")]


def who_did_not_continue(routed: ModelRouted, error: ModelError, view: View) -> frozenset[str] | None:
    """Those that can continue an answer, none of which did, for this failure last: but others of the route might begin
    it anew, without a longer wait than a request puts up with; else None."""
    able = frozenset(one.name for one in able_in(routed, continuing=True))
    others = [one.name for one in able_in(routed, continuing=False) if one.name not in able]
    might = any(view.cooling.get(name, 0.0) <= PATIENCE_S for name in others)
    return able if might and judge(error) != "stop" else None


def how_it_continues(deployment: Deployment) -> Continues:
    """How a deployment goes on with an answer that broke off."""
    if deployment.continues is None:
        return "vllm" if deployment.kind == "vllm" else "none"
    return deployment.continues


@dataclass(slots=True)
class _Patience:
    """What a request still puts up with."""

    seconds: float = PATIENCE_S
    looks: int = MOST_LOOKS
    unmade: int = MOST_UNMADE
    looked: int = 0
    """How often it has chosen anew."""

    def lasts(self, cools: float, *, probed: bool) -> bool:
        """Spend what one more wait costs; returns whether there was as much."""
        if probed:
            self.looks -= 1
        else:
            self.seconds -= cools
        return self.seconds >= 0 and self.looks >= 0 and self.unmade > 0

    def give_back(self, left: float, *, probed: bool) -> None:
        """What it had spent on a try that ended for no reason of its own, `left` seconds before its wait was over."""
        self.looked += 1
        self.unmade += 1
        if probed:
            self.looks += 1
        else:
            self.seconds += max(0.0, left)

    def looks_after(self, as_good: Sequence[float], cools: float) -> float | None:
        """When to choose anew, by the cool-downs of all that are as good as one that has `cools` left."""
        longer = [left for left in as_good if left > cools]
        # Thousands may wait while another call's probe, which is looked at every second, is out for a minute.
        return max(min(longer), _LOOK_S * min(2**self.looked, MOST_LOOKS)) if longer else None


def _best(
    able: Sequence[Deployment], cooling: Mapping[str, float], liked: Mapping[str, tuple[int, int]]
) -> list[Deployment]:
    ranks = {one.name: (cooling[one.name], liked[one.name]) for one in able}
    best = min(ranks.values(), default=None)
    return [one for one in able if ranks[one.name] == best]


def _weighted(equal: Sequence[Deployment], seed: str) -> Deployment:
    total = sum(one.weight for one in equal)
    point = int.from_bytes(sha256(seed.encode()).digest()[:8]) / 2**64 * total
    for one in equal:
        point -= one.weight
        if point < 0:
            return one
    return equal[-1]
