"""Fair shares as laws: of weights, of work conserved, of nobody starving, and of places that come back."""
# pyright: reportPrivateUsage=false
# How long a line is, with those who have left it, is seen only inside.

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klatch_agents.gateway.fair import Claim, FairQueue, FairTerms, Turn


@dataclass
class Server:
    """Places at a model, calls that take as long as their tenant's do, and who was served when."""

    queue: FairQueue
    service_s: Callable[[str], float] = lambda _: 1.0
    now: float = 0.0
    running: list[tuple[float, int, Claim]] = field(default_factory=list[tuple[float, int, Claim]])
    served: list[Claim] = field(default_factory=list[Claim])
    shed: list[Claim] = field(default_factory=list[Claim])
    used_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def ask(self, claim: Claim) -> None:
        self._begin(self.queue.ask(claim, self.now))

    def step(self) -> Claim:
        """Let the next call end."""
        self.running.sort(key=lambda one: one[:2])
        self.now, _, done = self.running.pop(0)
        self._begin(self.queue.give_back(done, self.now))
        return done

    def _begin(self, turn: Turn) -> None:
        self.shed += turn.shed
        for claim in turn.granted:
            service = self.service_s(claim.tenant)
            self.used_s[claim.tenant] += service
            self.served.append(claim)
            self.running.append((self.now + service, len(self.served), claim))


def backlogged(server: Server, claims: dict[str, Claim], steps: int) -> None:
    """Every tenant always has work waiting."""
    for claim in claims.values():
        for _ in range(40):
            server.ask(Claim(claim.tenant, claim.weight, claim.priority))
    for step in range(steps):
        if step == steps // 2:  # by then nobody has anything left to catch up with
            server.used_s.clear()
        done = server.step()
        server.ask(Claim(done.tenant, claims[done.tenant].weight, claims[done.tenant].priority))


tenants = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2)


@settings(max_examples=15, deadline=None)
@given(tenants, st.integers(1, 8), st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0])))
def test_tenants_who_all_want_more_share_the_time_of_places_by_weight(
    weights: dict[str, float], limit: int, service: dict[str, float]
) -> None:
    server = Server(FairQueue(limit), lambda tenant: service.get(tenant, 1.0))
    backlogged(server, {tenant: Claim(tenant, weight) for tenant, weight in weights.items()}, 2_500)
    total, whole = sum(server.used_s.values()), sum(weights.values())
    for tenant, weight in weights.items():
        assert server.used_s[tenant] / total == pytest.approx(weight / whole, abs=0.06)


def test_shares_are_by_weight_whatever_classes_tenants_give_themselves() -> None:
    server = Server(FairQueue(4))
    backlogged(server, {"urgent": Claim("urgent", 1.0, 0), "patient": Claim("patient", 1.0, 9)}, 2_000)
    assert server.used_s["urgent"] / server.used_s["patient"] == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("service_s", "in_vain"), [(0.02, 0), (1.0, 0), (60.0, 0), (0.02, 5)])
def test_shares_are_by_weight_from_the_first_calls_on_however_long_calls_are(service_s: float, in_vain: int) -> None:
    server = Server(FairQueue(4), lambda _: service_s)
    for _ in range(in_vain):
        claim = Claim("light")
        server.queue.ask(claim, 0.0)
        server.queue.give_back(claim, 0.0, used=False)
    for _ in range(300):
        server.ask(Claim("light", 1.0))
        server.ask(Claim("heavy", 4.0))
    for _ in range(200):
        server.step()
    heavy = sum(claim.tenant == "heavy" for claim in server.served[:200])
    assert heavy / 200 == pytest.approx(0.8, abs=0.15), "both may catch up by 32 calls, which are not the same share"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_place_is_free_while_somebody_waits_and_no_place_is_given_twice(data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 4))
    queue, now = FairQueue(limit), 0.0
    waiting, holding = list[Claim](), list[Claim]()

    def take(turn: Turn) -> None:
        for claim in (*turn.granted, *turn.shed):
            waiting.remove(claim)
        holding.extend(turn.granted)

    for _ in range(data.draw(st.integers(1, 60))):
        now += data.draw(st.sampled_from([0.0, 0.1, 3.0]))
        match data.draw(st.sampled_from(["ask", "ask", "leave", "come again", "give back", "resize"])):
            case "ask":
                expires = data.draw(st.sampled_from([None, None, now + 1]))
                claim = Claim(data.draw(st.sampled_from("abc")), 1.0, data.draw(st.integers(0, 9)), expires)
                waiting.append(claim)
                take(queue.ask(claim, now))
            case "leave" if waiting:
                queue.withdraw(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
            case "come again" if waiting:
                claim = waiting[data.draw(st.integers(0, len(waiting) - 1))]
                queue.withdraw(claim)
                take(queue.ask(claim, now))
            case "give back" if holding:
                take(queue.give_back(holding.pop(data.draw(st.integers(0, len(holding) - 1))), now))
            case "resize":
                limit = data.draw(st.integers(1, 4))
                take(queue.resize(limit, now))
            case _:
                pass
        assert (queue.used, queue.waiting) == (len(holding), len(waiting))
        assert len(holding) >= limit or not waiting
    while holding:
        take(queue.give_back(holding.pop(), now))
    assert not waiting, "everybody's turn came, or went"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9), st.sampled_from([0.1, 1.0]), st.integers(1, 4))
