"""Whether admission kept every limit, from the log alone: decided once more, and added up once more.

Two checks that fail for different faults. `redecided` folds each tenant's log anew and compares what it comes to with
what was decided under kills: a ledger that lost or doubled something decides otherwise. `exceeded` adds up what the log
says was admitted and settled, in the plainest way, against the limits that were in force: of whole tenants and of
their parts, of minutes, days and months, of requests, tokens and money.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    LimitRule,
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

Scope = tuple[str | None, ...]
"""Use case, person, model; None: whatever it is."""
_DIMENSIONS: Final = ("use_case", "person", "model")
_EACH: Final = "*"
_WHOLE: Final[Scope] = (None, None, None)


@dataclass(slots=True)
class _Fact:
    """An admitted request."""

    entered_ms: int
    until_ms: int
    tokens: int
    micros: int
    scopes: Mapping[Scope, Limits]
    """Those that it counts in, each with what limited it when it was admitted."""
    settled: bool = False
    month: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.month = _month(self.entered_ms)


@dataclass(slots=True)
class _Tenant:
    """What a tenant's log has said so far."""

    now_ms: int = 0
    set: QuotaLimitSet | None = None
    facts: dict[str, _Fact] = field(default_factory=dict[str, _Fact])

    def scopes(self, asked: ChatRequested) -> dict[Scope, Limits]:
        """What limits a request: the whole tenant, and of rules over the same dimensions the one that names most."""
        if self.set is None:
            return {_WHOLE: Limits()}
        names = (asked.use_case, asked.person or "", str(asked.body.get("model") or ""))
        found: dict[Scope, Limits] = {_WHOLE: self.set.limits}
        # Those that name more come later, and replace what named less.
        for rule in sorted(self.set.rules, key=_how_much_it_names):
            pattern = _pattern(rule)
            if any(pattern) and all(said in {None, _EACH, name} for said, name in zip(pattern, names, strict=True)):
                found[tuple(said and name for said, name in zip(pattern, names, strict=True))] = rule.limits
        return found

    def over(self, fact: _Fact) -> Iterator[str]:
        """The limits that are exceeded now, of those that the request which has just come counts in."""
        for scope, limits in fact.scopes.items():
            used = self._used([one for one in self.facts.values() if scope in one.scopes], limits)
            for name, most in limits.model_dump(exclude_none=True).items():
                if used.get(name, 0) > most:
                    whose = ", ".join(f"{of} {said}" for of, said in zip(_DIMENSIONS, scope, strict=True) if said)
                    yield f"{name} is {used[name]} of {most}{f' of {whose}' if whose else ''}"

    def _used(self, facts: Sequence[_Fact], limits: Limits) -> dict[str, int]:
        this_month = _month(self.now_ms)
        minute = [one for one in facts if one.entered_ms > self.now_ms - _MINUTE_MS]
        day = [one for one in facts if one.entered_ms // DAY_MS == self.now_ms // DAY_MS]
        month = [one for one in facts if one.month == this_month]
        return {
            "requests_per_minute": len(minute) - (limits.burst_requests or 0),
            "tokens_per_minute": sum(one.tokens for one in minute) - (limits.burst_tokens or 0),
            "tokens_per_day": sum(one.tokens for one in day),
            "tokens_per_month": sum(one.tokens for one in month),
            "cost_micros_per_day": sum(one.micros for one in day),
            "cost_micros_per_month": sum(one.micros for one in month),
            "concurrent_requests": sum(one.until_ms > self.now_ms for one in facts),
        }


def _pattern(rule: LimitRule) -> Scope:
    return (rule.use_case, rule.person, rule.model)


def _how_much_it_names(rule: LimitRule) -> tuple[int, tuple[bool, ...]]:
    named = tuple(said not in {None, _EACH} for said in _pattern(rule))
    return sum(named), named


def _month(at_ms: int) -> tuple[int, int]:
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return at.year, at.month


def exceeded(evidence: Evidence) -> Iterator[Violation]:
    """Requests with which a limit was exceeded, at the moment of their admission."""
    admitted = {
        (entry.said.request.tenant, entry.said.request.request): entry.said.reservation
        for entry in evidence.admitted
        if isinstance(entry.said, ChatAdmitted)
    }
    tenants = defaultdict[str, _Tenant](_Tenant)
    for entry in evidence.requests:
        if not isinstance(entry.said, QuotaLimitSet | UsageSettled | ChatRequested):
            continue
        tenant = tenants[entry.said.tenant]
        tenant.now_ms = max(tenant.now_ms, entry.timestamp_ms)
        match entry.said:
            case QuotaLimitSet():
                tenant.set = entry.said
            case UsageSettled(request=request, usage=usage, cost_micros=micros):
                fact = tenant.facts.get(request)
                if fact and not fact.settled:
                    fact.until_ms = min(fact.until_ms, tenant.now_ms)
                    fact.settled, fact.tokens, fact.micros = True, usage.total_tokens, micros
            case ChatRequested(request=request) if request not in tenant.facts:
                if kept := admitted.get((entry.said.tenant, request)):
                    # What it was granted later is in its settlement; until then it only counts too little here.
                    scopes = tenant.scopes(entry.said)
                    fact = _Fact(tenant.now_ms, kept.expires_ms, kept.tokens, kept.cost_micros, scopes)
                    tenant.facts[request] = fact
                    for what in tenant.over(fact):
                        yield Violation("missettled", request, f"admitted though {what}", (entry.position,))
            case _:
                pass
