"""What a torture does is a function of its seed: faults in order, every kind of them, and a load with every trouble."""

from collections import Counter

import pytest

from klatch_workers.torture.boundaries import BOUNDARIES
from klatch_workers.torture.evidence import Struck
from klatch_workers.torture.load import ONCE_ENDED, ONCE_OPENED, Shape, Trouble, plan
from klatch_workers.torture.recovery import Recovery, Speaking, recoveries
from klatch_workers.torture.schedule import AWAITED_S, Fault, faults_of, schedule
from klatch_workers.torture.tenants import (
    FLOODING,
    LIMITED,
    PEOPLE,
    PERSONS,
    PRICED,
    TENANTS,
    TIGHT,
    changes,
    configured,
)

# --- the schedule and the load -----------------------------------------------------------------------------------


def test_a_seed_makes_the_same_faults_and_the_same_load_every_time() -> None:
    assert schedule(7, 10) == schedule(7, 10)
    assert schedule(7, 10) != schedule(8, 10)
    assert plan(7, 1, 5) == plan(7, 1, 5)
    assert plan(7, 1, 5) != plan(8, 1, 5)


@pytest.mark.parametrize("seed", range(20))
def test_faults_come_in_order_and_are_over_before_the_load_is(seed: int) -> None:
    faults = schedule(seed, 2)
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    assert faults[0].at_s > 0
    assert all(fault.at_s + fault.lasts_s < 120 for fault in faults)


def test_ten_minutes_hold_every_kind_of_fault_on_every_stage() -> None:
    struck = {(fault.kind, fault.target) for fault in schedule(1, 10)}
    assert {("kill", stage) for stage in ("admission", "screening", "generation", "http")} <= struck
    assert {("stop", stage) for stage in ("admission", "screening", "generation")} <= struck
    assert {("scale", "generation"), ("roll", "generation"), ("broker", "")} <= struck


def test_every_boundary_has_its_turn_and_the_cluster_is_killed_now_and_then() -> None:
    faults = schedule(1, 20, nodes=3)
    assert {fault.target for fault in faults if fault.kind == "boundary"} == set(BOUNDARIES)
    assert {"cluster", "leaderless"} <= {fault.kind for fault in faults}
    away = [fault.lasts_s for fault in faults if fault.kind == "leaderless"]
    assert away == [30.0] * len(away)
    # One that outlives the load would have nothing to show for it.
    assert not [fault for fault in schedule(1, 0.9) if fault.kind == "leaderless"]


def test_a_zombie_sleeps_longer_than_its_group_waits() -> None:
    stops = [fault for fault in schedule(1, 20) if fault.kind == "stop"]
    assert stops
    assert all(fault.lasts_s > 10 for fault in stops)


def test_some_zombies_are_made_at_boundaries_of_stages_that_are_succeeded_and_wake_beside_their_successors() -> None:
    zombies = [fault for fault in schedule(1, 20) if fault.kind == "zombie"]
    assert {BOUNDARIES[fault.target].stage for fault in zombies} == {"admission", "screening", "generation"}
    assert all(fault.takes_s == AWAITED_S + fault.lasts_s for fault in zombies)
    with pytest.raises(ValueError, match="no boundary of a stage that is succeeded"):
        faults_of([{"at_s": 1, "kind": "zombie", "target": "end/http"}])
    assert Fault(1, "stop", "generation", lasts_s=12).takes_s == 12


def test_some_zombies_outlive_their_successors() -> None:
    outliving = [fault for fault in schedule(1, 20) if fault.kind == "outlive"]
    assert outliving
    assert {fault.target for fault in outliving} <= {name for name in BOUNDARIES if not name.endswith("/http")}
    assert all(fault.takes_s == AWAITED_S + fault.lasts_s for fault in outliving)
    with pytest.raises(ValueError, match="no boundary of a stage that is succeeded"):
        faults_of([{"at_s": 1, "kind": "outlive", "target": "end/http"}])


