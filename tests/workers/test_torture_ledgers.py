"""The judge of ledgers compares what admission kept with the log, and finds every part that differs.

The evidence is what real owners wrote, read back as the kit reads it; the lies are planted into that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, Event, LimitRule, Limits, QuotaLimitSet, Usage, UsageSettled
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant
from klatch_schemas.records import Partition, Record, partition_of
from klatch_schemas.topics import ADMISSION_STATE, CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, DEAD_LETTERS, Namespace
from klatch_streams.admission import Admission
from klatch_streams.decider_owner import DeciderOwner, DeciderStage
from klatch_streams.memory_log import MemoryLog
from klatch_streams.quota.ledger import Ledger
from klatch_workers.torture.evidence import Evidence, Kept
from klatch_workers.torture.judge import judge
from klatch_workers.torture.ledgers import checked, forgotten
from klatch_workers.torture.readback import entries, read_back, snapshots
from klatch_workers.torture.report import Violation

ACME = Tenant("acme")
HERE = partition_of(ACME.encode(), 4)
TOPICS = (CHAT_REQUESTS, CHAT_ADMITTED, CHAT_STREAM, DEAD_LETTERS, ADMISSION_STATE)


def asked(number: int) -> ChatRequested:
    return ChatRequested(
        request=RequestId(f"r{number}"),
        tenant=ACME,
        conversation=Conversation("c"),
        person=Person("ann"),
        body={"model": "m", "max_tokens": 84},
    )


def settled(number: int) -> UsageSettled:
    usage = Usage(completion_tokens=20)
    return UsageSettled(request=RequestId(f"r{number}"), tenant=ACME, status="completed", usage=usage)


def setting(most: int) -> QuotaLimitSet:
    each = LimitRule(person="*", limits=Limits(concurrent_requests=most))
    return QuotaLimitSet(tenant=ACME, limits=Limits(tokens_per_day=10_000), rules=(each,))


STORY = (setting(2), asked(1), asked(2), settled(1), setting(3), asked(3), settled(2), settled(3))


async def owner_of(log: MemoryLog, committed: int = 0) -> DeciderOwner[Ledger]:
    stage = DeciderStage(Admission(), log, Namespace())
    return await stage.own(Partition(CHAT_REQUESTS.name, HERE), committed)


async def publish(log: MemoryLog, event: Event) -> Record:
    await log.append([codec.draft(CHAT_REQUESTS.name, ACME, event)])
    return log.records(CHAT_REQUESTS.name)[-1]


async def found_in(log: MemoryLog) -> Evidence:
    requests, states = [await read_back(log, Namespace(), topic) for topic in (CHAT_REQUESTS, ADMISSION_STATE)]
    return Evidence(asked={}, acknowledged=(), requests=entries(requests), snapshots=snapshots(states))


async def a_run() -> MemoryLog:
    """A story in which every record is followed by a snapshot, and every third by another owner."""
    log = MemoryLog({topic.name: 4 for topic in TOPICS})
    owner, committed = await owner_of(log), 0
    for number, event in enumerate(STORY, 1):
        await owner.take([await publish(log, event)])
        committed = await owner.checkpoint()
        if number % 3 == 0:
            owner = await owner_of(log, committed)
    return log


async def test_snapshots_of_every_owner_are_what_the_log_says() -> None:
    evidence = await found_in(await a_run())
    assert list(forgotten(evidence)) == []
    assert checked(evidence) == {"snapshots_compared": len(STORY), "snapshots_behind": 0}
    assert any(name.startswith("held/") for one in evidence.snapshots for name in one.parts)


async def test_what_compaction_has_left_is_compared() -> None:
    log = await a_run()
    log.compact(ADMISSION_STATE.name)
    evidence = await found_in(log)
    assert list(forgotten(evidence)) == []
    assert checked(evidence)["snapshots_compared"] == 1


async def test_a_zombies_late_snapshot_counts_for_nothing_and_a_successors_repair_is_what_the_log_says() -> None:
    log = MemoryLog({topic.name: 4 for topic in TOPICS})
    zombie = await owner_of(log)
    early = [await publish(log, event) for event in STORY[:2]]
    await zombie.take(early)
    owner = await owner_of(log)
    await owner.take([*early, *[await publish(log, event) for event in STORY[2:]]])
    committed = await owner.checkpoint()
    await zombie.checkpoint()
    evidence = await found_in(log)
    assert ([one.applied for one in evidence.snapshots], list(forgotten(evidence))) == ([len(STORY) - 1], [])
    await owner_of(log, committed)
    evidence = await found_in(log)
    assert ([one.applied for one in evidence.snapshots], list(forgotten(evidence))) == ([len(STORY) - 1] * 2, [])


# --- planted lies ------------------------------------------------------------------------------------------------

Parts = Mapping[str, object]


def without(kind: str) -> Callable[[Parts], Parts]:
    return lambda parts: {name: part for name, part in parts.items() if name.partition("/")[0] != kind}


LIES: dict[str, tuple[Callable[[Parts], Parts], int, str]] = {
    "a reservation is left out": (without("held"), 2, "held/0"),
    "ids are left out": (without("ids"), 1, "ids/0"),
    "a settled reservation is kept": (lambda parts: {**parts, "held/0": {"r1": [100]}}, 7, "held/0"),
    "what operators changed is left out": (lambda parts: {**parts, "changes": []}, 4, "changes"),
    "limits are older than they are": (lambda parts: {**parts, "settings": {}}, 4, "settings"),
    "all is left out": (lambda _: {}, 0, "changes, head, settings"),
}


def lied(evidence: Evidence, plant: Callable[[Parts], Parts], *at: int) -> Evidence:
    """With something else in these snapshots."""
    kept = [
        one._replace(parts=plant(one.parts)) if number in at else one for number, one in enumerate(evidence.snapshots)
    ]
    return replace(evidence, snapshots=kept)


@pytest.mark.parametrize("lie", LIES)
async def test_the_judge_finds_that(lie: str) -> None:
    plant, at, parts = LIES[lie]
    evidence = lied(await found_in(await a_run()), plant, at)
    covered, head = f"chat.requests/{HERE}/{at}", evidence.snapshots[at].position
    what = f"its snapshot up to {covered} is not what its log says in {parts}"
    assert list(forgotten(evidence)) == [Violation("missettled", f"acme/{HERE}", what, (head, covered))]


async def test_a_snapshot_that_says_to_cover_more_or_less_than_it_does_is_found() -> None:
    evidence = await found_in(await a_run())
    for at, applied in ((2, 3), (5, 4), (7, 6)):
        kept = [one._replace(applied=applied) if one.applied == at else one for one in evidence.snapshots]
        assert f"/{applied} is not what" in whats(replace(evidence, snapshots=kept))[0]


async def test_the_last_snapshot_is_compared_where_the_log_went_on_and_that_is_told() -> None:
    evidence = await found_in(await a_run())
    early = replace(evidence, snapshots=evidence.snapshots[:3])
    assert (whats(early), checked(early)["snapshots_behind"]) == ([], 1)
    none = replace(evidence, snapshots=())
    assert (whats(none), checked(none)) == ([], {"snapshots_compared": 0, "snapshots_behind": 1})


async def test_a_ledger_of_which_every_snapshot_differs_is_one_violation() -> None:
    wrong = lied(await found_in(await a_run()), without("ids"), *range(1, len(STORY)))
    assert whats(wrong) == [
        f"its snapshot up to chat.requests/{HERE}/1 is not what its log says in ids/0, nor are 6 later ones"
    ]


async def test_a_snapshot_of_whom_the_log_does_not_know_is_found() -> None:
    evidence = await found_in(await a_run())
    strange = Kept(ADMISSION_STATE.name, 0, 99, "nobody", 5, evidence.snapshots[-1].parts)
    [violation] = forgotten(replace(evidence, snapshots=[*evidence.snapshots, strange]))
    assert (violation.request, violation.positions) == ("nobody/0", ("admission.state/0/99", "chat.requests/0/5"))


async def test_the_report_counts_ledgers_and_names_no_requests_of_theirs() -> None:
    report = judge(lied(await found_in(await a_run()), without("ids"), 1, 2))
    assert report.count("missettled") == 1
    assert report.checked["snapshots_compared"] == len(STORY)
    assert "r1" not in report.violations[0].what


async def test_a_system_that_keeps_no_ledgers_is_not_asked_for_them() -> None:
    evidence = replace(await found_in(await a_run()), snapshots=(), bare=True)
    assert (whats(evidence), checked(evidence)) == ([], {"snapshots_compared": 0, "snapshots_behind": 0})


def whats(evidence: Evidence) -> Sequence[str]:
    return [violation.what for violation in forgotten(evidence)]
