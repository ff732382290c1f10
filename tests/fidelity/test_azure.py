"""What Azure OpenAI does otherwise: [30] to [33]."""

from typing import TYPE_CHECKING, Any

import pytest
from tests.fidelity.conftest import KEY, finishes, said_in, text_of
from tests.fidelity.wire import Script, Talk, chunk, event, finish, role, sends, usage_chunk, whole, words

from klatch_schemas import codec
from klatch_schemas.events import Limits, QuotaLimitSet, StreamEnd, UsageSettled
from klatch_schemas.ids import Tenant

if TYPE_CHECKING:
    from tests.fidelity.conftest import Stack

SAFE = {"hate": {"filtered": False, "severity": "safe"}}
PROMPT: dict[str, Any] = {
    "choices": [],
    "created": 0,
    "id": "",
    "model": "",
    "object": "",
    "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": SAFE}],
}
OFFSETS = {"check_offset": 44, "start_offset": 44, "end_offset": 198}
ANNOTATION: dict[str, Any] = {
    **{name: PROMPT[name] for name in ("created", "id", "model", "object")},
    "choices": [{"index": 0, "finish_reason": None, "content_filter_results": SAFE, "content_filter_offsets": OFFSETS}],
}
ASKING: dict[str, Any] = {"stream_options": {"include_usage": True}}


def judged(text: str) -> bytes:
    """A content event with what the filter found."""
    said = chunk({"content": text})
    said["choices"][0]["content_filter_results"] = SAFE
    return event(said)


async def test_the_first_event_is_neither_a_reply_nor_its_usage(stack: "Stack") -> None:
    """[30] It passes; names are taken from what follows; the clock of the first token starts with text."""
    answer = await stack.chat(event(PROMPT) + role() + judged("a") + finish("stop", usage_chunk()), **ASKING)
    said = said_in(await answer.events())
    assert said[0] == PROMPT
    assert [one["choices"] for one in said[1:]].count([]) == 1
    assert (await stack.told(answer, StreamEnd)).trailer == (usage_chunk(),)


async def test_a_whole_reply_is_named_after_what_has_a_name(stack: "Stack") -> None:
    """[30, 31] Also when events without a name come last, and when klatch itself counts the tokens."""
    sent = event(PROMPT) + role() + judged("a") + event(chunk({}, "stop")) + event(ANNOTATION) * 3 + b"data: [DONE]\n\n"
    reply = await stack.whole(sent)
    assert (reply["id"], reply["created"], reply["model"]) == ("chatcmpl-7", 1_790_000_000, "tiny-2026-11-01")
    assert reply["object"] == "chat.completion"
    assert reply["prompt_filter_results"] == PROMPT["prompt_filter_results"]
    counted = said_in(await stack.stream(sent, **ASKING))[-1]
    assert (counted["id"], counted["created"], counted["choices"]) == ("chatcmpl-7", 1_790_000_000, [])


async def test_a_reply_that_is_continued_keeps_the_names_of_what_has_a_name(trying: "Stack") -> None:
    """[12, 30] The rest, and its usage chunk, are not named after the event before them all."""

    async def script(talk: Talk) -> None:
        talk.begin().send(event(PROMPT) + role() + judged("Hello ")).drop()

    model = trying.model(script)
    rest = role() + words("world") + finish("stop", usage_chunk())
    trying.spare(model, rest.replace(b"chatcmpl-7", b"chatcmpl-8"), continues="vllm")
    answer = await trying.door.chat(model=model, klatch={"on_crash": "continue"}, **ASKING)
    events = await answer.events()
    said = said_in(events)[1:]
    assert (text_of(events), finishes(events)) == ("Hello world", [(0, "stop")])
    names = [(one["id"], one["created"], one["model"]) for one in said]
    assert names == [("chatcmpl-7", 1_790_000_000, "tiny-2026-11-01")] * len(said)


async def test_a_reply_that_its_budget_stops_is_named_after_what_has_a_name(stack: "Stack") -> None:
    """[30, 31] Though an annotation came last."""
    limited = QuotaLimitSet(tenant=Tenant("globex"), limits=Limits(tokens_per_day=1500))
    await stack.log.append([codec.draft("chat.requests", "globex", limited)])
    sent = event(PROMPT) + role() + (words("w") + event(ANNOTATION)) * 3000 + finish()
    answer = await stack.chat(sent, tenant="globex")
    last = said_in(await answer.events())[-1]
    assert last["klatch"]["stopped_by"] == "tokens_per_day"
    assert (last["id"], last["created"], last["model"]) == ("chatcmpl-7", 1_790_000_000, "tiny-2026-11-01")
    await stack.told(answer, UsageSettled)
    unlimited = QuotaLimitSet(tenant=Tenant("globex"), limits=Limits())
    await stack.log.append([codec.draft("chat.requests", "globex", unlimited)])


