"""What a client is told of asking again by itself: one request stays one, whichever door it meets."""

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from tests.workers.http.conftest import KEYS, hello

from klatch_schemas import codec
from klatch_schemas.errors import Cancelled, KlatchError, LimitExceeded, LogMoved, Unavailable
from klatch_schemas.events import ChatRequested, Status, StreamAttempt, StreamError
from klatch_schemas.ids import Tenant
from klatch_schemas.topics import HOUR_MS
from klatch_workers.http.errors import Answered

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit, Kits, Teller

HI: Any = [{"role": "user", "content": "hi"}]


def told(error: KlatchError, ended: Status | None = None) -> KlatchError:
    error.ended = ended
    return error


@pytest.mark.parametrize(
    ("error", "accepted", "keyed", "again"),
    [
        (Unavailable("away"), False, False, True),
        (Unavailable("away"), False, True, True),
        (Unavailable("closing"), True, False, False),
        (Unavailable("closing"), True, True, True),
        (told(LimitExceeded("much", retry_after_ms=1), "rejected"), True, False, True),
        (told(LimitExceeded("much", retry_after_ms=1), "rejected"), True, True, False),
        (told(Cancelled("you did"), "cancelled"), True, False, False),
        (LogMoved("gone"), True, True, False),
    ],
)
def test_what_is_accepted_is_asked_for_again_by_its_key_while_it_runs_and_without_one_when_it_has_ended(
    error: KlatchError, accepted: bool, keyed: bool, again: bool
) -> None:
    assert Answered("r", "/v1/streams/r", accepted, keyed).repeated_by(error) is again


@pytest.mark.parametrize("key", [None, "k"])
async def test_the_openai_client_whose_door_closes_makes_no_second_request(kits: "Kits", key: str | None) -> None:
    asked_again = asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await asked_again.wait()
        await hello(teller)

    async with kits.serving(drain_s=0.1) as kit, kits.serving(beside=kit) as other:
        kit.stages.script = script
        ports = [other.port, kit.port]

        async def balance(request: Any) -> None:
            request.url = request.url.copy_with(port=ports.pop())
            if not ports:
                asked_again.set()

        client = AsyncOpenAI(
            base_url=kit.url,
            api_key=KEYS[Tenant("acme")],
            max_retries=1,
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [balance]}),
        )
        headers = {"Idempotency-Key": key} if key else {}
        async with client:
            asking = asyncio.create_task(
                client.chat.completions.create(model="tiny", messages=HI, extra_headers=headers)
            )
            asked = (await kit.stages.first()).asked
            kit.stop.set()
            if key:
                assert (await asking).choices[0].message.content == "Hello wörld"
            else:
                with pytest.raises(openai.InternalServerError) as refused:
                    await asking
                assert f"asking again makes another: read on at /v1/streams/{asked.request}?" in refused.value.message
                assert refused.value.response.headers["x-should-retry"] == "false"
        assert len(kit.said(ChatRequested, "chat.requests")) == 1


async def test_an_end_is_told_for_good_to_whoever_asks_under_a_key(kits: "Kits") -> None:
    async def script(teller: "Teller") -> None:
        await teller.end("rejected", StreamError(code="rate_limit_exceeded", message="slow", retry_after_ms=1))

    async def refused(kit: "Kit", **headers: str) -> str:
        answer = await kit.chat(headers=headers)
        assert answer.status == 429
        return answer.headers["x-should-retry"]

    async with kits.serving() as kit, kits.serving(beside=kit) as other:
        kit.stages.script = script
        assert await refused(kit) == "true"
        assert [await refused(door, **{"Idempotency-Key": "k"}) for door in (kit, kit, other)] == ["false"] * 3


async def test_what_retention_took_before_a_stream_that_is_asked_for_again_is_not_missed(kits: "Kits") -> None:
    key, go = {"Idempotency-Key": "k"}, asyncio.Event()

    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("one ", "two ")
        await go.wait()
        await teller.end()

    async with asyncio.timeout(10), kits.serving(partitions=1) as kit, kits.serving(beside=kit) as other:
        await (await kit.chat()).events()
        kit.stages.script = script
        first = await kit.chat(headers=key)
        link = f"/v1/streams/{first.headers['x-request-id']}"
        # Once a door remembers it because it was asked there, once because it was looked for.
        seen = await other.call("GET", link)
        for answer in (first, seen):
            while b"two" not in await answer.part():
                pass
        openings = [one for one in kit.log.records("chat.stream") if isinstance(codec.decode(one.value), StreamAttempt)]
        kit.log.truncate_before(openings[1].partition, openings[1].offset)
        again = [await door.chat(headers=key) for door in (kit, other)]
        again += [await door.call("GET", link) for door in (kit, other)]
        go.set()
        assert [kit.text_of(await answer.events()) for answer in again] == ["one two "] * 4
        assert len(kit.said(ChatRequested, "chat.requests")) == 2


async def test_a_late_cancel_of_what_is_a_day_old_is_no_stream(kits: "Kits") -> None:
    key = {"Idempotency-Key": "k"}
    async with asyncio.timeout(10), kits.serving(partitions=1) as kit:
        kits.ago_ms = 26 * HOUR_MS
        first = await kit.chat(headers=key)
        assert kit.text_of(await first.events()) == "Hello wörld"
        kits.ago_ms = 23 * HOUR_MS
        assert (await kit.call("DELETE", f"/v1/streams/{first.headers['x-request-id']}")).status == 202
        kits.ago_ms = 0
        kit.stages.tellers.clear()
        async with kits.serving(beside=kit) as other:
            assert kit.text_of(await (await other.chat(headers=key)).events()) == "Hello wörld"