def test_some_conversations_are_those_of_tenants_with_limits_that_operators_change_meanwhile() -> None:
    talks = plan(3, 10, 5)
    assert {talk.tenant for talk in talks} == set(TENANTS)
    assert all(turn.limited == (talk.tenant in LIMITED) for talk in talks for turn in talk.turns)
    assert not any(turn.limited and turn.plain for talk in talks for turn in talk.turns)
    people = [turn for talk in talks if talk.tenant == PEOPLE for turn in talk.turns]
    assert {turn.person for turn in people} == set(PERSONS)
    assert {turn.model for turn in people} == {PRICED}
    assert {talk.tenant for talk in plan(3, 10, 5, plain=True)}.isdisjoint(LIMITED)
    made = list(changes(2))
    assert {one.tenant for one in made} == {TIGHT, PEOPLE}
    assert [one.at_s for one in made] == sorted(one.at_s for one in made)
    assert made[-1].at_s <= 120
    held = {tenant: configured(tenant, "key-of-theirs") for tenant in LIMITED}
    for one in made:
        changed = one.change.of(held[one.tenant])
        assert changed != held[one.tenant], "a change that changes nothing"
        held[one.tenant] = changed


def test_a_load_can_be_made_of_what_is_rare() -> None:
    slow = [
        turn for talk in plan(3, 1, 5, shape=Shape(slow=1.0, waits=0.0, continues=1.0, flood=0)) for turn in talk.turns
    ]
    assert {turn.rate for turn in slow if not turn.person} == {15.0}
    assert {turn.on_crash for turn in slow} == {"continue"}
    assert not any(turn.waits for turn in slow)
    assert {talk.at_s for talk in plan(3, 1, 5, shape=Shape(every_s=20.0, flood=0))} == {0.0, 20.0, 40.0}
    assert {talk.tenant for talk in plan(3, 1, 5, shape=Shape(limited=1.0, flood=0))} == {TIGHT, PEOPLE}
    assert all(turn.alone for talk in plan(3, 1, 5, shape=Shape(alone=1.0, flood=0)) for turn in talk.turns)


def test_some_clients_have_no_conversation_and_none_of_their_requests_meets_another() -> None:
    talks = [talk for talk in plan(3, 10, 5) if talk.turns[0].alone]
    turns = [(talk, turn) for talk in talks for turn in talk.turns]
    assert {talk.edge for talk in talks} == {"kafka", "http"}
    assert all(talk.conversation_of(turn) == str(turn.request) for talk, turn in turns)
    assert all(turn.alone and turn.if_busy == "enqueue" and not turn.interrupted for _, turn in turns)
    others = [talk for talk in plan(3, 10, 5) if talk not in talks]
    assert all(talk.conversation_of(turn) == talk.conversation for talk in others for turn in talk.turns)
    assert len(talks) < len(others)


def test_a_tenant_floods_now_and_then_in_a_few_conversations() -> None:
    floods = [talk for talk in plan(3, 21, 5, shape=Shape(flood=320)) if talk.tenant == FLOODING]
    assert {talk.at_s for talk in floods} == {10.0, 610.0, 1210.0}
    of_each = Counter[float]()
    for talk in floods:
        of_each[talk.at_s] += len(talk.turns)
    assert set(of_each.values()) == {320}
    assert len({talk.conversation for talk in floods}) == len(floods)
    assert {len(talk.turns) for talk in floods} == set(range(1, 8)), "they end one by one"
    assert not any(turn.waits or turn.plain for talk in floods for turn in talk.turns)


def test_a_load_can_begin_with_two_long_replies_that_hold_every_commit_back() -> None:
    first, *others = plan(3, 1, 5, shape=Shape(holds_s=9.0))
    assert others == plan(3, 1, 5)
    assert first.at_s == 0
    assert [(turn.waits, turn.tokens / turn.rate) for turn in first.turns] == [(False, 9.0), (True, 9.0)]
    assert all(turn.plain for turn in first.turns)