async def test_annotations_without_a_delta_pass_where_they_stand(stack: "Stack") -> None:
    """[31] Their offsets count characters of a text that klatch does not edit."""
    sent = role() + words("x" * 60) + event(ANNOTATION) + judged("y") + finish()
    events = await stack.stream(sent)
    assert said_in(events)[2] == ANNOTATION
    assert text_of(events) == "x" * 60 + "y"
    choice = (await stack.whole(sent))["choices"][0]
    assert choice["content_filter_offsets"] == OFFSETS
    assert choice["content_filter_results"] == SAFE
    assert choice["message"]["content"] == "x" * 60 + "y"


async def test_a_whole_reply_has_what_every_annotation_found(stack: "Stack") -> None:
    """[31] One tells of hate, the next of protected material, and a last one of nothing."""
    hate = {"hate": {"filtered": True, "severity": "high"}}
    material = {"protected_material_text": {"detected": True, "filtered": False}}
    choices = [{**ANNOTATION["choices"][0], "content_filter_results": found} for found in (hate, material, {})]
    sent = role() + words("bad") + b"".join(event({**ANNOTATION, "choices": [choice]}) for choice in choices)
    choice = (await stack.whole(sent + finish("content_filter")))["choices"][0]
    assert choice["content_filter_results"] == {**hate, **material}
    assert choice["content_filter_offsets"] == OFFSETS


async def test_a_reply_that_the_filter_cut_off_says_so(stack: "Stack") -> None:
    """[31]"""
    answer = await stack.chat(role() + words("too far") + event(ANNOTATION) + finish("content_filter", usage_chunk()))
    assert finishes(await answer.events()) == [(0, "content_filter")]
    assert (await stack.told(answer, UsageSettled)).usage.total_tokens == 12


INNER: dict[str, Any] = {
    "code": "ResponsibleAIPolicyViolation",
    "content_filter_result": {"hate": {"filtered": True}},
}
FILTERED: dict[str, Any] = {
    "error": {"message": "filtered", "type": None, "param": "prompt", "code": "content_filter", "innererror": INNER}
}


async def _refuses(talk: Talk) -> None:
    talk.refuse(400, FILTERED, {"apim-request-id": "apim-1"})


async def _tells_in_a_good_answer(talk: Talk) -> None:
    talk.refuse(200, FILTERED, {"apim-request-id": "apim-1"})


async def _tells_in_an_event(talk: Talk) -> None:
    talk.begin(apim_request_id="apim-1").send(event(PROMPT), event(FILTERED)).end()


@pytest.mark.parametrize("script", [_refuses, _tells_in_a_good_answer, _tells_in_an_event])
async def test_a_filtered_prompt_is_a_400_with_all_its_words_and_is_not_tried_again(
    stack: "Stack", script: Script
) -> None:
    """[32] In whatever shape the filter says so; and no other vendor gets to see it."""
    model = stack.model(script)
    spare = stack.spare(model, whole("from a vendor that takes it"))
    answer = await stack.door.chat(model=model)
    assert answer.status == 400
    said = (await answer.json())["error"]
    assert (said["code"], said["param"], said["innererror"]) == ("content_filter", "prompt", INNER)
    assert (said["type"], said["klatch"]["code"]) == ("invalid_request_error", "content_filter")
    assert said["klatch"]["upstream_request"] == "apim-1"
    assert answer.headers["x-should-retry"] == "false"
    assert (len(stack.wire.talks[model]), len(stack.wire.talks[spare])) == (1, 0)
    assert (await stack.told(answer, StreamEnd)).status == "blocked"


async def test_bursts_and_the_name_of_the_underlying_version_pass(stack: "Stack") -> None:
    """[33] A buffering filter sends many tokens at once; the model that answered is not renamed to the alias."""
    model = stack.model(sends(event(PROMPT) + role() + b"".join(map(judged, "abcdefgh")) + finish()))
    events = await (await stack.door.chat(model=model)).events()
    assert text_of(events) == "abcdefgh"
    assert {one["model"] for one in said_in(events)[1:]} == {"tiny-2026-11-01"}
    assert (await stack.wire.talk(model)).body["model"] == model


@pytest.mark.parametrize(
    ("auth", "header", "says"), [("key", "api-key", KEY), ("token", "authorization", f"Bearer {KEY}")]
)
async def test_a_deployment_is_asked_at_its_path_with_its_version_and_its_key(
    stack: "Stack", auth: str, header: str, says: str
) -> None:
    """[33] An Entra token goes where others' keys go, and nothing goes where the other would."""
    model = stack.model(whole("a"), kind="azure", key="vendor", auth=auth, api_version="2025-01-01-preview")
    assert text_of(await (await stack.door.chat(model=model)).events()) == "a"
    talk = await stack.wire.talk(model)
    assert talk.path == f"/openai/deployments/{model}/chat/completions"
    assert talk.query == "api-version=2025-01-01-preview"
    told = {name: talk.headers[name] for name in ("api-key", "authorization") if name in talk.headers}
    assert told == {header: says}
