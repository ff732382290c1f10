"""Generation as its neighbours see it: admissions and verdicts in, a stream, a settlement and a turn out."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

from typing import Any

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.events import Finding, PromptPublished, PromptReference, StreamCancel, TrustVerdict
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_STREAM, CHAT_TURNS, DEAD_LETTERS
from klatch_workers.generation.conclude import reply_of


def text_of(assembly: Assembly) -> Any:
    return reply_of(assembly).messages()[0]["content"]


async def test_a_request_streams_to_its_end_and_is_settled_and_remembered(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit("fake?text=one two three four")
        ended = await generation.ended(request)
        settled = await generation.settled(request)
        turn = await generation.turn(request)
    assert ended.state.status == "completed"
    assert text_of(ended) == "one two three four"
    assert ended.end is not None
    assert ended.end.finish_reason == "stop"
    assert settled.usage == ended.end.usage
    assert not settled.usage.estimated
    assert turn.reply[0]["content"] == "one two three four"
    assert turn.messages == ({"role": "user", "content": "hello"},)


async def test_requests_of_one_conversation_are_answered_in_order_and_see_the_turns_before(generation: Any) -> None:
    async with generation.worker():
        memory = {"recent": 10}
        first = await generation.admit("fake?text=first answer", memory=memory)
        second = await generation.admit("fake?reply=echo-messages", memory=memory)
        ended = await generation.ended(second)
        turn = await generation.turn(second)
    assert (await generation.ended(first)).state.status == "completed"
    assert "first answer" in text_of(ended)
    assert turn.previous == 0


async def test_a_conversation_goes_on_in_another_worker(generation: Any) -> None:
    memory = {"recent": 10}
    async with generation.worker():
        first = await generation.admit("fake?text=remember the heron", memory=memory)
        await generation.turn(first)
    async with generation.worker():
        second = await generation.admit("fake?reply=echo-messages", memory=memory)
        assert "remember the heron" in text_of(await generation.ended(second))


async def test_a_blocked_request_reaches_no_model(generation: Any) -> None:
    async with generation.worker():
        request = generation.request("fake")
        verdict = TrustVerdict(
            request=request.request,
            tenant="acme",
            conversation="c1",
            stage="input",
            decision="block",
            categories=("secret",),
            policy="test",
        )
        await generation.write_verdict(request, verdict)
        await generation.write_admission(request)
        ended = await generation.ended(request)
        settled = await generation.settled(request)
    assert ended.state.status == "blocked"
    assert ended.end is not None
    assert ended.end.error is not None
    assert "secret" in ended.end.error.message
    assert settled.usage.total_tokens == 0
    assert not generation.upstream.calls


async def test_a_redacted_request_reaches_the_model_and_memory_without_what_was_found(generation: Any) -> None:
    async with generation.worker():
        request = generation.request(
            "fake?reply=echo-user",
            body={"model": "fake?reply=echo-user", "messages": [{"role": "user", "content": "I am a@b.example"}]},
        )
        finding = Finding(category="email", path=("messages", 0, "content"), start=5, end=16, replacement="[EMAIL]")
        verdict = TrustVerdict(
            request=request.request,
            tenant="acme",
            conversation="c1",
            stage="input",
            decision="redact",
            findings=(finding,),
            policy="test",
        )
        await generation.write_verdict(request, verdict)
        await generation.write_admission(request)
        assert text_of(await generation.ended(request)) == "I am [EMAIL]"
        turn = await generation.turn(request)
    assert turn.messages[0]["content"] == "I am [EMAIL]"


async def test_a_prompt_of_the_ledger_becomes_the_system_message(generation: Any) -> None:
    generation.book.prompts["tutor"] = PromptPublished(name="tutor", version=3, template="Teach {{ topic }}.")
    async with generation.worker():
        prompt = PromptReference(name="tutor", variables={"topic": "birds"})
        request = await generation.admit("fake?reply=echo-system", prompt=prompt)
        assert text_of(await generation.ended(request)) == "Teach birds."
        assert (await generation.turn(request)).prompt.version == 3


async def test_a_prompt_that_is_not_in_the_ledger_fails_the_request_with_the_fix(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit("fake", prompt=PromptReference(name="nowhere"))
        ended = await generation.ended(request)
    assert ended.state.status == "failed"
    assert ended.end is not None
    assert ended.end.error is not None
    assert "publish it" in ended.end.error.message


async def test_a_cancel_before_the_request_keeps_it_from_the_model(generation: Any) -> None:
    async with generation.worker():
        request = generation.request("fake")
        cancel = StreamCancel(request=request.request, tenant="acme", conversation="c1", by="test")
        await generation.write(CHAT_STREAM, "c1", cancel)
        await generation.write_verdict(request)
        await generation.write_admission(request)
        ended = await generation.ended(request)
        settled = await generation.settled(request)
    assert ended.state.status == "cancelled"
    assert settled.usage.total_tokens == 0
    assert not generation.upstream.calls


async def test_a_cancel_in_the_middle_closes_the_upstream_and_settles_what_was_said(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit("fake?tokens=1000&rate=100")
        await generation.assembled(request, lambda assembly: len(assembly.standing) > 3)
        cancel = StreamCancel(request=request.request, tenant="acme", conversation="c1", by="test")
        await generation.write(CHAT_STREAM, "c1", cancel)
        ended = await generation.ended(request)
        settled = await generation.settled(request)
    assert ended.state.status == "cancelled"
    assert settled.usage.estimated
    assert settled.usage.completion_tokens >= 3  # the first chunk only names the role
    assert [call.outcome for call in generation.upstream.calls] == ["left"]


async def test_a_cancel_while_nothing_has_been_said_closes_the_upstream(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit("fake?first_delay=60")
        await generation.assembled(request, lambda assembly: assembly.state.attempt == 1)
        cancel = StreamCancel(request=request.request, tenant="acme", conversation="c1", by="test")
        await generation.write(CHAT_STREAM, "c1", cancel)
        assert (await generation.ended(request)).state.status == "cancelled"
        assert (await generation.settled(request)).status == "cancelled"


async def test_a_deadline_that_passes_ends_the_request(generation: Any) -> None:
    import time

    async with generation.worker():
        request = await generation.admit("fake?first_delay=60", deadline_ms=int(time.time() * 1000) + 300)
        assert (await generation.ended(request)).state.status == "expired"


async def test_an_upstream_error_is_passed_through_in_the_end(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit("fake?status=401")
        ended = await generation.ended(request)
    assert ended.state.status == "failed"
    assert ended.end is not None
    assert ended.end.error is not None
    assert ended.end.error.upstream is not None
    assert ended.end.error.upstream["status"] == 401


async def test_an_upstream_cut_in_the_middle_is_a_failure_and_never_a_stop(generation: Any) -> None:
    """Traps 15 and 35."""
    async with generation.worker():
        request = await generation.admit("fake?tokens=20&fault=drop&fault_after=5")
        ended = await generation.ended(request)
    assert ended.state.status == "failed"
    assert ended.end is not None
    assert ended.end.finish_reason is None


async def test_an_admission_that_is_repeated_is_answered_once(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit("fake?text=once")
        await generation.settled(request)
        await generation.write_admission(request)
        other = await generation.admit("fake?text=other")
        await generation.settled(other)
    assert len(generation.upstream.calls) == 2
    assert len([turn for turn in await generation.held(CHAT_TURNS) if turn.request == request.request]) == 1


async def test_an_admission_repeated_to_the_next_worker_is_answered_once(generation: Any) -> None:
    async with generation.worker():
        request = await generation.admit("fake?text=once")
        await generation.settled(request)
    async with generation.worker():
        await generation.write_admission(request)
        other = await generation.admit("fake?text=other")
        await generation.settled(other)
    assert len(generation.upstream.calls) == 2
    assert len(await generation.held(CHAT_ADMITTED)) == 3


async def test_a_chunk_that_the_log_cannot_hold_fails_its_own_request_and_no_other(generation: Any) -> None:
    async with generation.worker():
        neighbour = await generation.admit("fake?tokens=50&rate=100", conversation="c2")
        await generation.assembled(neighbour, lambda assembly: len(assembly.standing) > 3)
        request = await generation.admit("fake?big=1200000")
        ended = await generation.ended(request)
        settled = await generation.settled(request)
        assert (await generation.ended(neighbour)).state.status == "completed"
    assert (ended.state.status, ended.gap) == ("failed", None)
    assert settled.status == "failed"
    assert not await generation.held(DEAD_LETTERS)


async def test_a_turn_that_the_log_cannot_hold_is_settled_all_the_same(generation: Any) -> None:
    body = {"model": "fake?big=300000", "messages": [{"role": "user", "content": "x" * 800_000}]}
    async with generation.worker():
        request = await generation.admit("", body=body)
        after = await generation.admit("fake?text=next")
        assert (await generation.settled(request)).status == "completed"
        assert (await generation.turn(after)).previous is None
    assert not await generation.held(DEAD_LETTERS)


async def test_instructions_of_an_earlier_request_are_not_repeated_to_the_model(generation: Any) -> None:
    def body(model: str, system: str) -> dict[str, Any]:
        said = [{"role": "system", "content": system}, {"role": "user", "content": "hello"}]
        return {"model": model, "messages": said}

    memory = {"recent": 10}
    async with generation.worker():
        first = await generation.admit("", body=body("fake?text=hi", "Speak like a heron."), memory=memory)
        await generation.turn(first)
        second = await generation.admit("", body=body("fake?reply=echo-messages", "Be brief."), memory=memory)
        heard = text_of(await generation.ended(second))
    assert "Be brief." in heard
    assert "heron" not in heard


async def test_a_fault_of_ours_is_one_requests_end_and_no_others(generation: Any) -> None:
    class Faulty:
        def find(self, *_: object) -> PromptPublished:
            raise ZeroDivisionError

    async with generation.worker() as worker:
        object.__setattr__(worker.stage.preparer, "prompts", Faulty())
        broken = await generation.admit("fake", prompt=PromptReference(name="any"))
        other = await generation.admit("fake?text=fine")
        ended = await generation.ended(broken)
        assert text_of(await generation.ended(other)) == "fine"
    assert ended.state.status == "failed"
    assert ended.end is not None
    assert ended.end.error is not None
    assert ended.end.error.code == "internal"


async def test_an_admission_that_is_nested_past_all_bounds_is_a_dead_letter_and_no_end_of_the_partition(
    generation: Any,
) -> None:
    async with generation.worker():
        poison = b'{"kind":"chat.admitted.v1","request":' + b"[" * 100_000
        await generation.log.append([Draft(CHAT_ADMITTED.name, b"c1", poison)])
        request = await generation.admit("fake?text=fine")
        assert text_of(await generation.ended(request)) == "fine"
    assert [record.value for record in generation.log.records(DEAD_LETTERS.name)] == [poison]


async def test_an_admission_whose_trace_is_none_is_answered_without_one(generation: Any) -> None:
    async with generation.worker():
        request = generation.request("fake?text=fine")
        await generation.write_verdict(request)
        await generation.write_admission(request)
        [record] = generation.log.records(CHAT_ADMITTED.name)
        again = generation.request("fake?text=fine")
        await generation.write_verdict(again)
        value = (record.value or b"").replace(request.request.encode(), again.request.encode())
        await generation.log.append([Draft(CHAT_ADMITTED.name, b"c1", value, ((codec.TRACEPARENT, b"\xff"),))])
        assert text_of(await generation.ended(again)) == "fine"
    assert not generation.log.records(DEAD_LETTERS.name)
