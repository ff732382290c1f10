"""The whole topology without a broker: the production deciders and policies, with only the edges replaced.

Every record is really encoded, keyed, partitioned and decoded. Time moves when `advance` says so, and everything
else happens before `feed` returns, in one order. A stage can be killed between any two of its writes: it goes on as
a new process would, from its snapshots and its committed offset, and what it repeats stands in the log.

    driver = Driver(DeciderStage(Admission()), DoerStage(topology.SCREENING, screen), GenerationStage(model))
    driver.feed(request)
    driver.reply(request.request).end
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Said
from klatch_schemas.codec import Unreadable
from klatch_schemas.events import ChatAdmitted, Event, Snapshot
from klatch_schemas.records import Draft, Partition, Record, partition_of
from klatch_schemas.topics import CHAT_STREAM, TOPICS, Namespace, Topic
from klatch_streams.addresses import Addresses
from klatch_streams.dead_letters import DeadLetter, dead_letter
from klatch_streams.kernel import Decider, Emit, Input, drafts_of
from klatch_streams.topology import STAGES, Stage

S = TypeVar("S")
E = TypeVar("E", bound=Event)

START_MS: Final = 1_800_014_400_000
"""2027-01-15 12:00 UTC: a time like any other, on a whole minute."""


class Killed(BaseException):
    """A stage's process is gone, in the middle of whatever it did. Only the Driver raises and catches it."""


class Runs(Protocol):
    """A stage as the Driver runs it."""

    row: Stage

    def step(self, driver: "Driver") -> bool:
        """Do what can be done now; False if there was nothing. May be left at any write by `Killed`."""
        ...

    def restart(self) -> None:
        """Begin anew, with what the log holds and nothing else."""
        ...


class Heard(NamedTuple):
    """A record, and what it says."""

    record: Record
    event: Said


class Driver:
    """Stages over a log in memory."""

    def __init__(self, *stages: Runs, partitions: int = 2, start_ms: int = START_MS) -> None:
        self.now_ms = start_ms
        self.namespace = Namespace()
        self._stages = {stage.row.name: stage for stage in stages}
        self._partitions = partitions
        self._log = dict[Partition, list[Record]]()
        self._lives = dict[str, int]()
        for topic in TOPICS:
            for partition in self.partitions(topic):
                self._log[partition] = []

    # What a test does.

    def feed(self, *events: Event) -> None:
        """Append events to the topics they belong to, one after another, and let everything follow."""
        for event in events:
            topic = topic_of(event)
            self.append(codec.draft(self.namespace.of(topic), key_of(topic, event), event))
        self.run()

    def append(self, *drafts: Draft) -> None:
        """Append records as they are; nothing follows until `run`, `feed` or `advance`."""
        for draft in drafts:
            count = len(self.partitions(self._topic(draft.topic)))
            number = partition_of(draft.key or b"", count) if draft.partition is None else draft.partition
            partition = Partition(draft.topic, number)
            held = self._log[partition]
            held.append(Record(partition, len(held), self.now_ms, draft.key, draft.value, tuple(draft.headers)))

    def advance(self, ms: int) -> None:
        """Let `ms` milliseconds pass, one event after another."""
        self.now_ms += ms
        self.run()

    def crash(self, stage: str, after: int) -> None:
        """Kill the stage as soon as it has written `after` more effects or snapshots, and start it again."""
        if stage not in self._stages:
            raise KeyError(f"no stage {stage!r} here: there are {', '.join(self._stages)}")
        self._lives[stage] = after

    def run(self) -> None:
        """Let all stages work until none has anything to do."""
        working = True
        while working:
            # A tuple: every stage has its turn.
            working = any(tuple(self._step(stage) for stage in self._stages.values()))

    # What a test sees.

    def records(self, topic: Topic) -> list[Record]:
        """All records of a topic, partition by partition."""
        return [record for partition in self.partitions(topic) for record in self._log[partition]]

    def heard(self, topic: Topic) -> list[Heard]:
        """What the readable records of a topic say."""
        return list(readable(self.records(topic)))

    def events(self, model: type[E]) -> list[E]:
        """All events of one kind, in the topic they belong to."""
        topic = next(topic for topic in TOPICS if model in topic.holds)
        found = list[E]()
        for record in self.records(topic):
            with suppress(Unreadable):
                found.append(codec.decode_as(model, record.value))
        return found

    def reply(self, request: str) -> Assembly:
        """The stream of a request, as a reader who comes now puts it together."""
        assembly = Assembly()
        for heard in self.stream(request):
            assembly.hear(heard.record.offset, heard.event)
        return assembly

    def stream(self, request: str) -> list[Heard]:
        """The records of a request's stream."""
        return [heard for heard in self.heard(CHAT_STREAM) if getattr(heard.event, "request", None) == request]

    # What stages do.

    def partitions(self, topic: Topic) -> list[Partition]:
        """The partitions of a topic."""
        count = 1 if topic.partitioning == "ledger" else self._partitions
        return [Partition(self.namespace.of(topic), number) for number in range(count)]

    def read(self, partition: Partition, offset: int) -> Sequence[Record]:
        """The records of a partition from `offset` on."""
        return self._log[partition][offset:]

    def write(self, stage: Stage, *batches: Sequence[Draft]) -> None:
        """Append a stage's records, as far as it lives; a batch stands as a whole or not at all."""
        self._die_if_due(stage)
        for batch in batches:
            self.append(*batch)
            if stage.name in self._lives:
                self._lives[stage.name] -= 1
            self._die_if_due(stage)

    def _die_if_due(self, stage: Stage) -> None:
        if self._lives.get(stage.name) == 0:
            del self._lives[stage.name]
            raise Killed(stage.name)

    def _step(self, stage: Runs) -> bool:
        try:
            return stage.step(self)
        except Killed:
            stage.restart()
            return True

    def _topic(self, name: str) -> Topic:
        for topic in TOPICS:
            if self.namespace.of(topic) == name:
                return topic
        raise KeyError(f"no topic {name!r} in the table")


