"""Counting tokens: [24] to [29]. What the client sees, and what is settled against the tenant's quota."""

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tests.fidelity.conftest import is_cut, said_in, until_left
from tests.fidelity.wire import DONE, Talk, chunk, event, finish, role, sends, usage, usage_chunk, whole, words

from klatch_schemas.events import RouteTimeouts, UsageSettled

if TYPE_CHECKING:
    from tests.fidelity.conftest import Stack

DETAILS: dict[str, Any] = {
    "prompt_tokens_details": {"cached_tokens": 90, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 40, "accepted_prediction_tokens": 2},
}
FULL = usage(100, 50, **DETAILS)
ASKING: dict[str, Any] = {"stream_options": {"include_usage": True}}


async def test_the_usage_chunk_is_the_last_one_without_choices(stack: "Stack") -> None:
    """[24] With every detail that the vendor counted; all other chunks have `usage: null`."""
    said = said_in(await stack.stream(role() + words("a") + finish("stop", usage_chunk(FULL)), **ASKING))
    assert (said[-1]["choices"], said[-1]["usage"]) == ([], FULL)
    assert [one["usage"] for one in said[:-1]] == [None] * 3


async def test_of_several_usage_chunks_the_last_is_told(stack: "Stack") -> None:
    """[24, 27] Clients add up what they see."""
    early = event(usage_chunk(usage(100, 1)))
    sent = role() + words("a") + early + words("b") + event(chunk({}, "stop")) + early + event(usage_chunk(FULL)) + DONE
    answer = await stack.chat(sent, **ASKING)
    said = said_in(await answer.events())
    assert [one["usage"] for one in said] == [None] * 4 + [FULL]
    assert (await stack.told(answer, UsageSettled)).usage.total_tokens == 150
    assert (await stack.whole(sent))["usage"] == FULL


@pytest.mark.parametrize("how", ["cut", "error", "stall", "cancelled"])
async def test_a_stream_without_a_usage_chunk_is_counted_by_klatch(stack: "Stack", how: str) -> None:
    """[25] A token a chunk, and a bound on the prompt; marked as estimated."""

    async def script(talk: Talk) -> None:
        talk.begin().send(role(), words(*"abcdefgh"))
        if how == "cut":
            talk.drop()
        elif how == "error":
            talk.send(event({"error": {"message": "the engine died", "code": 500}})).end()

    patience = RouteTimeouts(idle_s=0.5) if how == "stall" else None
    answer = await stack.door.chat(model=stack.model(script, patience))
    if how == "cancelled":
        await answer.part()
        await answer.close()
    settled = await stack.told(answer, UsageSettled)
    assert settled.status == ("cancelled" if how == "cancelled" else "failed")
    assert settled.usage.estimated
    assert 8 <= settled.usage.completion_tokens <= 10
    assert settled.usage.prompt_tokens > 0


async def test_usage_is_asked_for_and_shown_to_those_who_asked(stack: "Stack") -> None:
    """[26]"""
    model = stack.model(sends(whole("a")))
    quiet = said_in(await (await stack.door.chat(model=model)).events())
    asking = said_in(await (await stack.door.chat(model=model, **ASKING)).events())
    assert [one for one in quiet if one["usage"] or not one["choices"]] == []
    assert [one for one in asking if one["usage"]] == [asking[-1]]
    sent = [talk.body["stream_options"] for talk in stack.wire.talks[model]]
    assert sent == [{"include_usage": True}] * 2


async def test_a_model_server_that_rejects_stream_options_is_asked_without_them(stack: "Stack") -> None:
    """[26] The client gets klatch's own count under the reply's name."""

    async def script(talk: Talk) -> None:
        if "stream_options" in talk.body:
            talk.refuse(400, {"error": {"message": "Unrecognized request argument supplied: stream_options"}})
        else:
            talk.begin().send(role(), words("a", "b"), finish()).end()

    said = said_in(await stack.stream(script, **ASKING))
    assert said[-1]["id"] == said[0]["id"]
    assert said[-1]["usage"]["completion_tokens"] >= 2