def test_nobody_starves_beside_a_flood_that_never_ends(priority: int, weight: float, limit: int) -> None:
    server, patient = Server(FairQueue(limit)), Claim("patient", weight, priority)
    flood = {"flood": Claim("flood", 4.0, 0)}
    backlogged(server, flood, 100)
    server.ask(patient)
    for _ in range(400):
        server.step()
        server.ask(Claim("flood", 4.0, 0))
    assert patient in server.served


def test_in_a_tenant_the_lower_class_comes_first_and_age_raises() -> None:
    queue = FairQueue(1, FairTerms(age_s=2.0))
    held = Claim("a")
    queue.ask(held, 0.0)
    old, young = Claim("a", 1.0, 7), Claim("a", 1.0, 5)
    queue.ask(old, 0.0)
    queue.ask(young, 1.0)
    assert queue.give_back(held, 1.0).granted == (young,)
    late = Claim("a", 1.0, 5)
    queue.ask(late, 5.0)
    assert queue.give_back(young, 5.0).granted == (old,), (
        "two classes behind, it waited longer than two classes are worth"
    )


def test_who_comes_and_goes_leaves_nothing_behind_one_that_stays() -> None:
    """As claims at several queues do, of which another one serves them."""
    queue = FairQueue(1)
    held, stays = Claim("a"), Claim("a", priority=0)
    queue.ask(held, 0.0)
    queue.ask(stays, 0.0)
    passing = [Claim("a") for _ in range(100)]
    for _ in range(20):
        for claim in passing:
            queue.ask(claim, 1.0)
        for claim in passing:
            queue.withdraw(claim)
    assert len(queue._tenants["a"].waiting) < 2 * len(passing)
    queue.ask(passing[0], 2.0)
    assert queue.give_back(held, 3.0).granted == (stays,)
    assert queue.give_back(stays, 3.0).granted == (passing[0],)
    assert queue.give_back(passing[0], 3.0).granted == ()


def test_who_waited_elsewhere_is_as_old_as_that() -> None:
    queue = FairQueue(1, FairTerms(age_s=2.0))
    held, young, old = Claim("a"), Claim("a", 1.0, 5), Claim("a", 1.0, 7, since=0.0)
    for claim in (held, young, old):
        queue.ask(claim, 5.0)
    assert queue.give_back(held, 5.0).granted == (old,)


def test_between_tenants_a_class_is_a_head_start() -> None:
    queue = FairQueue(1)
    held = Claim("c")
    queue.ask(held, 0.0)
    patient, urgent = Claim("a", 1.0, 6), Claim("b", 1.0, 1)
    queue.ask(patient, 0.0)
    queue.ask(urgent, 0.0)
    assert queue.give_back(held, 1.0).granted == (urgent,)


@pytest.mark.parametrize("in_vain", [0, 100])
def test_places_that_were_had_in_vain_cost_nothing_and_make_no_call_seem_short(in_vain: int) -> None:
    """`light` has used less than `busy`, which is remembered for as long as a few calls take."""
    queue, now = FairQueue(1), 0.0
    for tenant in ("light", "busy", "busy", "busy", "busy"):
        claim = Claim(tenant)
        queue.ask(claim, now)
        now += 20
        queue.give_back(claim, now)
    for _ in range(in_vain):
        claim = Claim("light")
        queue.ask(claim, now)
        queue.give_back(claim, now + 0.01, used=False)
    held, first, second = Claim("c"), Claim("busy"), Claim("light")
    for claim in (held, first, second):
        queue.ask(claim, now)
    assert queue.give_back(held, now + 20).granted == (second,)


def test_who_was_quiet_may_catch_up_but_not_for_ever() -> None:
    server = Server(FairQueue(2, FairTerms(rounds=3)))
    backlogged(server, {"flood": Claim("flood")}, 200)
    asked = len(server.served)
    for _ in range(40):
        server.ask(Claim("quiet"))
    for _ in range(40):
        server.step()
        server.ask(Claim("flood"))
    names = [claim.tenant for claim in server.served[asked:]]
    assert names[:6] == ["quiet"] * 6
    assert 10 <= names[10:].count("quiet") <= 20


def test_what_came_too_late_is_shed_and_costs_nobody_a_place() -> None:
    queue = FairQueue(1)
    held, late, next_one = Claim("a"), Claim("a", expires=5.0), Claim("a")
    for claim in (held, late, next_one):
        queue.ask(claim, 0.0)
    assert queue.give_back(held, 6.0) == Turn(granted=(next_one,), shed=(late,))


def test_without_a_limit_nobody_waits() -> None:
    queue = FairQueue(None)
    claims = [Claim("a") for _ in range(100)]
    assert all(queue.ask(claim, 0.0).granted == (claim,) for claim in claims)
    assert not queue.full