class DeciderStage(Generic[S]):
    """Runs a decider as its owner does: effects, then snapshots, then the offset, once for all that has arrived."""

    def __init__(self, decider: Decider[S]) -> None:
        self.row = next(row for row in STAGES if row.name == decider.name)
        self._decider = decider
        self._committed = dict[Partition, int]()
        self._states = dict[Partition, dict[str, tuple[S, int]]]()

    def step(self, driver: Driver) -> bool:
        """Take what has arrived on every partition."""
        return any(tuple(self._take(driver, partition) for partition in driver.partitions(self._decider.input)))

    def restart(self) -> None:
        """Forget; the states are read from the snapshots when they are needed again."""
        self._states.clear()

    def state(self, key: str) -> S:
        """The state of a key, as far as it was decided."""
        for states in self._states.values():
            if key in states:
                return states[key][0]
        return self._decider.initial(key)

    def _take(self, driver: Driver, partition: Partition) -> bool:
        records = driver.read(partition, self._committed.get(partition, 0))
        if partition not in self._states:
            self._states[partition] = dict(self._restored(driver, partition))
        changed = dict[str, dict[str, object]]()
        for record in records:
            self._decide(driver, record, changed)
        if records:
            driver.write(self.row, list(self._snapshots(partition, changed)))
            self._committed[partition] = records[-1].offset + 1
        return bool(records)

    def _decide(self, driver: Driver, record: Record, changed: dict[str, dict[str, object]]) -> None:
        event, key = self._heard(driver, record)
        if event is None:
            return
        states = self._states[record.partition]
        state, applied = states.get(key) or (self._decider.initial(key), -1)
        if record.offset <= applied:
            return
        changed.setdefault(key, self._decider.dump(state))
        state, effects = self._decider.decide(state, Input(event, record.timestamp_ms))
        driver.write(self.row, *([draft] for draft in drafts_of(effects, record, driver.namespace)))
        states[key] = state, record.offset

    def _heard(self, driver: Driver, record: Record) -> tuple[Event | None, str]:
        addresses = Addresses(self._decider.input, len(driver.partitions(self._decider.input)))
        try:
            event = _decoded(record)
            key = addresses.key_of(event)
            if isinstance(event, Event) and addresses.belongs(record, key):
                return event, key
            driver.write(self.row, [addresses.move(record, key)])
        except DeadLetter as why:
            driver.write(self.row, [dead_letter(record, driver.namespace, self.row.name, why)])
        return None, ""

    def _snapshots(self, partition: Partition, before: dict[str, dict[str, object]]) -> Iterator[Draft]:
        topic = self._decider.state.name
        for key, parts in before.items():
            state, applied = self._states[partition][key]
            now = self._decider.dump(state)
            for part in parts.keys() - now.keys():
                yield Draft(topic, codec.dumps([key, part]), None, (), partition.number)
            for part, value in now.items():
                if parts.get(part) != value:
                    fields = {"kind": Snapshot.KIND, "key": key, "applied": applied, "state": value}
                    yield Draft(topic, codec.dumps([key, part]), codec.dumps(fields), (), partition.number)

    def _restored(self, driver: Driver, partition: Partition) -> Iterator[tuple[str, tuple[S, int]]]:
        latest = dict[bytes, bytes | None]()
        for record in driver.read(Partition(self._decider.state.name, partition.number), 0):
            latest[record.key or b""] = record.value
        found = dict[str, dict[str, Snapshot]]()
        for name, value in latest.items():
            if value is not None:
                key, part = msgspec.json.decode(name, type=tuple[str, str])
                found.setdefault(key, {})[part] = codec.decode_as(Snapshot, value)
        for key, parts in found.items():
            state = self._decider.load(key, {part: said.state for part, said in parts.items()})
            yield key, (state, max(said.applied for said in parts.values()))


