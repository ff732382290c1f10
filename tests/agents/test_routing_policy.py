"""The policy of routes as a table: what was tried, what it said, and what follows. No network, no clock."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klatch_agents.gateway.errors import (
    ConnectError,
    ErrorBody,
    ExpiredError,
    MalformedError,
    MisconfiguredError,
    ModelError,
    RefusedError,
    StalledError,
    StreamError,
    TruncatedError,
    UnroutableError,
)
from klatch_agents.gateway.routing import (
    MOST_LOOKS,
    MOST_UNMADE,
    PATIENCE_S,
    SPREAD_S,
    NothingLeft,
    Outcome,
    Try,
    View,
    choose_until_served,
    is_servers_doing,
    who_did_not_continue,
)
from klatch_schemas.events import Deployment, ModelRouted

CALM = View()


def route(*deployments: Deployment, tries: int = 3) -> ModelRouted:
    return ModelRouted(alias="m", deployments=deployments, tries=tries)


def one(name: str, **fields: Any) -> Deployment:
    return Deployment(name=name, url=f"http://{name}/v1", **fields)


def refused(status: int, code: str | None = None, retry_after: float | None = None) -> RefusedError:
    return RefusedError(status, ErrorBody("no", code=code), retry_after=retry_after)


def event(code: str | None = None, *, spoke: bool = False) -> StreamError:
    """An error event, or a 200 that is an error."""
    return StreamError(ErrorBody("no", code=code), spoke=spoke)


@dataclass
class Told:
    """What a policy did when every try ended as told."""

    tried: list[str] = field(default_factory=list[str])
    steps: list[Try] = field(default_factory=list[Try])
    left: NothingLeft = NothingLeft()


def play(routed: ModelRouted, *errors: ModelError | None, view: View = CALM, seed: str = "r1", **how: Any) -> Told:
    """Fail every try with the next of `errors`, the last one again and again."""
    policy = choose_until_served(routed, seed, view, **how)
    told, outcomes = Told(), iter(errors)
    error = None
    try:
        step = next(policy)
        while len(told.tried) < 1_000:
            told.tried.append(step.deployment.name)
            told.steps.append(step)
            error = next(outcomes, error)
            step = policy.send(Outcome(error, view, routed, step.deployment.name, step.after))
    except StopIteration as over:
        told.left = over.value
    return told


DOWN, HALF = ConnectError("down"), StalledError("silent")
A_B = route(one("a"), one("b", tier=1))
ALONE = route(one("a"))


@pytest.mark.parametrize(
    ("error", "tried"),
    [
        (DOWN, ["a", "b", "a"]),
        (HALF, ["a", "b", "a"]),
        (TruncatedError("cut"), ["a", "b", "a"]),
        (refused(500), ["a", "b", "a"]),
        (refused(429), ["a", "b", "a"]),
        (refused(401), ["a", "b"]),
        (refused(404), ["a", "b"]),
        (MalformedError("html"), ["a", "b"]),
        (MisconfiguredError("no key"), ["a", "b"]),
        (refused(400), ["a"]),
        (refused(413), ["a"]),
        (refused(400, "content_filter"), ["a"]),
        (refused(403, "content_filter"), ["a"]),
        (refused(500, "content_filter"), ["a"]),
        (event("content_filter"), ["a"]),
        (event("content_filter", spoke=True), ["a"]),
        (event("server_error"), ["a", "b", "a"]),
        (event(), ["a", "b", "a"]),
        (refused(400, "context_length_exceeded"), ["a"]),
        (TruncatedError("cut", spoke=True), ["a"]),
        (StalledError("silent", spoke=True), ["a"]),
    ],
    ids=repr,
)
def test_what_follows_a_failure(error: ModelError, tried: list[str]) -> None:
    assert play(A_B, error).tried == tried


@pytest.mark.parametrize(
    ("error", "servers"),
    [
        (DOWN, True),
        (refused(404), True),
        (refused(400), False),
        (refused(500, "content_filter"), False),
        (TruncatedError("cut", spoke=True), True),
        (event("server_error", spoke=True), True),
        (event("content_filter"), False),
        (event("content_filter", spoke=True), False),
    ],
    ids=repr,
)
def test_what_a_breaker_counts(error: ModelError, servers: bool) -> None:
    assert is_servers_doing(error) is servers


def test_a_filter_that_refuses_by_an_event_is_told_as_one_that_answers_400() -> None:
    """[32]"""
    assert (event("content_filter").status, event("content_filter").retriable) == (400, False)
    assert (event("server_error").status, event("server_error").retriable) == (502, True)


def test_a_lone_deployment_is_tried_again_after_pauses_that_grow() -> None:
    told = play(route(one("a")), DOWN)
    assert told.tried == ["a", "a", "a"]
    waits = [step.after for step in told.steps]
    assert waits[0] == 0 < waits[1] < waits[2]
    assert all(step.spread > 0 for step in told.steps[1:]), "so that many requests do not come back together"


def test_a_tier_is_used_up_before_the_next() -> None:
    told = play(route(one("a1"), one("a2"), one("b", tier=1), tries=3), DOWN)
    assert set(told.tried[:2]) == {"a1", "a2"}
    assert told.tried[2] == "b"


def test_retry_after_of_a_lone_deployment_is_waited_out_and_never_cut_short() -> None:
    told = play(route(one("a")), refused(429, retry_after=3.0))
    assert [step.after >= 3.0 for step in told.steps] == [False, True, True]


def test_retry_after_beyond_all_patience_ends_it_and_says_when_to_come_back() -> None:
    told = play(route(one("a")), refused(429, retry_after=60.0))
    assert told.tried == ["a"]
    assert told.left.retry_after == 60.0


def test_while_one_asks_for_a_pause_another_is_tried_at_once() -> None:
    told = play(A_B, refused(429, retry_after=60.0), DOWN)
    assert told.tried[:2] == ["a", "b"]
    assert told.steps[1].after == 0


def test_what_cools_down_is_passed_over() -> None:
    assert play(A_B, DOWN, view=View(cooling={"a": 5.0})).tried[0] == "b"


def test_when_all_cool_down_the_first_to_be_ready_is_waited_for() -> None:
    step = play(A_B, DOWN, view=View(cooling={"a": 5.0, "b": 2.0})).steps[0]
    assert (step.deployment.name, step.after) == ("b", 2.0)


def test_when_all_cool_down_for_long_nobody_is_kept_waiting() -> None:
    told = play(A_B, DOWN, view=View(cooling={"a": 50.0, "b": 20.0}))
    assert told.tried == []
    assert told.left.retry_after == 20.0


def test_a_deployment_that_cools_down_again_and_again_is_not_waited_for_for_ever() -> None:
    told = play(route(one("a")), None, view=View(cooling={"a": 1.0}))
    assert 0 < len(told.tried) <= PATIENCE_S
    assert told.left.retry_after == 1.0


def test_a_try_that_was_not_made_costs_no_patience() -> None:
    policy = choose_until_served(ALONE, "r1", CALM)
    assert next(policy).after == 0
    assert policy.send(Outcome(None, View(cooling={"a": PATIENCE_S}), ALONE, "a", 0.0)).after == PATIENCE_S


def test_a_probe_is_looked_at_a_few_times_once_the_patience_is_spent() -> None:
    policy = choose_until_served(ALONE, "r1", View(cooling={"a": PATIENCE_S}))
    assert next(policy).after == PATIENCE_S
    probed = Outcome(None, View(cooling={"a": 1.0}, probed=frozenset({"a"})), ALONE, "a", 1.0)
    assert [policy.send(probed).after for _ in range(MOST_LOOKS)] == [1.0] * MOST_LOOKS
    with pytest.raises(StopIteration) as over:
        policy.send(probed)
    assert over.value.value == NothingLeft(1.0)


def test_a_probe_that_failed_is_waited_for_with_the_patience_that_is_left() -> None:
    policy = choose_until_served(ALONE, "r1", View(cooling={"a": PATIENCE_S}))
    next(policy)
    policy.send(Outcome(None, View(cooling={"a": 1.0}, probed=frozenset({"a"})), ALONE, "a", 1.0))
    with pytest.raises(StopIteration) as over:
        policy.send(Outcome(None, View(cooling={"a": 2 * PATIENCE_S}), ALONE, "a", 1.0))
    assert over.value.value == NothingLeft(2 * PATIENCE_S)


def test_a_route_that_changes_is_followed_and_costs_nothing() -> None:
    policy = choose_until_served(ALONE, "r1", CALM)
    assert next(policy).deployment.name == "a"
    for _ in range(MOST_UNMADE):
        for changed in (route(one("b")), A_B):
            step = policy.send(Outcome(None, CALM, changed, "a", 0.0))
            assert step.deployment == changed.deployments[0]


HEAVIER = route(one("a", weight=2))
"""`ALONE`, changed."""


def test_a_change_gives_back_what_is_left_of_a_wait_and_takes_no_more() -> None:
    policy = choose_until_served(ALONE, "r1", View(cooling={"a": 8.0}))
    assert next(policy).after == 8.0
    assert policy.send(Outcome(None, View(cooling={"a": 7.0}), HEAVIER, "a", 1.0, moved=True)).after == 7.0
    with pytest.raises(StopIteration) as over:
        policy.send(Outcome(None, View(cooling={"a": 3.0}), HEAVIER, "a", 7.0))
    assert over.value.value == NothingLeft(3.0), "eight of ten seconds are spent"


def test_a_change_gives_a_look_at_a_probe_back() -> None:
    view = View(cooling={"a": 1.0}, probed=frozenset({"a"}))
    policy = choose_until_served(ALONE, "r1", view)
    next(policy)
    for routed in (HEAVIER, ALONE) * MOST_LOOKS:
        assert policy.send(Outcome(None, view, routed, "a", 0.1, moved=True)).after == 1.0


def test_a_change_takes_nothing_from_what_a_server_asked_for() -> None:
    policy = choose_until_served(ALONE, "r1", CALM)
    next(policy)
    step = policy.send(Outcome(refused(503, retry_after=5.0), CALM, ALONE, "a", 0.0))
    assert step.after > 5.0
    again = policy.send(Outcome(None, CALM, HEAVIER, "a", 1.0, moved=True))
    assert step.after - again.after == pytest.approx(1.0)
    assert policy.send(Outcome(None, CALM, HEAVIER, "a", 4.0)).after < 1.0


def test_who_waits_for_a_place_looks_when_something_as_good_may_have_recovered() -> None:
    routed = route(one("a"), one("b"), one("worse", tier=1))
    cooling = View(cooling={"a": 3.0, "worse": 1.0})
    policy = choose_until_served(routed, "r1", cooling)
    step = next(policy)
    assert (step.deployment.name, step.look_after) == ("b", 3.0)
    probed = View(cooling={"a": 1.0}, probed=frozenset({"a"}))
    looks = [policy.send(Outcome(None, probed, routed, "b", 3.0, moved=True)).look_after for _ in range(6)]
    assert looks == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0], "less and less often, while it is probed"
    assert policy.send(Outcome(None, CALM, routed, "b", 5.0, moved=True)).look_after is None


def test_what_refused_is_not_asked_again_because_the_route_changes() -> None:
    policy = choose_until_served(ALONE, "r1", CALM)
    next(policy)
    assert policy.send(Outcome(refused(401), CALM, A_B, "a", 0.0)).deployment.name == "b"
    with pytest.raises(StopIteration):
        policy.send(Outcome(None, CALM, route(one("a"), tries=2), "a", 0.0))


def test_those_that_are_as_good_are_told_of_and_the_one_that_was_called_counts() -> None:
    routed = route(one("a"), one("b"), one("c", tier=1), one("d", weight=0))
    policy = choose_until_served(routed, "r1", CALM)
    step = next(policy)
    (twin,) = step.twins
    assert {step.deployment.name, twin.name} == {"a", "b"}
    step = policy.send(Outcome(refused(500), CALM, routed, twin.name, 0.0))
    assert twin not in (step.deployment, *step.twins)


def test_tries_that_are_never_made_come_to_an_end() -> None:
    told = play(route(one("a")), None)
    assert len(told.tried) == MOST_UNMADE
    assert told.left == NothingLeft()


@pytest.mark.parametrize(("cools", "spread"), [(0.0, 0.0), (0.01, 0.01), (5.0, SPREAD_S)])
def test_who_waits_for_the_same_cool_down_comes_back_a_little_apart(cools: float, spread: float) -> None:
    step = play(route(one("a")), DOWN, view=View(cooling={"a": cools})).steps[0]
    assert (step.after, step.spread) == (cools, spread)


def test_one_with_a_free_place_comes_before_one_of_its_tier_that_is_full_but_not_before_a_lower_tier() -> None:
    pair = route(one("a1"), one("a2"), one("b", tier=1))
    assert play(pair, DOWN, view=View(full=frozenset({"a1"}))).tried[0] == "a2"
    assert play(pair, DOWN, view=View(full=frozenset({"a1", "a2"}))).tried[0] in {"a1", "a2"}


def test_weight_zero_takes_a_deployment_out() -> None:
    assert play(route(one("a", weight=0), one("b", tier=3)), DOWN).tried == ["b", "b", "b"]
    assert play(route(one("a", weight=0)), DOWN).tried == []


def test_only_those_that_can_continue_are_asked_to() -> None:
    mixed = route(
        one("a"), one("b", kind="vllm"), one("c", continues="prefill"), one("d", kind="vllm", continues="none")
    )
    assert set(play(mixed, DOWN, continuing=True).tried) == {"b", "c"}


CONTINUING = (one("b", kind="vllm"), one("c", continues="prefill"))


@pytest.mark.parametrize(
    "error", [ConnectError("no"), refused(401), refused(503), MalformedError("no"), UnroutableError("no", status=503)]
)
def test_what_none_of_those_continued_who_can_may_be_begun_anew_by_others_if_there_are_any(error: ModelError) -> None:
    assert who_did_not_continue(route(one("a"), *CONTINUING), error, CALM) == frozenset({"b", "c"})
    assert who_did_not_continue(route(*CONTINUING), error, CALM) is None
    assert who_did_not_continue(route(one("a", weight=0), *CONTINUING), error, CALM) is None
    for cools, anew in ((PATIENCE_S, frozenset({"b", "c"})), (PATIENCE_S + 1, None)):
        assert who_did_not_continue(route(one("a"), *CONTINUING), error, View(cooling={"a": cools})) == anew


@pytest.mark.parametrize(
    "error", [refused(400), refused(400, "content_filter"), event("content_filter"), ExpiredError("late")]
)
def test_what_is_refused_for_its_own_doing_is_not_begun_anew(error: ModelError) -> None:
    assert who_did_not_continue(route(one("a"), *CONTINUING), error, CALM) is None


def test_one_that_broke_off_before_is_taken_only_where_there_is_no_other() -> None:
    assert play(A_B, DOWN, avoid=frozenset({"a"})).tried[0] == "b"
    assert play(route(one("a")), DOWN, avoid=frozenset({"a"})).tried[0] == "a"
    assert play(route(one("a")), DOWN, avoid=frozenset({"a"})).steps[0].after == 0


def test_the_same_request_is_sent_the_same_way() -> None:
    pair = route(one("a"), one("b"))
    assert play(pair, DOWN, seed="r7").tried == play(pair, DOWN, seed="r7").tried


def test_requests_spread_by_weight() -> None:
    pair = route(one("a", weight=3), one("b", weight=1))
    first = Counter(play(pair, DOWN, seed=f"r{number}").tried[0] for number in range(2_000))
    assert 0.70 < first["a"] / 2_000 < 0.80


failures = st.sampled_from([DOWN, HALF, refused(429, retry_after=2.0), refused(500), refused(404), refused(400), None])
deployments = st.builds(
    Deployment,
    name=st.sampled_from("abcd"),
    tier=st.integers(0, 2),
    weight=st.sampled_from([0.0, 1.0, 5.0]),
)


@settings(max_examples=200)
@given(
    st.lists(deployments, max_size=4, unique_by=lambda deployment: deployment.name),
    st.lists(failures, max_size=30),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 3.0, 30.0])),
    st.sets(st.sampled_from("abcd")),
    st.integers(1, 6),
)
def test_it_always_ends_and_never_costs_more_calls_than_the_route_allows(
    held: list[Deployment], errors: list[ModelError | None], cooling: dict[str, float], probed: set[str], tries: int
) -> None:
    told = play(route(*held, tries=tries), *errors, view=View(cooling=cooling, probed=frozenset(probed & set(cooling))))
    made = sum(1 for error in [*errors, *[errors[-1]] * 100][: len(told.tried)] if error) if errors else 0
    assert made <= tries
    assert len(told.steps) <= tries + MOST_UNMADE
    waits = [(step.deployment.name in probed, cooling.get(step.deployment.name, 0.0)) for step in told.steps]
    assert sum(cools for looks, cools in waits if not looks) <= PATIENCE_S
    assert sum(looks and cools > 0 for looks, cools in waits) <= MOST_LOOKS + tries
    assert all(step.after >= cooling.get(step.deployment.name, 0.0) for step in told.steps)