@pytest.mark.parametrize(
    ("upstream", "for_good"),
    [
        ({}, False),
        ({"first_delay": 6.0}, False),
        ({"status": 500, "fails": 1}, False),
        ({"status": 429, "retry_after": "0", "fails": 2}, False),
        ({"fault": "error-event", "fails": 2}, False),
        ({"fault": "drop", "fault_after": 0, "fails": 1}, False),
        ({"fault": "reset", "fails": 3}, True),
        ({"status": 500}, True),
        ({"fault": "error-event"}, True),
        ({"fault": "garbage", "fails": 1}, True),
        ({"fault": "stall", "fails": 1}, True),
    ],
)
def test_a_model_server_that_fails_less_often_than_klatch_tries_is_no_excuse(
    upstream: dict[str, object], for_good: bool
) -> None:
    assert Trouble(upstream).fails_for_good is for_good


def test_a_load_asks_as_often_as_it_was_told_and_has_every_trouble() -> None:
    turns = [turn for talk in plan(3, 10, 5) for turn in talk.turns]
    assert 2_400 < len(turns) < 3_600
    assert len({turn.request for turn in turns}) == len(turns)
    assert {turn.trouble.cancel for turn in turns} == {None, "record", "delete", "disconnect"}
    assert {turn.trouble.upstream.get("fault") for turn in turns} >= {"drop", "reset", "stall", "garbage"}
    assert {turn.trouble.upstream.get("status") for turn in turns} >= {429, 500}
    assert {turn.trouble.cancel_after for turn in turns if turn.trouble.cancel} >= {0, ONCE_OPENED, ONCE_ENDED, 5}
    assert {turn.if_busy for turn in turns} == {"enqueue", "reject", "interrupt", "rollback"}
    assert {turn.on_crash for turn in turns} == {"restart", "continue"}
    assert {turn.trouble.upstream.get("fails") for turn in turns} == {None, 1, 2}
    assert any(turn.interrupted for turn in turns)
    assert any(turn.twice for turn in turns)
    assert any(turn.leaves_after for turn in turns)
    assert sum(turn.plain for turn in turns) > len(turns) * 0.4


def test_a_plain_load_asks_the_same_at_the_same_times_and_nothing_that_not_everyone_can_answer() -> None:
    everything, plain = plan(3, 2, 5, shape=Shape(flood=0)), plan(3, 2, 5, plain=True)
    assert [(talk.at_s, talk.conversation) for talk in plain] == [(talk.at_s, talk.conversation) for talk in everything]
    turns = [turn for talk in plain for turn in talk.turns]
    asked = [turn for talk in everything for turn in talk.turns]
    assert [(turn.tokens, turn.rate, turn.waits) for turn in turns] == [
        (turn.tokens, turn.rate, turn.waits) for turn in asked
    ]
    assert {talk.edge for talk in plain} == {"kafka"}
    assert all(turn.plain and not turn.twice and not turn.leaves_after for turn in turns)
    assert len({turn.request for turn in turns}) == len(turns)


def test_plain_faults_can_be_done_to_every_system() -> None:
    struck = {(fault.kind, fault.target) for fault in schedule(1, 10, plain=True)}
    workers = {(kind, "generation") for kind in ("kill", "stop", "roll", "scale")}
    assert struck == workers | {("broker", ""), ("cluster", ""), ("leaderless", "")}


# --- recovery ----------------------------------------------------------------------------------------------------


def test_recovery_is_from_the_fault_to_the_next_token_of_the_stream_that_waited_longest() -> None:
    struck = [Struck("kill generation", 1_000.0, 1_000.0), Struck("kill http", 60_000.0, 60_000.0)]
    streams = [
        Speaking("untouched", 0, 9_000, [900, 1_020, 1_040]),
        Speaking("hit", 0, 9_000, [990, 8_500]),
        Speaking("asked later", 3_000, 9_000, [8_600]),
        Speaking("over before", 0, 990, [10]),
    ]
    assert recoveries(struck, streams) == {"kill generation": Recovery(7.5, "hit"), "kill http": Recovery(0.0, "")}
