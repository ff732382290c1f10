"""What the door says of limits: on answers, streams and refusals, as OpenAI's clients read it."""

from typing import TYPE_CHECKING

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from klatch_schemas.events import RateLimit, RateLimits, StreamAttempt, StreamError
from klatch_schemas.ids import Writer
from klatch_workers.http.rate_limits import duration, rate_limit_headers

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit, Teller

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
LIMITS = RateLimits(
    requests=RateLimit(name="requests_per_minute", limit=60, remaining=59, reset_ms=60_500),
    tokens=RateLimit(name="tokens_per_day", limit=1_000, remaining=0, reset_ms=43_200_000),
)
HEADERS = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-reset-requests": "1m0.5s",
    "x-ratelimit-limit-tokens": "1000",
    "x-ratelimit-remaining-tokens": "0",
    "x-ratelimit-reset-tokens": "12h0m0s",
}


async def limited(teller: "Teller") -> None:
    """The script of a model whose tenant is limited."""
    teller.attempt, teller.writer = 1, Writer("writer-1")
    await teller.append(StreamAttempt(**teller.names(), attempt=1, writer=teller.writer, rate_limits=LIMITS))
    await teller.say("hello")
    await teller.delta(finish="stop")
    await teller.end(rate_limits=LIMITS)


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_answer_tells_where_its_tenant_stands(kit: "Kit", streamed: bool) -> None:
    kit.stages.script = limited
    asked = kit.client().chat.completions.with_raw_response
    if streamed:
        answer = await asked.create(model="tiny", messages=HI, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer.parse() if chunk.choices])
        assert text == "hello"
        said = answer.headers
    else:
        said = (await asked.create(model="tiny", messages=HI)).headers
    assert {name: said.get(name) for name in HEADERS} == HEADERS


async def test_a_tenant_without_limits_is_told_of_none(kit: "Kit") -> None:
    answer = await kit.client().chat.completions.with_raw_response.create(model="tiny", messages=HI)
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_a_refusal_tells_the_same_facts_once(kit: "Kit") -> None:
    async def script(teller: "Teller") -> None:
        why = StreamError(code="rate_limit_exceeded", message="slow", retry_after_ms=1_500, limit="tokens_per_day")
        await teller.end("rejected", why, rate_limits=LIMITS)

    kit.stages.script = script
    with pytest.raises(openai.RateLimitError) as refused:
        await kit.client().chat.completions.create(model="tiny", messages=HI)
    said = refused.value.response.headers
    assert {name: said.get_list(name) for name in HEADERS} == {name: [value] for name, value in HEADERS.items()}
    assert said["retry-after"] == "2"


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        (0, "0ms"),
        (17, "17ms"),
        (1_000, "1s"),
        (1_500, "1.5s"),
        (59_999, "59.999s"),
        (360_000, "6m0s"),
        (3_600_000, "1h0m0s"),
        (86_461_250, "24h1m1.25s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(ms: int, said: str) -> None:
    assert duration(ms) == said


def test_only_what_is_limited_is_told() -> None:
    assert rate_limit_headers(RateLimits()) == []
    assert len(rate_limit_headers(RateLimits(tokens=LIMITS.tokens))) == 3
