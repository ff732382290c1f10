"""Whether admission kept every limit, from the log alone: decided once more, and added up once more.

Two checks that fail for different faults. `redecided` folds each tenant's log anew and compares what it comes to with
what was decided under kills: a ledger that lost or doubled something decides otherwise. `exceeded` adds up what the log
says was admitted and settled, in the plainest way, against the limits of whole tenants that were in force.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    Limits,
    QuotaLimitSet,
    UsageSettled,
)
from klatch_schemas.topics import DAY_MS
from klatch_streams.admission import Admission
from klatch_streams.kernel import Input
from klatch_streams.quota.ledger import Ledger
from klatch_workers.torture.evidence import Entry, Evidence
from klatch_workers.torture.report import Violation

_MINUTE_MS: Final = 60_000


def broken_limits(evidence: Evidence) -> list[Violation]:
    """Every decision that was not the log's, and every limit that was exceeded."""
    if evidence.bare:
        return []
    return [*redecided(evidence), *exceeded(evidence)]


def redecided(evidence: Evidence) -> Iterator[Violation]:
    """Requests that were admitted, or refused, other than their tenant's log says."""
    expected = dict(_decisions(evidence.requests))
    for entry in evidence.admitted:
        said = entry.said
        if not isinstance(said, ChatAdmitted | ChatRefused):
            continue
        whose = said.request if isinstance(said, ChatAdmitted) else said
        due = expected.get((whose.tenant, str(whose.request)))
        if due is None or _verdict(due) != _verdict(said):
            what = f"{_verdict(said)}, where its tenant's log says {_verdict(due) if due else 'nothing'}"
            yield Violation("missettled", str(whose.request), what, (entry.position,))


def _decisions(requests: Sequence[Entry]) -> Iterator[tuple[tuple[str, str], ChatAdmitted | ChatRefused]]:
    admission, states = Admission(), dict[tuple[int, str], Ledger]()
    for entry in requests:
        tenant = getattr(entry.said, "tenant", None)
        if not isinstance(entry.said, Event) or tenant is None:
            continue
        key = (entry.partition, str(tenant))
        state = states.get(key) or admission.initial(str(tenant))
        states[key], effects = admission.decide(state, Input(entry.said, entry.timestamp_ms))
        for event in (effect.event for effect in effects):
            if isinstance(event, ChatAdmitted):
                yield (event.request.tenant, event.request.request), event
            elif isinstance(event, ChatRefused):
                yield (event.tenant, event.request), event


def _verdict(said: ChatAdmitted | ChatRefused) -> str:
    return "admitted" if isinstance(said, ChatAdmitted) else f"refused by {said.refusal.limit or said.refusal.code}"


# --- added up --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Fact:
    """An admitted request."""

    entered_ms: int
    until_ms: int
    tokens: int


@dataclass(slots=True)
class _Tenant:
    """What a tenant's log has said so far."""

    limits: Limits = Limits()
    facts: dict[str, _Fact] = field(default_factory=dict[str, _Fact])

    def over(self, now_ms: int) -> Iterator[str]:
        """The limits of the whole tenant that are exceeded now."""
        facts = self.facts.values()
        minute = [fact for fact in facts if fact.entered_ms > now_ms - _MINUTE_MS]
        used = {
            "requests_per_minute": len(minute) - (self.limits.burst_requests or 0),
            "tokens_per_minute": sum(fact.tokens for fact in minute) - (self.limits.burst_tokens or 0),
            "tokens_per_day": sum(fact.tokens for fact in facts if fact.entered_ms // DAY_MS == now_ms // DAY_MS),
            "concurrent_requests": sum(fact.until_ms > now_ms for fact in facts),
        }
        for name, most in self.limits.model_dump(exclude_none=True).items():
            if used.get(name, 0) > most:
                yield f"{name} is {used[name]} of {most}"


def exceeded(evidence: Evidence) -> Iterator[Violation]:
    """Requests with which a limit of their whole tenant was exceeded, at the moment of their admission."""
    admitted = {
        (entry.said.request.tenant, entry.said.request.request): entry.said
        for entry in evidence.admitted
        if isinstance(entry.said, ChatAdmitted)
    }
    tenants = defaultdict[str, _Tenant](_Tenant)
    for entry in evidence.requests:
        match entry.said:
            case QuotaLimitSet(tenant=name, limits=limits):
                tenants[name].limits = limits
            case UsageSettled(tenant=name, request=request, usage=usage):
                fact = tenants[name].facts.get(request)
                if fact and fact.until_ms > entry.timestamp_ms:
                    fact.until_ms, fact.tokens = entry.timestamp_ms, usage.total_tokens
            case ChatRequested(tenant=name, request=request) if request not in tenants[name].facts:
                if kept := admitted.get((name, request)):
                    # What it was granted later is in its settlement; until then it only counts too little here.
                    until, tokens = kept.reservation.expires_ms, kept.reservation.tokens
                    tenants[name].facts[request] = _Fact(entry.timestamp_ms, until, tokens)
                    for what in tenants[name].over(entry.timestamp_ms):
                        yield Violation("missettled", request, f"admitted though {what}", (entry.position,))
            case _:
                pass
