"""Klatch's topics on a cluster: created from the table, described, and checked against it.

Creating is idempotent and never changes a topic that exists; `check` says what differs and how to change it. Longer
retention than the table's is not a difference. Partition counts are fixed when a topic is created, so everybody else
reads them from the cluster and assumes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from klatch_schemas.topics import TOPICS, Namespace, Topic
from klatch_streams.kafka.admin import Wanted, administrator
from klatch_streams.kafka.options import KafkaOptions

_NAMESPACE = Namespace()


@dataclass(frozen=True, slots=True)
class Partitions:
    """Partition counts by what topics are keyed by; ledgers have one."""

    conversation: int = 8
    tenant: int = 8

    def of(self, topic: Topic) -> int:
        """The count for `topic`."""
        match topic.partitioning:
            case "conversation":
                return self.conversation
            case "tenant":
                return self.tenant
            case "ledger":
                return 1


@dataclass(frozen=True, slots=True)
class Described:
    """A topic of the table, as it is on the cluster."""

    topic: Topic
    name: str
    partitions: int | None
    """None: there is no such topic."""
    replication: int = 0
    config: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Problem:
    """What differs from the table, and what to do about it."""

    topic: str
    what: str
    """missing, partitions, or the name of a configuration."""
    says: str


async def create_topics(
    where: str | KafkaOptions,
    namespace: Namespace = _NAMESPACE,
    partitions: Partitions | None = None,
    *,
    replication: int = 1,
) -> list[str]:
    """Create what is missing, and wait until it has leaders; returns the names made. Raises LogError."""
    counts = partitions or Partitions()
    async with administrator(_options(where)) as admin:
        names = {namespace.of(topic): topic for topic in TOPICS}
        there = await admin.topics(list(names))
        missing = [
            Wanted(name, counts.of(topic), replication, topic.config)
            for name, topic in names.items()
            if name not in there
        ]
        made = await admin.create(missing) if missing else []
        await admin.until_led(list(names))
    return made


async def describe_topics(where: str | KafkaOptions, namespace: Namespace = _NAMESPACE) -> list[Described]:
    """Every topic of the table as it is on the cluster. Raises LogError."""
    async with administrator(_options(where)) as admin:
        there = await admin.topics([namespace.of(topic) for topic in TOPICS])
        configs = await admin.configs(list(there))
    described = list[Described]()
    for topic in TOPICS:
        name = namespace.of(topic)
        if name in there:
            described.append(Described(topic, name, there[name].partitions, there[name].replication, configs[name]))
        else:
            described.append(Described(topic, name, None))
    return described


async def check_topics(
    where: str | KafkaOptions, namespace: Namespace = _NAMESPACE, partitions: Partitions | None = None
) -> list[Problem]:
    """What differs from the table (and from `partitions`, if given). Raises LogError."""
    options = _options(where)
    return check(await describe_topics(options, namespace), options.bootstrap, partitions)


def check(described: Sequence[Described], bootstrap: str, partitions: Partitions | None = None) -> list[Problem]:
    """What is wrong with topics that are described so."""
    return [
        problem
        for found in described
        for problem in (
            *_partition_problems(found, described, bootstrap, partitions),
            *_config_problems(found, bootstrap),
        )
    ]


def _partition_problems(
    found: Described, described: Sequence[Described], bootstrap: str, wanted: Partitions | None
) -> Iterator[Problem]:
    if found.partitions is None:
        yield Problem(found.name, "missing", f"{found.name} does not exist: run `klatch topics create`")
        return
    kind = found.topic.partitioning
    count = wanted.of(found.topic) if wanted else _usual(kind, described)
    if found.partitions != count:
        why = "a ledger has one" if kind == "ledger" else f"topics partitioned by {kind} have {count} here"
        yield Problem(
            found.name,
            "partitions",
            f"{found.name} has {found.partitions} partitions and {why}: keys would be looked for in the wrong place. "
            f"Stop klatch, delete it with `kafka-topics.sh --bootstrap-server {bootstrap} --delete --topic "
            f"{found.name}` (its records are lost), and run `klatch topics create --partitions {count}`",
        )


def _usual(kind: str, described: Sequence[Described]) -> int:
    """What most topics of a kind have: those that differ from it are the ones to change."""
    if kind == "ledger":
        return 1
    counts = [one.partitions for one in described if one.topic.partitioning == kind and one.partitions is not None]
    return max(counts, key=lambda count: (counts.count(count), count))


def _config_problems(found: Described, bootstrap: str) -> Iterator[Problem]:
    if found.partitions is None:
        return
    for key, wanted in found.topic.config.items():
        actual = found.config.get(key, "")
        if not _as_wanted(key, actual, wanted):
            yield Problem(
                found.name,
                key,
                f"{found.name} has {key}={actual} and needs {wanted}: run `kafka-configs.sh --bootstrap-server "
                f"{bootstrap} --alter --topic {found.name} --add-config {key}={wanted}`",
            )


def _as_wanted(key: str, actual: str, wanted: str) -> bool:
    if key != "retention.ms" or not actual.lstrip("-").isdigit():
        return actual == wanted
    longest = float("inf")
    kept, needed = (longest if int(value) < 0 else int(value) for value in (actual, wanted))
    return kept >= needed


def _options(where: str | KafkaOptions) -> KafkaOptions:
    return KafkaOptions(where) if isinstance(where, str) else where
