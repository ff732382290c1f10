"""Replies whose budget is spent while they run: admission, generation and a model server, for real."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from klatch_schemas.events import (
    ChatRequested,
    LimitRule,
    Limits,
    QuotaLimitSet,
    StreamBudget,
    TokenPrice,
    UsageRunning,
    UsageSettled,
)
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, Namespace
from klatch_streams.admission import Admission
from klatch_streams.counting import Count, tokens_in
from klatch_streams.decider_owner import DeciderStage
from klatch_streams.estimate import Estimate
from klatch_streams.runner import Runner, RunnerSettings
from klatch_workers.generation import credit

GRANT = 40


@asynccontextmanager
async def admission(generation: Any) -> AsyncIterator[None]:
    stage = DeciderStage(Admission(Estimate(completion=GRANT)), generation.log, Namespace())
    runner = Runner(generation.log, stage, "klatch.admission", RunnerSettings(commit_s=0.05))
    running = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        runner.stop()
        await running


async def limit(generation: Any, limits: Limits, *rules: LimitRule, **more: Any) -> None:
    await generation.write(CHAT_REQUESTS, "acme", QuotaLimitSet(tenant="acme", limits=limits, rules=rules, **more))


async def ask(generation: Any, model: str, **envelope: Any) -> ChatRequested:
    request: ChatRequested = generation.request(model, **envelope)
    await generation.write_verdict(request)
    await generation.write(CHAT_REQUESTS, "acme", request)
    return request


def words(ended: Any) -> int:
    """How many chunks say something."""
    deltas = [choice["delta"] for one in ended.standing for choice in json.loads(bytes(one.chunk))["choices"]]
    return sum(bool(delta.get("content")) for delta in deltas)


async def used(generation: Any) -> int:
    """Tokens that the tenant's settlements come to."""
    said = await generation.held(CHAT_REQUESTS)
    return sum(one.usage.total_tokens for one in said if isinstance(one, UsageSettled))


async def test_a_reply_is_stopped_when_its_budget_is_spent(generation: Any) -> None:
    async with admission(generation), generation.worker():
        await limit(generation, Limits(tokens_per_day=200))
        request = await ask(generation, "fake?tokens=100000&rate=2000")
        ended = await generation.ended(request)
        settled = await generation.settled(request)
    assert (ended.state.status, ended.end.finish_reason, ended.end.stopped_by) == (
        "completed",
        "length",
        "tokens_per_day",
    )
    last = json.loads(bytes(ended.standing[-1].chunk))
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert last["klatch"] == {"stopped_by": "tokens_per_day"}
    assert last["id"] == json.loads(bytes(ended.standing[0].chunk))["id"]
    assert settled.usage.estimated
    assert 150 < settled.usage.total_tokens <= 200
    assert [call.outcome for call in generation.upstream.calls] == ["left"]


async def test_concurrent_replies_share_what_is_left_and_never_exceed_it(generation: Any) -> None:
    async with admission(generation), generation.worker():
        await limit(generation, Limits(tokens_per_month=600))
        asked = [await ask(generation, "fake?tokens=100000&rate=2000", conversation=f"c{n}") for n in range(4)]
        ended = [await generation.ended(request) for request in asked]
        for request in asked:
            await generation.settled(request)
    assert {one.end.stopped_by for one in ended} == {"tokens_per_month"}
    assert 400 < await used(generation) <= 600


@pytest.mark.parametrize("running", ["", "&running_usage=1"])
async def test_money_and_the_limits_of_a_person_stop_replies_too(generation: Any, running: str) -> None:
    each = LimitRule(person="*", limits=Limits(cost_micros_per_day=300))
    async with admission(generation), generation.worker():
        await limit(generation, Limits(), each, prices={"*": TokenPrice(completion=2_000_000)})
        request = await ask(generation, f"fake?tokens=100000&rate=2000{running}", person="ann")
        ended = await generation.ended(request)
        settled = await generation.settled(request)
    assert ended.end.stopped_by == "cost_micros_per_day"
    assert 100 < settled.usage.completion_tokens <= 150
    assert settled.usage.estimated == (not running)


async def test_a_reply_within_its_budget_asks_a_few_times_and_ends_as_it_would(generation: Any) -> None:
    async with admission(generation), generation.worker():
        await limit(generation, Limits(tokens_per_day=10_000))
        request = await ask(generation, "fake?tokens=150&rate=1000")
        ended = await generation.ended(request)
    asked = [said for said in await generation.held(CHAT_REQUESTS) if isinstance(said, UsageRunning)]
    told = [said for said in await generation.held(CHAT_STREAM) if isinstance(said, StreamBudget)]
    assert (ended.end.finish_reason, ended.end.stopped_by) == ("stop", None)
    assert 2 <= len(asked) == len(told) <= 5


