"""What is known of each accepted request, put together from all the evidence: what the judge looks at."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from klatch_schemas.events import ChatAdmitted, ChatRefused, ChatRequested, TurnFinished, UsageSettled
from klatch_schemas.ids import RequestId
from klatch_workers.torture.evidence import Asked, Entry, Evidence, ModelCall, Observation
from klatch_workers.torture.report import Broken, Violation
from klatch_workers.torture.told import Told, fold_stream


@dataclass(frozen=True, slots=True)
class Case:
    """One accepted request, with all that is known of it."""

    request: RequestId
    asked: Asked
    acknowledged: bool
    published: Sequence[Entry]
    decisions: Sequence[Entry]
    told: Told
    settlements: Sequence[Entry]
    turns: Sequence[Entry]
    calls: Sequence[ModelCall]
    observations: Sequence[Observation]
    bare: bool = False
    """Whether the system keeps nothing but requests and streams."""

    @property
    def stopped(self) -> bool:
        """Whether a budget ended its reply, of a tenant that has one."""
        end = self.told.assembly.end
        return self.asked.turn.limited and end is not None and end.stopped_by is not None

    def broke(self, kind: Broken, what: str, *entries: Entry | None) -> Violation:
        """A broken promise, with where to look."""
        positions = tuple(entry.position for entry in (*entries, self.told.ended) if entry)
        return Violation(kind, self.request, what, positions)


def cases_of(evidence: Evidence) -> dict[RequestId, Case]:
    """Every request that the log holds, or that a client was told is accepted."""
    published, settlements = _by_request(evidence.requests, ChatRequested), _by_request(evidence.requests, UsageSettled)
    decisions = defaultdict[RequestId, list[Entry]](list)
    for entry in evidence.admitted:
        match entry.said:
            case ChatAdmitted():
                decisions[entry.said.request.request].append(entry)
            case ChatRefused():
                decisions[entry.said.request].append(entry)
            case _:
                pass
    stream, turns = _by_request(evidence.stream), _by_request(evidence.turns, TurnFinished)
    calls, observations = defaultdict[RequestId, list[ModelCall]](list), defaultdict[RequestId, list[Observation]](list)
    for call in evidence.calls:
        calls[call.request].append(call)
    for observation in evidence.observations:
        observations[observation.request].append(observation)
    return {
        request: Case(
            request,
            asked,
            request in evidence.acknowledged,
            published[request],
            decisions[request],
            fold_stream(stream[request]),
            settlements[request],
            turns[request],
            calls[request],
            observations[request],
            evidence.bare,
        )
        for request, asked in evidence.asked.items()
        if request in published or request in evidence.acknowledged
    }


def _by_request(entries: Sequence[Entry], of: type | None = None) -> defaultdict[RequestId, list[Entry]]:
    found = defaultdict[RequestId, list[Entry]](list)
    for entry in entries:
        if of is None or isinstance(entry.said, of):
            found[RequestId(str(getattr(entry.said, "request", "")))].append(entry)
    return found
