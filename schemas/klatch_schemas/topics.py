"""The topic table: one row a topic, from which everything else about topics is generated.

Topic creation, `klatch topics check`, the AsyncAPI document, the docs' table and the co-partitioning check all read
`TOPICS`. Names here are bare; a deployment may put a namespace before them (`Namespace`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NewType

from klatch_schemas import events as ev
from klatch_schemas.events import Event

TopicName = NewType("TopicName", str)

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
MAX_RECORD_BYTES: Final = 10_000_000
"""The largest record that klatch writes: a chat body with a few pictures in it fits."""
MAX_BODY_BYTES: Final = 8_000_000
"""The largest chat body that a door takes: with its envelope it has to fit a record, on every topic it travels."""

Partitioning = Literal["conversation", "tenant", "ledger"]
"""Topics of one partitioning have the same partition count and are co-partitioned. Ledgers have one partition."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One row of the table."""

    name: TopicName
    key: str
    """What the record key holds, UTF-8."""
    holds: tuple[type[Event], ...]
    partitioning: Partitioning
    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    purpose: str
    cleanup: Literal["delete", "compact"] = "delete"
    retention_ms: int | None = None
    """None: for ever (and for compacted topics)."""
    timestamps: Literal["CreateTime", "LogAppendTime"] = "CreateTime"
    extra: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def config(self) -> dict[str, str]:
        """The Kafka topic configuration that `klatch topics create` sets and `check` compares."""
        retention = -1 if self.retention_ms is None else self.retention_ms
        return {
            "cleanup.policy": self.cleanup,
            "retention.ms": str(retention),
            "message.timestamp.type": self.timestamps,
            # Kafka counts the batch, which has a header; its default of 1 MiB refuses a body with one picture.
            "max.message.bytes": str(MAX_RECORD_BYTES + 65_536),
            **self.extra,
        }


# A snapshot a zombie wrote late must not outlive the owner's before the owner sees it: see `Snapshot`. Small
# segments keep a restore short, since the active segment is never compacted.
_STATE: Final = {
    "min.compaction.lag.ms": "60000",
    "segment.ms": "600000",
    "segment.bytes": "16777216",
    "min.cleanable.dirty.ratio": "0.2",
}

CHAT_REQUESTS = Topic(
    TopicName("chat.requests"),
    key="tenant",
    holds=(ev.ChatRequested, ev.EmbeddingRequested, ev.UsageSettled, ev.UsageRunning, ev.QuotaLimitSet),
    partitioning="tenant",
    written_by=("producers", "doors", "admission", "generation", "operators"),
    read_by=("admission", "screening", "generation", "doors", "views", "operators"),
    purpose="Requests for chat completions and embeddings, and what they turned out to cost.",
    retention_ms=7 * DAY_MS,
    # Decisions take their time from the log: a producer's clock decides nothing.
    timestamps="LogAppendTime",
)
CHAT_ADMITTED = Topic(
    TopicName("chat.admitted"),
    key="conversation",
    holds=(ev.ChatAdmitted, ev.ChatRefused),
    partitioning="conversation",
    written_by=("admission", "operators"),
    read_by=("generation", "views"),
    purpose="What admission decided.",
    retention_ms=DAY_MS,
)
TRUST_VERDICTS = Topic(
    TopicName("trust.verdicts"),
    key="conversation",
    holds=(ev.TrustVerdict,),
    partitioning="conversation",
    written_by=("screening", "operators"),
    read_by=("generation", "views"),
    purpose="What screening decided; kept for audit.",
    retention_ms=30 * DAY_MS,
)
CHAT_STREAM = Topic(
    TopicName("chat.stream"),
    key="conversation",
    holds=(
        ev.StreamAttempt,
        ev.StreamDelta,
        ev.StreamEnd,
        ev.StreamCancel,
        ev.StreamRetract,
        ev.StreamBudget,
        ev.EmbeddingAdmitted,
    ),
    partitioning="conversation",
    written_by=("generation", "admission", "anyone who cancels"),
    read_by=("consumers", "doors", "generation"),
    purpose="Replies while they are made.",
    retention_ms=DAY_MS,
)
CHAT_TURNS = Topic(
    TopicName("chat.turns"),
    key="conversation",
    holds=(ev.TurnFinished,),
    partitioning="conversation",
    written_by=("generation", "operators"),
    read_by=("memory", "generation"),
    purpose="Finished turns: the memory of conversations.",
)
EXPERIENCES = Topic(
    TopicName("memory.experiences"),
    key="tenant/person/name",
    holds=(ev.ExperienceLearned,),
    partitioning="tenant",
    written_by=("memory",),
    read_by=("memory",),
    purpose="What is known about people; a tombstone forgets.",
    cleanup="compact",
)
SKILL_CALLS = Topic(
    TopicName("skill.calls"),
    key="conversation",
    holds=(ev.SkillCalled,),
    partitioning="conversation",
    written_by=("generation",),
    read_by=("skills",),
    purpose="Skills invoked over topics.",
    retention_ms=7 * DAY_MS,
)
SKILL_RESULTS = Topic(
    TopicName("skill.results"),
    key="conversation",
    holds=(ev.SkillReturned,),
    partitioning="conversation",
    written_by=("skills",),
    read_by=("generation",),
    purpose="What skills answered.",
    retention_ms=7 * DAY_MS,
)
DEAD_LETTERS = Topic(
    TopicName("dead.letters"),
    key="the original key",
    holds=(),
    partitioning="tenant",
    written_by=("every stage", "operators"),
    read_by=("operators",),
    purpose="Records no stage could use: key, value and headers untouched, the reason in `dead-*` headers.",
    retention_ms=30 * DAY_MS,
)


