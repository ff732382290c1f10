"""What an owner saved is what its successor finds, whatever was torn, late, compacted or garbage."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klatch_schemas.records import Draft, Partition
from klatch_streams.memory_log import MemoryLog
from klatch_streams.snapshots import Parts, Snapshots, StateLost, stood

HERE = Partition("s", 0)


def a_log() -> MemoryLog:
    return MemoryLog({"s": 1})


async def found(log: MemoryLog, committed: int = 1_000) -> dict[str, tuple[int, Parts]]:
    saved = (await Snapshots.open(log, HERE, committed)).saved
    return {key: (one.applied, one.parts) for key, one in saved.items()}


def keys_of(log: MemoryLog, since: int = 0) -> list[list[str]]:
    return [msgspec.json.decode(record.key or b"") for record in log.records("s")[since:]]


async def test_only_the_parts_that_changed_are_written_and_the_head_names_them() -> None:
    log = a_log()
    owner = await Snapshots.open(log, HERE, 0)
    await owner.write([("k", 1, {"a": [1], "b": {"x": 1}})])
    written = len(log.records("s"))
    await owner.write([("k", 2, {"a": [1], "b": {"x": 2}})])
    assert keys_of(log, written) == [["k", "b"], ["k"]]
    assert await found(log) == {"k": (2, {"a": [1], "b": {"x": 2}})}


async def test_a_successor_writes_only_what_changed_though_json_turned_tuples_into_lists() -> None:
    log = a_log()
    await (await Snapshots.open(log, HERE, 0)).write([("k", 1, {"a": (1, 2), "b": 1})])
    written = len(log.records("s"))
    await (await Snapshots.open(log, HERE, 0)).write([("k", 2, {"a": (1, 2), "b": 2})])
    assert keys_of(log, written) == [["k", "b"], ["k"]]


async def test_keys_and_parts_of_any_spelling_stay_apart() -> None:
    log = a_log()
    states = {'a","b': {"c": 1}, "a": {'b","c': 2, "b": 3}, "": {"": 4}, "ä/ü": {"\n": 5}}
    await (await Snapshots.open(log, HERE, 0)).write([(key, 1, parts) for key, parts in states.items()])
    log.compact("s")
    assert {key: parts for key, (_, parts) in (await found(log)).items()} == states


async def test_a_torn_batch_leaves_the_state_before_it() -> None:
    log = a_log()
    owner = await Snapshots.open(log, HERE, 0)
    await owner.write([("k", 1, {"a": 1, "b": 1})])
    whole = len(log.records("s"))
    await owner.write([("k", 2, {"a": 2, "b": 2})])
    for kept in range(whole, whole + 3):
        torn = a_log()
        await torn.append([Draft("s", r.key, r.value, r.headers, 0) for r in log.records("s")[:kept]])
        assert await found(torn) == {"k": (1, {"a": 1, "b": 1})}
        torn.compact("s")
        assert await found(torn) == {"k": (1, {"a": 1, "b": 1})}, "the restore has not put it right"


async def test_a_zombies_late_snapshot_loses_and_is_put_right() -> None:
    log = a_log()
    owner, zombie = await Snapshots.open(log, HERE, 0), await Snapshots.open(log, HERE, 0)
    await owner.write([("k", 9, {"a": 9, "b": 9})])
    await zombie.write([("k", 7, {"a": 7, "b": 7, "c": 7})])
    assert await found(log) == {"k": (9, {"a": 9, "b": 9})}
    log.compact("s")
    assert await found(log) == {"k": (9, {"a": 9, "b": 9})}
    live = sorted(record.key or b"" for record in log.records("s") if record.value)
    assert live == [b'["k","a"]', b'["k","b"]', b'["k"]']


async def test_who_looks_back_is_told_of_every_state_that_stood_and_of_none_that_a_zombie_wrote_late() -> None:
    log = a_log()
    owner, zombie = await Snapshots.open(log, HERE, 0), await Snapshots.open(log, HERE, 0)
    await owner.write([("k", 5, {"a": 5, "b": 0})])
    await owner.write([("k", 9, {"a": 9, "b": 0}), ("l", 8, {})])
    await zombie.write([("k", 7, {"a": 7, "b": 0})])
    told = [(one.at, one.key, one.saved.applied, one.saved.parts) for one in stood(HERE, log.records("s"))]
    assert told == [(2, "k", 5, {"a": 5, "b": 0}), (4, "k", 9, {"a": 9, "b": 0}), (5, "l", 8, {})]
    torn = log.records("s")[:4]
    assert [one.at for one in stood(HERE, torn)] == [2]


async def test_a_zombies_part_between_an_owners_part_and_its_head_changes_nothing() -> None:
    log = a_log()
    await (await Snapshots.open(log, HERE, 0)).write([("k", 5, {"a": 0, "b": 5})])
    owner, zombie = await Snapshots.open(log, HERE, 0), await Snapshots.open(log, HERE, 0)
    await zombie.write([("k", 7, {"a": 1, "b": 7})])
    await owner.write([("k", 9, {"a": 0, "b": 9})])
    assert await found(log) == {"k": (9, {"a": 0, "b": 9})}


async def test_a_state_without_parts_is_forgotten_only_once_its_offset_is_committed() -> None:
    log = a_log()
    owner = await Snapshots.open(log, HERE, 0)
    await owner.write([("k", 4, {"a": 1})])
    await owner.write([("k", 5, {})])
    assert await owner.forget(5) == {}
    assert await found(log) == {"k": (5, {})}
    assert await owner.forget(6) == {"k": 5}
    log.compact("s")
    assert [record.value for record in log.records("s")] == [None, None]


async def test_a_forgotten_key_stays_forgotten_when_a_zombie_writes_it_late() -> None:
    log = a_log()
    owner, zombie = await Snapshots.open(log, HERE, 0), await Snapshots.open(log, HERE, 0)
    await owner.write([("k", 5, {})])
    await owner.forget(6)
    await zombie.write([("k", 4, {"a": 1})])
    assert await found(log) == {}
    log.compact("s")
    assert await found(log) == {}


async def test_states_that_were_handed_over_are_not_remembered_and_can_be_taken_away() -> None:
    log = a_log()
    await (await Snapshots.open(log, HERE, 0)).write(
        [("k", 1, {"a": 1}), ("many/1", 1, {"a": 1}), ("many/2", 2, {"a": 2})]
    )
    owner = await Snapshots.open(log, HERE, 1_000)
    assert [(key, one.parts) for key, one in owner.hand_over("many/")] == [("many/1", {"a": 1}), ("many/2", {"a": 2})]
    await owner.write([("k", 3, {"a": 3}), ("many/2", 4, {"a": 4}), ("many/3", 5, {"a": 5})])
    assert set(owner.saved) == {"k"}
    assert await found(log) == {
        "k": (3, {"a": 3}),
        "many/1": (1, {"a": 1}),
        "many/2": (4, {"a": 4}),
        "many/3": (5, {"a": 5}),
    }
    await owner.take_away([("many/1", 1, ("a",)), ("many/3", 5, ("a",))])
    assert set(await found(log)) == {"k", "many/2"}
    log.compact("s", drop_tombstones=True)
    assert {keys[0] for keys in keys_of(log)} == {"k", "many/2"}


@pytest.mark.parametrize("key", [b'["k"]', b'["k","a"]'])
async def test_a_state_that_was_committed_and_cannot_be_read_stops_the_owner(key: bytes) -> None:
    log = a_log()
    await (await Snapshots.open(log, HERE, 0)).write([("k", 9, {"a": 9})])
    await log.append([Draft("s", key, b"garbage", (), 0)])
    log.compact("s")
    with pytest.raises(StateLost, match="rebuild"):
        await found(log)


async def test_garbage_under_a_key_of_nobodys_is_passed_over() -> None:
    log = a_log()
    await log.append([Draft("s", key, b"{}", (), 0) for key in (None, b"", b"[]", b'["a","b","c"]', b"\xff", b"7")])
    assert await found(log) == {}


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(
        st.dictionaries(st.sampled_from("kl"), st.dictionaries(st.sampled_from("abc"), st.integers(0, 2))), max_size=12
    ),
    restarts=st.sets(st.integers(0, 12)),
    compactions=st.sets(st.integers(0, 12)),
)
async def test_whatever_is_written_last_is_found(
    rounds: list[dict[str, dict[str, int]]], restarts: set[int], compactions: set[int]
) -> None:
    log, wanted = a_log(), dict[str, tuple[int, Parts]]()
    owner = await Snapshots.open(log, HERE, 0)
    for number, states in enumerate(rounds):
        await owner.forget(number)
        await owner.write([(key, number, parts) for key, parts in states.items()])
        wanted |= {key: (number, parts) for key, parts in states.items()}
        if number in compactions:
            log.compact("s")
        if number in restarts:
            owner = await Snapshots.open(log, HERE, number + 1)
    left = {key: one for key, one in (await found(log, len(rounds))).items() if one[1]}
    assert left == {key: one for key, one in wanted.items() if one[1]}