async def test_every_open_choice_is_told_why(generation: Any) -> None:
    async with admission(generation), generation.worker():
        await limit(generation, Limits(tokens_per_day=200))
        body = {"model": "fake?tokens=100000&rate=1000", "n": 2, "messages": [{"role": "user", "content": "hi"}]}
        ended = await generation.ended(await ask(generation, "", body=body))
    *said, first, second = [bytes(one.chunk) for one in ended.standing]
    closing = [json.loads(first), json.loads(second)]
    assert [(one["choices"][0]["index"], one["choices"][0]["finish_reason"]) for one in closing] == [
        (0, "length"),
        (1, "length"),
    ]
    assert ended.end.usage.completion_tokens == tokens_in(said), "what tells of it is nobody's token"


@pytest.mark.parametrize("asks", [False, True])
async def test_choices_that_are_counted_each_by_itself_share_one_budget(generation: Any, asks: bool) -> None:
    """vLLM's running counts; trap 27."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = {"model": "fake?tokens=100000&rate=300&running_usage=1", "n": 8, "messages": [], **(options if asks else {})}
    async with admission(generation), generation.worker():
        await limit(generation, Limits(tokens_per_day=400))
        request = await ask(generation, "", body=body)
        ended, settled = await generation.ended(request), await generation.settled(request)
    said = words(ended)
    assert ended.end.stopped_by == "tokens_per_day"
    assert 300 < said == settled.usage.completion_tokens <= 400
    assert settled.usage.estimated


async def test_what_is_said_after_the_last_count_is_billed_too(generation: Any) -> None:
    async with admission(generation), generation.worker():
        await limit(generation, Limits(tokens_per_day=400))
        request = await ask(generation, "fake?tokens=100000&rate=2000&early_usage=1")
        ended, settled = await generation.ended(request), await generation.settled(request)
    assert 300 < words(ended) == settled.usage.completion_tokens <= 400


@pytest.mark.parametrize("body", [{"max_tokens": 120}, {}])
async def test_who_is_bounded_or_has_no_budget_asks_for_nothing(generation: Any, body: dict[str, int]) -> None:
    async with admission(generation), generation.worker():
        await limit(generation, Limits(tokens_per_day=1_000) if body else Limits(tokens_per_minute=1_000))
        said = {"model": "fake?tokens=100", "messages": [], **body}
        ended = await generation.ended(await ask(generation, "", body=said))
    assert ended.end.stopped_by is None
    assert not [said for said in await generation.held(CHAT_REQUESTS) if isinstance(said, UsageRunning)]


async def test_without_an_answer_a_reply_stops_at_its_grant(generation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "ANSWER_S", 0.1)  # patched: it would wait five seconds for nothing
    async with generation.worker():
        async with admission(generation):
            await limit(generation, Limits(tokens_per_day=1_000))
            request = await ask(generation, "fake?tokens=1000&rate=200&first_delay=1")
            await generation.assembled(request, lambda assembly: assembly.state.attempt)
        ended = await generation.ended(request)
        settled = await generation.settled(request)
    assert (ended.state.status, ended.end.stopped_by) == ("completed", "tokens_per_day")
    assert settled.usage.completion_tokens == GRANT


@pytest.mark.parametrize(
    ("chunks", "tokens"),
    [
        ([], 0),
        ([{"role": "assistant", "content": ""}], 0),
        ([{"content": "a"}, {"content": " word"}, {"content": "internationalise"}], 3),
        ([{"content": "seventeen letters"}], 5),
        ([{"content": "日本語日本語"}], 5),
        ([{"reasoning_content": "x" * 40}, {"refusal": "no"}], 11),
        ([{"tool_calls": [{"index": 0, "function": {"name": "find", "arguments": '{"q": "a long question"}'}}]}], 7),
        ([{"content": [{"type": "text", "text": "x" * 40}]}], 17),
        ([{"content": "\ud83d"}], 1),
    ],
)
def test_klatch_counts_a_token_a_chunk_or_four_bytes_a_token(chunks: list[dict[str, Any]], tokens: int) -> None:
    said = [json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() for delta in chunks]
    assert tokens_in(said) == tokens


def test_of_running_counts_the_last_stands_and_is_never_added_trap_27() -> None:
    def chunk(text: str, counted: int | None) -> bytes:
        usage = None if counted is None else {"prompt_tokens": 5, "completion_tokens": counted}
        return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}], "usage": usage}).encode()

    count = Count()
    heard = []
    for said in (chunk("a", 1), chunk("b c d", 4), chunk("e", None), chunk("f", 6)):
        count.hear(said)
        heard.append(count.tokens)
    assert heard == [1, 4, 5, 6]


def test_what_is_no_chunk_is_a_token() -> None:
    assert tokens_in([b"{", b"\xff"]) == 2