async def test_one_clients_odd_option_turns_usage_off_for_nobody(stack: "Stack") -> None:
    """[26] It is left out, and what tells the usage is asked for alone; for others nothing changes."""

    async def script(talk: Talk) -> None:
        if odd := talk.body.get("stream_options", {}).keys() - {"include_usage"}:
            message = f"Unknown parameter: 'stream_options.{odd.pop()}'."
            talk.refuse(400, {"error": {"message": message, "code": "unknown_parameter"}})
        else:
            talk.begin().send(whole("a")).end()

    model = stack.model(script)
    for options in ({"include_usage": True, "continuous_usage_stats": True}, {"include_usage": True}):
        answer = await stack.door.chat(model=model, stream_options=options)
        assert said_in(await answer.events())[-1]["usage"] == usage()
        assert not (await stack.told(answer, UsageSettled)).usage.estimated
    sent = [talk.body["stream_options"].keys() for talk in stack.wire.talks[model]]
    assert sent == [{"include_usage", "continuous_usage_stats"}, {"include_usage"}, {"include_usage"}]


async def test_a_server_that_counts_at_the_end_only_is_asked_for_no_running_total_twice(stack: "Stack") -> None:
    """[26, 27] An older vLLM."""

    async def script(talk: Talk) -> None:
        if "continuous_usage_stats" in talk.body.get("stream_options", {}):
            talk.refuse(400, {"error": {"message": "Unknown parameter: 'stream_options.continuous_usage_stats'."}})
        else:
            talk.begin().send(whole("a")).end()

    model = stack.model(script, kind="vllm")
    for _ in range(3):
        assert said_in(await (await stack.door.chat(model=model, **ASKING)).events())[-1]["usage"] == usage()
    assert len(stack.wire.talks[model]) == 4


def running(*, last: bool) -> bytes:
    """A reply with a running total on every chunk, as vLLM sends it; `last`: and the usage chunk at its end."""
    sent = b"".join(event(chunk({"content": f"w{n} "}, usage=usage(9, n))) for n in range(1, 6))
    sent += event(chunk({}, "stop", usage=FULL))
    return sent + (event(usage_chunk(FULL)) if last else b"") + DONE


@pytest.mark.parametrize("last", [True, False], ids=["usage-chunk", "on-the-finish-only"])
async def test_a_running_total_is_never_summed_and_told_once(stack: "Stack", last: bool) -> None:
    """[27] Clients add up what they see: all totals but the last are set to null, the last comes as OpenAI sends it."""
    answer = await stack.chat(running(last=last), **ASKING)
    said = said_in(await answer.events())
    assert [one["usage"] for one in said] == [None] * 6 + [FULL]
    assert said[-1]["choices"] == []
    assert said[-1]["id"] == "chatcmpl-7"
    settled = (await stack.told(answer, UsageSettled)).usage
    assert (settled.prompt_tokens, settled.completion_tokens) == (100, 50)
    assert not settled.estimated
    assert (await stack.whole(running(last=last)))["usage"] == FULL
    assert all(one["usage"] is None for one in said_in(await stack.stream(running(last=last))))


async def test_a_client_that_asks_for_running_totals_gets_them(stack: "Stack") -> None:
    """[27] They are an option of vLLM's own."""
    asking = {"include_usage": True, "continuous_usage_stats": True}
    said = said_in(await stack.stream(running(last=True), stream_options=asking))
    assert [one["usage"]["completion_tokens"] for one in said] == [1, 2, 3, 4, 5, 50, 50]


async def test_vllm_is_asked_for_a_running_total_that_its_clients_do_not_see(stack: "Stack") -> None:
    """[27] What a stream has cost is known then wherever it is cut."""
    model = stack.model(running(last=True), kind="vllm")
    said = said_in(await (await stack.door.chat(model=model, **ASKING)).events())
    assert [one["usage"] for one in said] == [None] * 6 + [FULL]
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert (await stack.wire.talk(model)).body["stream_options"] == options


async def test_the_running_total_counts_for_a_stream_that_was_cut(stack: "Stack") -> None:
    """[25, 27] Better than an estimate: it is the model server's own."""

    async def script(talk: Talk) -> None:
        talk.begin().send(*(event(chunk({"content": "w"}, usage=usage(9, 4 * n))) for n in range(1, 6))).drop()

    answer = await stack.chat(script)
    is_cut(await answer.events())
    settled = (await stack.told(answer, UsageSettled)).usage
    assert (settled.prompt_tokens, settled.completion_tokens) == (9, 20)


async def test_cached_and_reasoning_tokens_are_parts_and_not_additions(stack: "Stack") -> None:
    """[28]"""
    answer = await stack.chat(role() + words("a") + finish("stop", usage_chunk(FULL)))
    settled = (await stack.told(answer, UsageSettled)).usage
    assert (settled.prompt_tokens, settled.cached_tokens) == (100, 90)
    assert (settled.completion_tokens, settled.reasoning_tokens) == (50, 40)
    assert settled.total_tokens == 150


