"""Events a second that admission decides on one core, decisions alone: `python -m klatch_workers.bench.admission`.

Each request is followed, 32 events later, by its settlement, on one tenant with all limits set; `scoped_per_s` is the
same with limits for each person and each model as well. It also says what the tenant's snapshot costs. CPU time
counts, and the best of three runs.
"""

import json
import sys
import time

from klatch_schemas import codec
from klatch_schemas.events import (
    ChatRequested,
    Event,
    LimitRule,
    Limits,
    QuotaLimitSet,
    TokenPrice,
    Usage,
    UsageSettled,
)
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_streams.admission import Admission
from klatch_streams.kernel import Input
from klatch_streams.quota.ledger import Ledger

ACME = Tenant("acme")
START = 1_800_000_000_000
LIMITS = Limits(
    requests_per_minute=10**6,
    tokens_per_minute=10**9,
    tokens_per_day=10**12,
    concurrent_requests=10**6,
    tokens_per_month=10**12,
    cost_micros_per_day=10**12,
    cost_micros_per_month=10**12,
)
RULES = (LimitRule(person="*", limits=LIMITS), LimitRule(model="*", limits=LIMITS))
PRICES = {"*": TokenPrice(prompt=2_500_000, completion=10_000_000)}


def history(requests: int, rules: tuple[LimitRule, ...] = ()) -> list[Event]:
    """Requests of a few messages, and their settlements."""
    said: list[Event] = [QuotaLimitSet(tenant=ACME, limits=LIMITS, rules=rules, prices=PRICES)]
    for number in range(requests):
        request = RequestId(f"5f0c3a7e-0000-4000-8000-{number:012}")
        messages = [{"role": "user", "content": "What is the capital of France, and why? " * 5}] * 3
        body = {"model": "m", "max_tokens": 200, "messages": messages}
        said.append(
            ChatRequested.model_validate(
                {
                    "request": request,
                    "tenant": ACME,
                    "conversation": Conversation(f"c{number % 50}"),
                    "person": f"p{number % 50}",
                    "body": body,
                }
            )
        )
        if number >= 32:
            settled = RequestId(f"5f0c3a7e-0000-4000-8000-{number - 32:012}")
            usage = Usage(prompt_tokens=100, completion_tokens=150)
            said.append(UsageSettled(request=settled, tenant=ACME, status="completed", usage=usage))
    return said


def measure(requests: int) -> dict[str, float]:
    """`per_s` and `scoped_per_s` of decisions, `dump_ms` of the snapshot, and its `dump_bytes`."""
    per_s, state = _decide(history(requests))
    scoped_per_s, _ = _decide(history(requests, RULES))
    started = time.process_time()
    parts = Admission().dump(state)
    dumped = time.process_time() - started
    size = sum(len(codec.dumps(part)) for part in parts.values())
    return {"per_s": per_s, "scoped_per_s": scoped_per_s, "dump_ms": dumped * 1e3, "dump_bytes": float(size)}


def _decide(events: list[Event]) -> tuple[float, Ledger]:
    admission = Admission()
    said: list[Input[Ledger]] = [Input(event, START + at * 2) for at, event in enumerate(events)]
    best, state = float("inf"), admission.initial(ACME)
    for _ in range(3):
        state = admission.initial(ACME)
        started = time.process_time()
        for one in said:
            state, _ = admission.decide(state, one)
        best = min(best, time.process_time() - started)
    return len(said) / best, state


def main() -> None:
    """Print one JSON object; the argument is the number of requests."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    sys.stdout.write(json.dumps(measure(requests)) + "\n")


if __name__ == "__main__":
    main()
