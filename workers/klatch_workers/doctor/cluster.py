"""Checks of Kafka: reachable, topics as in the table, stages alive and keeping up, dead letters, clock; then routes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Final

from klatch_schemas.events import ModelRouted
from klatch_schemas.records import Partition
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, CHAT_TURNS, DEAD_LETTERS, MODELS, Namespace, Topic
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog, Unreachable
from klatch_streams.ledger import Ledger
from klatch_streams.log import Log, LogError
from klatch_streams.topic_admin import check, describe_topics
from klatch_workers.doctor.findings import Finding, Findings, Setup
from klatch_workers.doctor.group_facts import Group, clock_skew_ms, cluster_admin, groups
from klatch_workers.doctor.routes import routes
from klatch_workers.redrive.letters import Wanted, read_letters

_STAGES: Final[Mapping[str, tuple[Topic, bool]]] = {
    "admission": (CHAT_REQUESTS, True),
    "screening": (CHAT_REQUESTS, True),
    "generation": (CHAT_ADMITTED, True),
    "memory": (CHAT_TURNS, False),
    "views": (CHAT_REQUESTS, False),
}
"""What each stage consumes, and whether requests need it."""
_MUCH: Final = 1_000
_MANY_LETTERS: Final = 20_000
"""Records that a doctor does not read."""
_REDRIVE: Final = "see them with `klatch redrive`, which writes nothing without --yes; they stay as they were in {}"
_SKEW_MS: Final = 1_000


async def cluster(setup: Setup) -> Findings:
    """Everything about Kafka; what needs it is left out where it cannot be reached."""
    options = KafkaOptions(setup.bootstrap, client_id="klatch-doctor", startup_s=5.0, patience_s=5.0)
    try:
        log = await KafkaLog.open(options)
    except Unreachable:
        fix = "start `klatch up` or `klatch kafka start`, or say with --kafka where Kafka is (as it advertises itself)"
        yield Finding("kafka", "problem", f"no Kafka answers at {setup.bootstrap}", fix)
        return
    try:
        yield Finding("kafka", "ok", f"Kafka answers at {setup.bootstrap}")
        async for finding in _inside(setup, options, log):
            yield finding
    except LogError as error:
        yield Finding("kafka", "problem", str(error), "see the broker's log, and its ACLs")
    finally:
        await log.close()


async def _inside(setup: Setup, options: KafkaOptions, log: Log) -> AsyncIterator[Finding]:
    described = await describe_topics(options, setup.namespace)
    if all(one.partitions is None for one in described):
        says = f"klatch has no topics {f'in namespace {setup.namespace.prefix}' if setup.namespace.prefix else 'here'}"
        yield Finding("topics", "problem", says, "run `klatch topics create` (`klatch up` does it by itself)")
        return
    problems = check(described, options.bootstrap)
    for problem in problems:
        says, _, fix = problem.says.partition(": ")
        yield Finding("topics", "problem", says, fix)
    if not problems:
        yield Finding("topics", "ok", f"all {len(described)} topics are as they should be")
    there = {one.topic.name: one.name for one in described if one.partitions}
    async with cluster_admin(options) as admin:
        found = await groups(admin, [setup.namespace.group(stage) for stage in _STAGES])
        for (stage, (topic, needed)), group in zip(_STAGES.items(), found, strict=True):
            if topic.name in there:
                yield await _stage(log, there[topic.name], stage, group, needed=needed)
        if DEAD_LETTERS.name in there:
            yield await _dead_letters(log, there[DEAD_LETTERS.name], setup.namespace)
        yield _clock(await clock_skew_ms(admin))
    if MODELS.name in there:
        async with await Ledger[ModelRouted].open(log, MODELS, setup.namespace, ModelRouted) as ledger:
            routed = sorted(ledger.values(), key=lambda route: route.alias)
        async for finding in routes(setup, routed):
            yield finding


async def _stage(log: Log, topic: str, stage: str, group: Group, *, needed: bool) -> Finding:
    """Whether somebody does the stage's work, and how much waits."""
    lag = await _lag(log, topic, group)
    start = f"start `klatch worker {stage}`"
    if not group.members:
        waiting = f", and {lag} records wait for one" if lag else ""
        return Finding(stage, "problem" if needed else "warning", f"no {stage} worker is running{waiting}", start)
    workers = f"{group.members} {stage} worker{'s' if group.members > 1 else ''}"
    if lag > _MUCH:
        return Finding(
            stage,
            "warning",
            f"{workers}, and {lag} records behind",
            f"see its log; more workers share the work: {start}",
        )
    return Finding(stage, "ok", f"{workers}, {lag} records behind")


async def _lag(log: Log, topic: str, group: Group) -> int:
    places = {Partition(topic, number) for number in range(await log.partitions(topic))} | set(group.committed)
    bounds = await asyncio.gather(*(log.bounds(place) for place in places))
    # Who has committed nothing yet begins at the beginning.
    return sum(
        max(0, end - max(first, group.committed.get(place, first)))
        for place, (first, end) in zip(places, bounds, strict=True)
    )


async def _dead_letters(log: Log, topic: str, namespace: Namespace) -> Finding:
    places = [Partition(topic, number) for number in range(await log.partitions(topic))]
    bounds = await asyncio.gather(*(log.bounds(place) for place in places))
    if (records := sum(end - first for first, end in bounds)) > _MANY_LETTERS:
        return Finding("dead letters", "warning", f"{topic} holds {records} records", _REDRIVE.format(topic))
    shelf = await read_letters(log, namespace, Wanted())
    left = [letter for letter in shelf.latest() if shelf.redriven_ms(letter) is None]
    if not left:
        says = "all dead letters were redriven" if shelf.letters else "there are no dead letters"
        return Finding("dead letters", "ok", says)
    last = left[-1]
    return Finding(
        "dead letters",
        "warning",
        f"{len(left)} dead letters; the last: {last.stage} could not use a record ({last.reason})",
        _REDRIVE.format(topic),
    )


def _clock(skew: tuple[int, int] | None) -> Finding:
    if skew is None:
        return Finding("clock", "ok", "this Kafka does not tell its time, so clocks were not compared")
    ahead_ms, wrong_ms = skew
    if abs(ahead_ms) - wrong_ms <= _SKEW_MS:
        return Finding("clock", "ok", f"this machine's clock and Kafka's differ by {abs(ahead_ms)} ms (± {wrong_ms})")
    direction = "ahead of" if ahead_ms > 0 else "behind"
    says = f"Kafka's clock is {abs(ahead_ms) / 1000:.1f} s {direction} this machine's: deadlines and resumes go wrong"
    return Finding("clock", "problem", says, "run NTP (chrony, systemd-timesyncd) on all machines")
