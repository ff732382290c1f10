"""Quotas as clients of the door meet them: admission, screening, generation and the door are all real."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.fidelity.conftest import Stack, finishes, hang_up, said_in, stacked, text_of
from tests.fidelity.wire import Talk, usage, whole, words

from klatch_schemas import codec
from klatch_schemas.events import ChatAdmitted, Limits, QuotaLimitSet, StreamEnd, UsageSettled
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import CHAT_REQUESTS

NOON_MS = 1_800_014_400_000
"""2027-01-15, a UTC noon: what the log's clock says all the time."""
HELLO = whole("hello")
USED = sum(usage()[name] for name in ("prompt_tokens", "completion_tokens"))
"""Tokens that the model server counts of a `HELLO`."""

streamed_or_whole = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A stack of the test's own, where nobody has used anything yet."""
    async with stacked(now_ms=lambda: NOON_MS) as made:
        yield made
        await hang_up(made.door)


async def limit(stack: Stack, **limits: int) -> None:
    """Limit the tenant `acme`."""
    said = QuotaLimitSet(tenant=Tenant("acme"), limits=Limits(**limits))
    await stack.log.append([codec.draft(CHAT_REQUESTS.name, "acme", said)])


@streamed_or_whole
async def test_an_answer_says_what_its_tenants_limits_have_left_after_it(stack: Stack, stream: bool) -> None:
    await limit(stack, requests_per_minute=60, tokens_per_day=10_000)
    first = await stack.chat(HELLO, max_tokens=100)
    await stack.told(first, UsageSettled)
    answer = await stack.chat(HELLO, max_tokens=300, stream=stream)
    reserved = (await stack.told(answer, ChatAdmitted)).reservation.tokens
    assert reserved > 300
    assert {name: said for name, said in answer.headers.items() if name.startswith("x-ratelimit-")} == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "58",
        "x-ratelimit-reset-requests": "1m1s",
        "x-ratelimit-limit-tokens": "10000",
        "x-ratelimit-remaining-tokens": str(10_000 - USED - reserved),
        "x-ratelimit-reset-tokens": "12h0m0s",
    }
    assert b"hello" in await answer.body()


@streamed_or_whole
async def test_an_answer_says_what_admission_decided_and_not_what_came_after_it(stack: Stack, stream: bool) -> None:
    """Between its admission and its first token, another of the tenant was admitted, and the limit raised."""
    await limit(stack, requests_per_minute=3)

    async def slowly(talk: Talk) -> None:
        await limit(stack, requests_per_minute=90)
        await (await stack.chat(HELLO)).body()
        talk.begin().send(HELLO).end()

    answer = await stack.chat(slowly, stream=stream)
    rates = (await stack.told(answer, ChatAdmitted)).rate_limits
    assert rates
    assert rates.requests
    assert (rates.requests.limit, rates.requests.remaining) == (3, 2)
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"


async def rambles(talk: Talk) -> None:
    """The script of a model that says more than a budget holds, and stops only when it is hung up on."""
    talk.begin().send(words(*["word "] * 1_000))
    await talk.left.wait()


async def test_a_stream_that_its_budget_stops_says_so_in_its_last_chunk_and_ends_whole(stack: Stack) -> None:
    await limit(stack, tokens_per_day=200)
    answer = await stack.chat(rambles)
    events = await answer.events()
    assert finishes(events) == [(0, "length")]
    last = said_in(events)[-1]
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert last["klatch"] == {"stopped_by": "tokens_per_day"}
    assert events[-1].data == "[DONE]"
    end = await stack.told(answer, StreamEnd)
    assert (end.status, end.finish_reason, end.stopped_by) == ("completed", "length", "tokens_per_day")
    told = text_of(events).split()
    assert end.usage
    assert 100 < len(told) == end.usage.completion_tokens <= 200 - end.usage.prompt_tokens


async def test_a_whole_reply_that_its_budget_stops_says_so_beside_the_deployment_that_answered(stack: Stack) -> None:
    await limit(stack, tokens_per_day=200)
    model = stack.model(rambles)
    answer = await stack.door.chat(model=model, stream=False)
    reply: Any = await answer.json()
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["length"]
    assert reply["klatch"] == {"stopped_by": "tokens_per_day", "deployment": model}
    said = reply["choices"][0]["message"]["content"].split()
    assert 100 < len(said) == reply["usage"]["completion_tokens"]
    end = await stack.told(answer, StreamEnd)
    assert (end.finish_reason, end.stopped_by) == ("length", "tokens_per_day")


async def test_who_spent_a_budget_is_refused_with_its_name_until_the_next_day(stack: Stack) -> None:
    await limit(stack, tokens_per_day=200)
    await stack.told(await stack.chat(rambles), UsageSettled)
    refused = await stack.chat(HELLO)
    error = (await refused.json())["error"]
    assert (refused.status, error["klatch"]["limit"]) == (429, "tokens_per_day")
    assert refused.headers["retry-after"] == str(12 * 3600)
