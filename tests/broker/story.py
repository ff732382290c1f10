"""A request as the log tells of it."""

from dataclasses import dataclass

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.chunks import Reply
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import ChatAdmitted, Event, StreamEnd, TurnFinished, UsageSettled
from klatch_schemas.records import Record


@dataclass(frozen=True, slots=True)
class Story:
    """What stands of one request in each topic."""

    request: str
    requests: list[tuple[Record, Event | Delta]]
    stream: list[tuple[Record, Event | Delta]]
    turns: list[tuple[Record, Event | Delta]]

    @property
    def leaves_a_turn(self) -> bool:
        """Whether there is something to remember, by what stands in its stream."""
        assembly = Assembly()
        for record, event in self.stream:
            assembly.hear(record.offset, event)
        return bool(assembly.standing) and not assembly.state.undone

    @property
    def ends(self) -> list[StreamEnd]:
        return [event for _, event in self.stream if isinstance(event, StreamEnd)]

    @property
    def settlements(self) -> set[bytes | None]:
        """Event ids of the settlements: one that was written twice is one."""
        return {record.header(codec.EVENT_ID) for record, event in self.requests if isinstance(event, UsageSettled)}

    @property
    def told(self) -> list[TurnFinished]:
        """The finished turns; one that was written twice is one."""
        turns = {record.header(codec.EVENT_ID): event for record, event in self.turns}
        return [turn for turn in turns.values() if isinstance(turn, TurnFinished)]

    def said_by(self, attempt: int) -> str:
        """What an attempt said, whether it counts or not."""
        reply = Reply()
        for _, event in self.stream:
            if isinstance(event, Delta) and event.attempt == attempt:
                reply.add(codec.loads(bytes(event.chunk)))
        return str(reply.messages()[0]["content"]) if reply.messages() else ""


def read(record: Record) -> Event | Delta | None:
    try:
        return codec.decode(record.value)
    except Unreadable:
        return None


def of_request(request: str, records: list[Record]) -> list[tuple[Record, Event | Delta]]:
    told = [(record, event) for record in records if (event := read(record))]
    named = [(record, event, event.request if isinstance(event, ChatAdmitted) else event) for record, event in told]
    return [(record, event) for record, event, about in named if getattr(about, "request", None) == request]