Doer = Callable[[Record, Event], Sequence[Emit]]
"""What a stage without state does with an event: asks its edge, answers with effects."""


class DoerStage:
    """Runs a stage that keeps nothing: effects, then the offset. It skips what it cannot read."""

    def __init__(self, row: Stage, do: Doer) -> None:
        self.row = row
        self._do = do
        self._committed = dict[Partition, int]()

    def step(self, driver: Driver) -> bool:
        """Take what has arrived on every partition."""
        worked = False
        for partition in driver.partitions(self.row.consumes):
            records = driver.read(partition, self._committed.get(partition, 0))
            for heard in readable(records):
                if isinstance(heard.event, Event):
                    effects = self._do(heard.record, heard.event)
                    driver.write(self.row, *([draft] for draft in drafts_of(effects, heard.record, driver.namespace)))
            self._committed[partition] = self._committed.get(partition, 0) + len(records)
            worked = worked or bool(records)
        return worked

    def restart(self) -> None:
        """Nothing is remembered but the offset."""


def readable(records: Sequence[Record]) -> Iterator[Heard]:
    """What the readable ones of `records` say."""
    for record in records:
        try:
            yield Heard(record, codec.decode(record.value))
        except Unreadable:
            continue


def topic_of(event: Event) -> Topic:
    """The one topic that an event belongs to."""
    for topic in TOPICS:
        if type(event) in topic.holds and topic.key in {"tenant", "conversation"}:
            return topic
    raise KeyError(f"no topic is fed with {event.KIND}: append a draft")


def key_of(topic: Topic, event: Event) -> str:
    """The record key of an event in its topic."""
    source: object = event.request if isinstance(event, ChatAdmitted) else event
    key = getattr(source, topic.key, None)
    if not isinstance(key, str):
        raise TypeError(f"{type(event).__name__} does not know its {topic.key}: append a draft with a key")
    return key


def _decoded(record: Record) -> Said:
    try:
        return codec.decode(record.value)
    except Unreadable as error:
        raise DeadLetter("unreadable", str(error)) from error