def _ledger(name: str, key: str, holds: type[Event], purpose: str, read_by: tuple[str, ...] = ("generation",)) -> Topic:
    return Topic(
        TopicName(name),
        key=key,
        holds=(holds,),
        partitioning="ledger",
        written_by=("operators",),
        read_by=(*read_by, "operators"),
        purpose=purpose,
        cleanup="compact",
    )


PROMPTS = _ledger("prompts", "tenant/name/version", ev.PromptPublished, "Versions of prompts.")
SKILLS = _ledger("skills", "name", ev.SkillRegistered, "Skills on offer.")
MODELS = _ledger("models", "alias", ev.ModelRouted, "Routes of model names.", ("generation", "doors"))
EXPERIMENTS = _ledger("experiments", "name", ev.ExperimentSet, "Experiments and their arms.")
TENANTS = _ledger("tenants", "tenant", ev.TenantConfigured, "Tenants, key hashes, limits.", ("doors",))

ADMISSION_STATE = Topic(
    TopicName("admission.state"),
    key="tenant, and the part of its state",
    holds=(ev.Snapshot,),
    partitioning="tenant",
    written_by=("admission",),
    read_by=("admission", "operators"),
    purpose="Admission's ledger of every tenant, with the offset it has applied.",
    cleanup="compact",
    extra=_STATE,
)
GENERATION_STATE = Topic(
    TopicName("generation.state"),
    key="what the snapshot is of",
    holds=(ev.Snapshot,),
    partitioning="conversation",
    written_by=("generation",),
    read_by=("generation",),
    purpose="Where generation stands in its partitions, and the last turn of every conversation.",
    cleanup="compact",
    extra=_STATE,
)

TOPICS: Final[tuple[Topic, ...]] = (
    CHAT_REQUESTS,
    CHAT_ADMITTED,
    TRUST_VERDICTS,
    CHAT_STREAM,
    CHAT_TURNS,
    EXPERIENCES,
    PROMPTS,
    SKILLS,
    MODELS,
    EXPERIMENTS,
    TENANTS,
    SKILL_CALLS,
    SKILL_RESULTS,
    ADMISSION_STATE,
    GENERATION_STATE,
    DEAD_LETTERS,
)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A prefix that lets replays and tests live beside production: `test.` makes `test.chat.requests`."""

    prefix: str = ""

    @classmethod
    def named(cls, name: str) -> "Namespace":
        """The namespace called `name`; the empty name is production's."""
        return cls(f"{name}." if name else "")

    def of(self, topic: Topic) -> str:
        """The topic's full name in Kafka."""
        return self.prefix + topic.name

    def group(self, stage: str) -> str:
        """The consumer group of a stage."""
        return f"{self.prefix}klatch.{stage}"
