"""Quotas as one linearizable machine: whatever order requests, replies, settlements, duplicates, crashes and changes
of settings come in, the ledger holds what a reference holds that keeps every fact and forgets nothing.

The reference knows the rules of docs/quotas.md and nothing of how the ledger counts. Over 400 lines on purpose: the
reference and the machine are read beside each other.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatAdmitted,
    ChatRefused,
    ChatRequested,
    Event,
    LimitRule,
    Limits,
    QuotaLimitSet,
    StreamBudget,
    TokenPrice,
    Usage,
    UsageRunning,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, Person, RequestId, Tenant
from klatch_schemas.topics import DAY_MS
from klatch_streams.admission import HOLD_MS, Admission, advanced
from klatch_streams.estimate import Estimate
from klatch_streams.kernel import Emit, Input
from klatch_streams.quota.calendar import moment
from klatch_streams.quota.counters import SHARDS, Counter
from klatch_streams.quota.ledger import Ledger
from klatch_streams.seen import MEMORY_MS

ACME, TALK = Tenant("acme"), Conversation("c")
PROMPT, OPEN_ENDED, ENDLESS = 16, 40, 160
ADMISSION = Admission(Estimate(completion=OPEN_ENDED))
START = 1_801_396_800_000 - 2 * DAY_MS
"""Two days before a month begins."""
MINUTE = 60_000
PRICES = {"small": TokenPrice(prompt=500_000, completion=1_000_000), "large": TokenPrice(completion=3_000_000)}

EVERYTHING = (None, None, None)
BUDGETS = ("tokens_per_day", "tokens_per_month", "cost_micros_per_day", "cost_micros_per_month")
NOTHING = UsageSettled(request=RequestId("never-asked"), tenant=ACME, status="completed", usage=Usage())
"""Settles what was never reserved."""

_few = st.none() | st.integers(0, 4)
_many = st.none() | st.integers(30, 300)
_limits = st.builds(
    Limits,
    requests_per_minute=_few,
    tokens_per_minute=_many,
    tokens_per_day=_many,
    tokens_per_month=_many,
    cost_micros_per_day=_many,
    cost_micros_per_month=_many,
    concurrent_requests=_few,
)
_persons = st.sampled_from([None, "ann", "bob"])
_models = st.sampled_from(["small", "large"])
_rules = st.builds(
    LimitRule,
    use_case=st.sampled_from([None, None, "support", "*"]),
    person=st.sampled_from([None, "ann", "*"]),
    model=st.sampled_from([None, None, "small", "*"]),
    limits=_limits,
)


@dataclass
class Fact:
    """A request that was admitted."""

    asked: ChatRequested
    entered_ms: int
    until_ms: int
    granted: int | None
    scopes: set[tuple[str | None, ...]]
    produced: int = 0
    days: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """By UTC day: tokens and money that were counted on it."""
    error: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """What of that the estimate was too low by."""
    settled: bool = False

    @property
    def most(self) -> int:
        """How far an honest reply goes."""
        if self.granted is not None:
            return self.granted
        return cast("int", self.asked.body.get("max_tokens", ENDLESS))

    @property
    def tokens(self) -> int:
        """All that is counted, on whatever day."""
        return sum(tokens for tokens, _ in self.days.values())

    @property
    def micros(self) -> int:
        return sum(micros for _, micros in self.days.values())

    def book(self, now_ms: int, tokens: int, micros: int) -> None:
        """More counts today; less is taken back from the days that it was counted on, the latest first."""
        for kind, by in enumerate((tokens, micros)):
            if by > 0:
                self.days.setdefault(moment(now_ms).day, [0, 0])[kind] += by
            back = max(0, -by)
            for day in sorted(self.days, reverse=True):
                part = min(back, self.days[day][kind])
                self.days[day][kind] -= part
                back -= part


@dataclass
class Reference:
    """Every fact, and sums over them."""

    facts: dict[str, Fact] = field(default_factory=dict[str, Fact])
    limits: Limits = Limits()
    rules: tuple[LimitRule, ...] = ()

    def scopes(self, asked: ChatRequested) -> dict[tuple[str | None, ...], Limits]:
        """By the values of its dimensions, the limits of every scope of a request."""
        values = (asked.use_case, asked.person or "", str(asked.body["model"]))
        found: dict[tuple[str | None, ...], Limits] = {EVERYTHING: self.limits}
        named: dict[tuple[str | None, ...], tuple[int, ...]] = {}
        for one in self.rules:
            names = (one.use_case, one.person, one.model)
            if any(names) and all(name in (None, "*", value) for name, value in zip(names, values, strict=True)):
                scope = tuple(None if name is None else value for name, value in zip(names, values, strict=True))
                rank = (sum(name not in (None, "*") for name in names), *(name not in (None, "*") for name in names))
                if rank >= named.get(scope, ()):
                    named[scope], found[scope] = rank, one.limits
        return found

    def room(self, fact: Fact, now_ms: int) -> float:
        """How many more completion tokens the budgets of a running request's scopes allow it now."""
        left = float("inf")
        price = PRICES[str(fact.asked.body["model"])].completion
        for scope, limits in self.scopes(fact.asked).items():
            if scope in fact.scopes:
                for name in BUDGETS:
                    if (most := cast("int | None", getattr(limits, name))) is not None:
                        rest = most - self.used(scope, now_ms)[name]
                        # A millionth is kept back for what rounding up adds.
                        left = min(left, rest if name.startswith("tokens") else (rest - 1) * 1_000_000 // price)
        return max(0, left)

    def used(self, scope: tuple[str | None, ...], now_ms: int, window_ms: int = MINUTE) -> dict[str, int]:
        """What a scope has used of each kind, with a minute that is `window_ms` long."""
        facts = [fact for fact in self.facts.values() if scope in fact.scopes]
        minute = [fact for fact in facts if fact.entered_ms > now_ms - window_ms]
        now = moment(now_ms)
        day = _sums(facts, {now.day})
        month = _sums(facts, {day for fact in facts for day in fact.days if moment(day * DAY_MS).month == now.month})
        return {
            "requests_per_minute": len(minute),
            "tokens_per_minute": sum(fact.tokens for fact in minute),
            "tokens_per_day": day[0],
            "tokens_per_month": month[0],
            "cost_micros_per_day": day[1],
            "cost_micros_per_month": month[1],
            "concurrent_requests": sum(fact.until_ms > now_ms for fact in facts),
        }


def _sums(facts: Sequence[Fact], days: Container[int]) -> tuple[int, int]:
    """Tokens and money that count on `days`."""
    return _total(one for fact in facts for day, one in fact.days.items() if day in days)


def _errors(facts: Sequence[Fact], days: Container[int]) -> tuple[int, int]:
    return _total(one for fact in facts for day, one in fact.error.items() if day in days)


def _total(found: Iterable[Sequence[int]]) -> tuple[int, int]:
    pairs = list(found)
    return sum(tokens for tokens, _ in pairs), sum(micros for _, micros in pairs)


def _number(period: Literal["day", "month"], ms: int) -> int:
    return moment(ms).day if period == "day" else moment(ms).month


def _cost(model: object, prompt: int, completion: int) -> int:
    price = PRICES[str(model)]
    return -(-(prompt * price.prompt + completion * price.completion) // 1_000_000)


def _most(limits: Limits, name: str) -> float:
    most = cast("int | None", getattr(limits, name))
    return float("inf") if most is None else most


class Quotas(RuleBasedStateMachine):
    """Admission on one tenant's log, and honest replies."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.state: Ledger = ADMISSION.initial(ACME)
        self.log: list[Input[Ledger]] = []
        self.snapshots: list[tuple[int, bytes]] = [(0, codec.dumps(ADMISSION.dump(self.state)))]
        self.model = Reference()
        self.number = 0
        self.limits: list[tuple[int, Limits]] = []
        """The tenant's own, each with when it was set."""

    # --- what happens

    @initialize(limits=_limits, rules=st.lists(_rules, max_size=4))
    def begin(self, limits: Limits, rules: list[LimitRule]) -> None:
        self.set(limits, rules)

    @rule(limits=_limits, rules=st.lists(_rules, max_size=4))
    def set(self, limits: Limits, rules: Sequence[LimitRule]) -> None:
        self.say(QuotaLimitSet(tenant=ACME, limits=limits, rules=tuple(rules), prices=PRICES))
        self.model.limits, self.model.rules = limits, tuple(rules)
        self.limits.append((self.now, limits))

    @rule(
        person=_persons,
        use_case=st.sampled_from(["support", "search"]),
        model=_models,
        most=st.none() | st.integers(0, 60),
    )
    def ask(self, person: str | None, use_case: str, model: str, most: int | None) -> None:
        self.number += 1
        asked = ChatRequested(
            request=RequestId(f"r{self.number}"),
            tenant=ACME,
            conversation=TALK,
            person=Person(person) if person else None,
            use_case=use_case,
            body={"model": model} if most is None else {"model": model, "max_tokens": most},
        )
        scopes = self.model.scopes(asked)
        before = {scope: self.model.used(scope, self.now, MINUTE + 1_000) for scope in scopes}
        for event in (emit.event for emit in self.say(asked)):
            if isinstance(event, ChatAdmitted):
                self._admitted(event, scopes)
            elif isinstance(event, ChatRefused):
                need = PROMPT + (OPEN_ENDED if most is None else most)
                self._refused(event, scopes, before, need)

    @precondition(lambda self: self.model.facts)
    @rule(data=st.data(), tokens=st.integers(0, 80))
    def speak(self, data: st.DataObject, tokens: int) -> None:
        """A reply goes on, as far as it may, and asks for more."""
        fact = self._any(data)
        fact.produced = min(fact.produced + tokens, fact.most)
        if fact.granted is not None:
            known = data.draw(st.sampled_from([fact.granted, fact.granted, 0]))
            request = fact.asked.request
            self._asks(
                fact, UsageRunning(request=request, tenant=ACME, conversation=TALK, tokens=fact.produced, granted=known)
            )

    @precondition(lambda self: self.model.facts)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        fact = self._any(data)
        usage = Usage(prompt_tokens=PROMPT, completion_tokens=fact.produced)
        cost = _cost(fact.asked.body["model"], PROMPT, fact.produced)
        self.say(
            UsageSettled(request=fact.asked.request, tenant=ACME, status="completed", usage=usage, cost_micros=cost)
        )
        known = self.now - fact.entered_ms < MEMORY_MS or fact.asked.request in self.state.seen
        if known and not fact.settled:
            more = usage.total_tokens - fact.tokens, cost - fact.micros
            fact.book(self.now, *more)
            if max(more) > 0:
                # docs/quotas.md, "The error": nothing bounds a reply that names no length where no budget does.
                assert fact.granted is None
                assert "max_tokens" not in fact.asked.body
                fact.error[moment(self.now).day] = max(0, more[0]), max(0, more[1])
            fact.until_ms, fact.settled = min(fact.until_ms, self.now), True

    @rule(ms=st.sampled_from([1, 999, 1_000, 20_000, 59_999, 60_000, 61_000, 15 * MINUTE, DAY_MS // 2]))
    def wait(self, ms: int) -> None:
        self.now += ms

    @rule(ms=st.sampled_from([1, 1_000, 5 * MINUTE]))
    def wait_until_the_day_is_nearly_over(self, ms: int) -> None:
        self.now = max(self.now, (moment(self.now).day + 1) * DAY_MS - ms)

    @precondition(lambda self: self.log)
    @rule(data=st.data())
    def hear_again(self, data: st.DataObject) -> None:
        """A producer sends a request again, or a worker its settlement."""
        said = data.draw(st.sampled_from([one for one in self.log if one.event is not NOTHING])).event
        if isinstance(said, ChatRequested | UsageSettled):
            asked = isinstance(said, ChatRequested)
            fact = self.model.facts.get(said.request)
            old = next(one.timestamp_ms for one in self.log if one.event == said)
            if self.now - old < MEMORY_MS and (asked or fact is None or fact.until_ms <= self.now):
                before = _plain(advanced(self.state, self.now))
                assert not self.say(said)
                assert _plain(self.state) == before

    @precondition(lambda self: self.state.counters.count)
    @rule(quiet_ms=st.sampled_from([0, MINUTE, 40 * DAY_MS]))
    def traffic(self, quiet_ms: int) -> None:
        """Others' records, a second apart: counters in which nothing matters any more are forgotten, and only they."""
        self.now += quiet_ms
        self.say(NOTHING)
        idle = {key for key, one in self._counters() if one.at(moment(self.now)).idle}
        for _ in range(SHARDS):
            self.now += 1_000
            self.state, _ = ADMISSION.decide(self.state, Input(NOTHING, self.now))
        assert not idle & {key for key, _ in self._counters()}
        # So many records would be read again by each crash from here on: a snapshot stands for them.
        self.snapshots = [(len(self.log), codec.dumps(ADMISSION.dump(self.state)))]

    @rule()
    def snapshot(self) -> None:
        self.snapshots.append((len(self.log), codec.dumps(ADMISSION.dump(self.state))))

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """Any snapshot, and what came after it, is the ledger."""
        applied, parts = data.draw(st.sampled_from(self.snapshots))
        state = ADMISSION.load(ACME, cast("dict[str, object]", codec.loads(parts)))
        for one in self.log[applied:]:
            state, _ = ADMISSION.decide(state, one)
        assert _plain(state) == _plain(self.state)
        self.state = state

    # --- what must hold

    @invariant()
    def no_day_and_no_month_holds_more_than_a_budget_that_was_in_force_in_it_but_for_the_error(self) -> None:
        facts = [fact for fact in self.model.facts.values() if EVERYTHING in fact.scopes]
        days = {day for fact in facts for day in fact.days}
        for month in {moment(day * DAY_MS).month for day in days}:
            of_it = {day for day in days if moment(day * DAY_MS).month == month}
            self._within("month", month, _sums(facts, of_it), _errors(facts, of_it))
        for day in days:
            self._within("day", day, _sums(facts, {day}), _errors(facts, {day}))

    @invariant()
    def the_ledger_holds_what_the_facts_come_to(self) -> None:
        state = advanced(self.state, self.now)
        used, now = state.used.at(moment(self.now)), self.now
        model = self.model.used(EVERYTHING, now)
        at_most = self.model.used(EVERYTHING, now, MINUTE + 1_000)
        assert model["requests_per_minute"] <= used.requests.total <= at_most["requests_per_minute"]
        assert min(model["tokens_per_minute"], at_most["tokens_per_minute"]) <= used.tokens.total
        assert used.day_tokens == model["tokens_per_day"]
        assert used.month_tokens == model["tokens_per_month"]
        assert used.day_micros == model["cost_micros_per_day"]
        assert used.month_micros == model["cost_micros_per_month"]
        assert used.running == model["concurrent_requests"] == len(state.held)
        assert _reserved(used) == _held_now(state, "", self.now)

    @invariant()
    def every_scope_holds_what_the_facts_in_it_come_to(self) -> None:
        state, now = advanced(self.state, self.now), moment(self.now)
        for scope in {scope for fact in self.model.facts.values() for scope in fact.scopes} - {EVERYTHING}:
            key = codec.dumps(scope).decode()
            used, model = state.counters.get(key, now), self.model.used(scope, self.now)
            assert used.requests.total >= model["requests_per_minute"]
            assert used.day_tokens == model["tokens_per_day"]
            assert used.month_tokens == model["tokens_per_month"]
            assert used.day_micros == model["cost_micros_per_day"]
            assert used.month_micros == model["cost_micros_per_month"]
            assert used.running == model["concurrent_requests"]
            assert _reserved(used) == _held_now(state, key, self.now)

    # --- small change

    def _within(
        self, period: Literal["day", "month"], number: int, used: tuple[int, int], error: tuple[int, int]
    ) -> None:
        """Whether what a day, or a month, holds was allowed in it."""
        until = [at for at, _ in self.limits[1:]] + [self.now]
        there = [
            limits
            for (at, limits), end in zip(self.limits, until, strict=True)
            if _number(period, at) <= number <= _number(period, end)
        ]
        for kind, amount, too_low in zip(("tokens", "cost_micros"), used, error, strict=True):
            name = f"{kind}_per_{period}"
            assert amount - too_low <= max(_most(limits, name) for limits in there), name

    def _counters(self) -> list[tuple[str, Counter]]:
        return [(key, one) for shard in self.state.counters.shards.values() for key, one in shard.items()]

    def say(self, event: Event) -> Sequence[Emit]:
        said: Input[Ledger] = Input(event, self.now)
        self.log.append(said)
        self.state, effects = ADMISSION.decide(self.state, said)
        return effects

    def _any(self, data: st.DataObject) -> Fact:
        return self.model.facts[data.draw(st.sampled_from(sorted(self.model.facts)))]

    def _admitted(self, event: ChatAdmitted, scopes: dict[tuple[str | None, ...], Limits]) -> None:
        kept, asked = event.reservation, event.request
        fact = Fact(asked, self.now, kept.expires_ms, kept.granted, set(scopes))
        fact.book(self.now, kept.tokens, kept.cost_micros)
        self.model.facts[asked.request] = fact
        assert kept.granted is None or "max_tokens" not in asked.body
        if kept.granted is not None:
            assert kept.tokens == PROMPT + kept.granted
            assert kept.cost_micros == _cost(asked.body["model"], PROMPT, kept.granted)
        for scope, limits in scopes.items():
            for name, used in self.model.used(scope, self.now).items():
                assert used <= _most(limits, name) or (name.startswith("cost") and not kept.cost_micros), name

    def _refused(
        self,
        event: ChatRefused,
        scopes: dict[tuple[str | None, ...], Limits],
        before: dict[tuple[str | None, ...], dict[str, int]],
        need: int,
    ) -> None:
        name, model = event.refusal.limit, event.model
        assert name is not None
        needs = {"requests": 1, "concurrent": 1, "tokens": need, "cost": _cost(model, PROMPT, need)}
        more = needs[name.split("_", maxsplit=1)[0]]
        assert any(before[scope][name] + more > _most(limits, name) for scope, limits in scopes.items()), name

    def _asks(self, fact: Fact, said: UsageRunning) -> None:
        room = self.model.room(fact, self.now)
        effects = self.say(said)
        known = self.now - fact.entered_ms < MEMORY_MS or fact.asked.request in self.state.seen
        assert bool(effects) == (known and not fact.settled)
        for event in (emit.event for emit in effects):
            assert isinstance(event, StreamBudget)
            assert fact.granted is not None
            more = event.granted - fact.granted
            wanted = OPEN_ENDED + max(0, said.tokens - fact.granted) if said.granted >= fact.granted else 0
            assert more == min(wanted, room), "no less than there is room for, and no more"
            assert (event.limit is None) == (more == wanted)
            fact.book(self.now, more, _cost(fact.asked.body["model"], 0, more))
            fact.granted = event.granted
            if said.granted == event.granted - more or fact.until_ms <= self.now:
                memory = (fact.entered_ms + MEMORY_MS) // MINUTE * MINUTE
                fact.until_ms = max(fact.until_ms, min(-(-(self.now + HOLD_MS) // MINUTE) * MINUTE, memory))


def _reserved(used: Counter) -> tuple[int, ...]:
    day = used.day_reserved_tokens, used.day_reserved_micros
    return (*day, used.month_reserved_tokens, used.month_reserved_micros)


def _held_now(state: Ledger, scope: str, now: int) -> tuple[int, ...]:
    """What reservations in force have on the day of `now`, and in its month: tokens and money of each."""
    found = list[int]()
    for period in ("day", "month"):
        tokens = micros = 0
        for one in state.held.values():
            if scope not in one.scopes:
                continue
            if _number(period, one.entered_ms) == _number(period, now):
                tokens, micros = tokens + one.tokens - one.later_tokens, micros + one.micros - one.later_micros
            if _number(period, one.entered_ms + DAY_MS) == _number(period, now):
                tokens, micros = tokens + one.later_tokens, micros + one.later_micros
        found += [tokens, micros]
    return tuple(found)


def _plain(state: Ledger) -> Any:
    return codec.loads(codec.dumps(ADMISSION.dump(state)))


def test_the_ledger_agrees_with_a_reference_in_whatever_order_things_happen() -> None:
    run_state_machine_as_test(Quotas, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