CALL = {"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        (event(chunk({"content": "b"}, "stop", index=1)) + finish("stop", usage_chunk(FULL)), {"n": 2}),
        (event(chunk({"tool_calls": [CALL]})) + finish("tool_calls", usage_chunk(FULL)), {}),
        (words("a") + finish("length", usage_chunk(FULL)), {}),
        (words("a") + finish("content_filter", usage_chunk(FULL)), {}),
    ],
    ids=["n=2", "tools", "length", "filtered"],
)
async def test_usage_is_the_same_thing_however_a_reply_ends(stack: "Stack", sent: bytes, asked: dict[str, Any]) -> None:
    """[29] What a filter cut off is billed as well."""
    answer = await stack.chat(role() + sent, **ASKING, **asked)
    assert said_in(await answer.events())[-1]["usage"] == FULL
    settled = await stack.told(answer, UsageSettled)
    assert (settled.status, settled.usage.total_tokens) == ("completed", 150)


NO_COUNTS: list[dict[str, Any]] = [
    {"prompt_tokens": "many"},
    usage(-1, -1),
    usage(5, 2**62),
    usage(5, 2**53 + 1),
    usage(5.5, 2),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    {"total_tokens": 7},
]


@pytest.mark.parametrize("said", NO_COUNTS)
async def test_a_usage_that_is_no_count_of_tokens_costs_nobody_a_reply(stack: "Stack", said: dict[str, Any]) -> None:
    """[24] Klatch counts for itself then, and nobody sees the other one: in a chunk of its own, and beside text."""
    sent = role() + event(chunk({"content": "a"}, usage=said)) + finish("stop", usage_chunk(said))
    for asked in (ASKING, {}):
        answer = await stack.chat(sent, **asked)
        events = await answer.events()
        seen = said_in(events)
        assert (seen[1]["choices"][0]["delta"], events[-1].data) == ({"content": "a"}, "[DONE]")
        assert [one for one in seen if not one["choices"]] == ([seen[-1]] if asked else [])
        settled = await stack.told(answer, UsageSettled)
        assert (settled.status, settled.usage.estimated) == ("completed", True)
        assert 1 <= settled.usage.completion_tokens <= 3
        told = [one["usage"]["completion_tokens"] for one in seen if one["usage"]]
        assert told == ([settled.usage.completion_tokens] if asked else [])


@pytest.mark.parametrize(
    "odd",
    [
        {"total_tokens": -1},
        {"prompt_tokens": 5.0},
        {"prompt_tokens_details": []},
        {"prompt_tokens_details": {"cached_tokens": -1}, "completion_tokens_details": {"reasoning_tokens": "some"}},
    ],
)
async def test_an_odd_detail_takes_no_count_away(stack: "Stack", odd: dict[str, Any]) -> None:
    """[24, 28] PHP writes an empty object as a list."""
    said = {**usage(5, 2), **odd}
    answer = await stack.chat(role() + words("a") + finish("stop", usage_chunk(said)), **ASKING)
    assert said_in(await answer.events())[-1]["usage"] == said
    settled = (await stack.told(answer, UsageSettled)).usage
    assert (settled.prompt_tokens, settled.completion_tokens, settled.estimated) == (5, 2, False)
    assert (settled.cached_tokens, settled.reasoning_tokens) == (0, 0)


async def test_the_largest_count_is_one(stack: "Stack") -> None:
    """[24]"""
    answer = await stack.chat(
        role() + words("a") + finish("stop", usage_chunk(usage(0, 2**53 - 1, total_tokens=2**53)))
    )
    await answer.events()
    assert (await stack.told(answer, UsageSettled)).usage.completion_tokens == 2**53 - 1


async def test_a_cancelled_stream_is_settled_once(stack: "Stack") -> None:
    """[25] By its cancel, whatever the model server still sends."""
    seen = asyncio.Event()

    async def script(talk: Talk) -> None:
        talk.begin().send(role(), words("a"))
        await seen.wait()
        await until_left(talk)

    answer = await stack.chat(script)
    await answer.part()
    await answer.close()
    seen.set()
    await stack.told(answer, UsageSettled)
    await stack.whole(whole("another"))
    assert len(await stack.all_told(answer, UsageSettled, 1)) == 1
