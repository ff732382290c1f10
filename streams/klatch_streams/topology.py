"""The table of stages: what each reads, follows and writes.

The Driver, the docs' picture and `faults` (which says what does not fit together, before anything starts) read it. A
stage is a decider, whose effects follow from its input alone, or a doer, which also asks the world outside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from klatch_schemas import topics as t
from klatch_schemas.topics import Topic


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: a stage owns partitions of `consumes` as a consumer group, and what belongs to them elsewhere."""

    name: str
    kind: Literal["decider", "doer"]
    consumes: Topic
    writes: tuple[Topic, ...]
    purpose: str
    follows: tuple[Topic, ...] = ()
    """Topics of which it reads the partitions with the numbers it owns, without a group: they are co-partitioned."""
    state: Topic | None = None
    """Compacted, co-partitioned: where its snapshots are."""


ADMISSION: Final = Stage(
    name="admission",
    kind="decider",
    consumes=t.CHAT_REQUESTS,
    writes=(t.CHAT_ADMITTED, t.CHAT_STREAM, t.CHAT_REQUESTS),
    state=t.ADMISSION_STATE,
    purpose="Admits each request once, before its deadline and within its tenant's limits, or refuses it.",
)
SCREENING: Final = Stage(
    name="screening",
    kind="doer",
    consumes=t.CHAT_REQUESTS,
    writes=(t.TRUST_VERDICTS,),
    purpose="Judges the text of each request, beside admission.",
)
GENERATION: Final = Stage(
    name="generation",
    kind="doer",
    consumes=t.CHAT_ADMITTED,
    follows=(t.TRUST_VERDICTS, t.CHAT_STREAM),
    writes=(t.CHAT_STREAM, t.CHAT_TURNS, t.CHAT_REQUESTS),
    state=t.GENERATION_STATE,
    purpose="Joins admission and verdict, asks the model, writes the stream, settles the usage.",
)
MEMORY: Final = Stage(
    name="memory",
    kind="doer",
    consumes=t.CHAT_TURNS,
    writes=(),
    purpose="Embeds finished turns into the vector index.",
)

STAGES: Final[tuple[Stage, ...]] = (ADMISSION, SCREENING, GENERATION, MEMORY)


def faults(stages: Sequence[Stage] = STAGES) -> Iterator[str]:
    """What does not fit together in the table, in words that say what to change."""
    for stage in stages:
        for topic in (*stage.follows, *((stage.state,) if stage.state else ())):
            if topic.partitioning != stage.consumes.partitioning:
                yield (
                    f"{stage.name} owns {stage.consumes.name} by {stage.consumes.partitioning} and cannot follow "
                    f"{topic.name}, which is partitioned by {topic.partitioning}: give both the same partitioning"
                )
        for topic in (stage.consumes, *stage.follows):
            if stage.name not in topic.read_by:
                yield f'{topic.name} does not name {stage.name} in read_by: add "{stage.name}" to its row'
        for topic in stage.writes:
            if not {stage.name, "every stage"} & set(topic.written_by):
                yield f'{topic.name} does not name {stage.name} in written_by: add "{stage.name}" to its row'
        if stage.state and stage.state.cleanup != "compact":
            yield f"{stage.state.name} holds snapshots of {stage.name} and is not compacted: set cleanup to compact"
