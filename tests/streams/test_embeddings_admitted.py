"""Embeddings in admission: the limits, the reservation and the settlement of a chat request, with another answer."""

from klatch_schemas.events import (
    ChatRefused,
    EmbeddingAdmitted,
    EmbeddingRequested,
    Event,
    LimitRule,
    Limits,
    QuotaLimitSet,
    StreamEnd,
    TokenPrice,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_STREAM
from klatch_streams.admission import Admission
from klatch_streams.kernel import Emit, Input
from klatch_streams.quota.ledger import Ledger
from klatch_streams.quota.report import standings

ACME = Tenant("acme")
NOW = 1_800_014_400_000
ADMISSION = Admission()


class Told:
    """A tenant's ledger, and what it is told."""

    def __init__(self, limits: Limits, *rules: LimitRule) -> None:
        self.state: Ledger = ADMISSION.initial(ACME)
        price = TokenPrice(prompt=20_000)
        self.say(QuotaLimitSet(tenant=ACME, limits=limits, rules=rules, weight=2, priority=7, prices={"e": price}))

    def say(self, event: Event) -> list[Emit]:
        self.state, effects = ADMISSION.decide(self.state, Input(event, NOW))
        return list(effects)

    def ask(self, number: int, tokens: int = 100, deadline_ms: int | None = None) -> list[Emit]:
        request = RequestId(f"r{number}")
        return self.say(
            EmbeddingRequested(
                request=request,
                tenant=ACME,
                conversation=Conversation(request),
                person=Person("ann"),
                model="e",
                tokens=tokens,
                deadline_ms=deadline_ms,
            )
        )

    def used(self) -> dict[tuple[str | None, str], int]:
        return {(one.scope.get("person"), one.limit): one.used for one in standings(self.state)}


def test_they_are_admitted_in_the_stream_log_with_their_tenants_share_and_limits() -> None:
    [effect] = Told(Limits(requests_per_minute=2)).ask(1)
    assert (effect.topic, effect.key) == (CHAT_STREAM, "r1")
    assert isinstance(effect.event, EmbeddingAdmitted)
    assert (effect.event.weight, effect.event.priority) == (2, 7)
    assert effect.event.rate_limits
    assert effect.event.rate_limits.requests
    assert effect.event.rate_limits.requests.remaining == 1


def test_they_use_what_the_tenant_and_the_person_have_and_are_settled() -> None:
    told = Told(
        Limits(tokens_per_day=1_000, cost_micros_per_day=1_000, concurrent_requests=5),
        LimitRule(person="*", limits=Limits(tokens_per_day=500)),
    )
    told.ask(1)
    assert told.used() == {
        (None, "tokens_per_day"): 100,
        (None, "cost_micros_per_day"): 2,
        (None, "concurrent_requests"): 1,
        ("ann", "tokens_per_day"): 100,
    }
    usage = Usage(prompt_tokens=60)
    told.say(UsageSettled(request=RequestId("r1"), tenant=ACME, status="completed", usage=usage, cost_micros=1))
    assert told.used() == {
        (None, "tokens_per_day"): 60,
        (None, "cost_micros_per_day"): 1,
        (None, "concurrent_requests"): 0,
        ("ann", "tokens_per_day"): 60,
    }


def test_a_limit_refuses_them_as_it_refuses_chat() -> None:
    told = Told(Limits(), LimitRule(person="*", limits=Limits(tokens_per_minute=150)))
    told.ask(1)
    end, refused = told.ask(2)
    assert (end.topic, refused.topic) == (CHAT_STREAM, CHAT_ADMITTED)
    assert isinstance(end.event, StreamEnd)
    assert isinstance(refused.event, ChatRefused)
    assert end.event.error
    assert (end.event.status, end.event.error.limit, refused.event.model) == ("rejected", "tokens_per_minute", "e")


def test_one_that_comes_again_or_too_late_is_not_admitted() -> None:
    told = Told(Limits(tokens_per_day=1_000))
    assert told.ask(1)
    assert told.ask(1) == []
    end, _ = told.ask(2, deadline_ms=NOW - 1)
    assert isinstance(end.event, StreamEnd)
    assert end.event.status == "expired"
    assert told.used()[None, "tokens_per_day"] == 100
