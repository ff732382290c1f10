"""Whoever reads a stream to its end is told of one and the same outcome, whatever error the end names."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import product
from typing import get_args

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from klatch_schemas import codec
from klatch_schemas.assembly import Ended
from klatch_schemas.client import raise_unless_completed
from klatch_schemas.errors import ERRORS, Blocked, KlatchError, ModelFailed, StreamBroken, Unavailable
from klatch_schemas.events import Status, StreamEnd, StreamError
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_workers.http.errors import Answered, as_klatch_error, error_body, error_headers, error_of_end, status_of
from klatch_workers.torture.door import HttpReader
from klatch_workers.torture.evidence import Asked
from klatch_workers.torture.load import Trouble, Turn
from klatch_workers.torture.told import ENDS, outcome_of, outcome_told

Talks = Callable[[web.Request], Awaitable[web.StreamResponse]]
NO_TROUBLE, LEAVES = Trouble(), Trouble(cancel="disconnect", cancel_after=1)
TENANT, TALK, REQUEST = Tenant("acme"), Conversation("talk"), RequestId("talk.0")
CODES = (*ERRORS, "of_a_newer_klatch")
STATUSES: tuple[Status, ...] = tuple(one for one in get_args(Status) if one != "completed")


def ended(status: Status, code: str | None, *, by_the_server: bool = False) -> Ended:
    upstream = {"status": 503, "code": "overloaded"} if by_the_server else None
    error = StreamError(code=code, message="it went wrong", upstream=upstream) if code else None
    named = {"request": REQUEST, "tenant": TENANT, "conversation": TALK, "writer": "w", "status": status}
    return Ended(status, StreamEnd.model_validate({**named, "error": error}))


def at_the_door(end: Ended) -> KlatchError:
    error = error_of_end(end)
    assert error
    return error


def over_http(error: KlatchError) -> str | None:
    said = codec.loads(error_body(error, Answered(REQUEST)))["error"]["klatch"]
    return outcome_of(said["code"], said.get("status"))


def over_kafka(end: Ended) -> str | None:
    with pytest.raises(KlatchError) as caught:
        raise_unless_completed(end)
    return outcome_of(caught.value.code, caught.value.ended)


@pytest.mark.parametrize(("status", "code"), list(product(STATUSES, (None, *CODES))))
def test_every_end_is_one_outcome_for_the_fold_the_client_and_the_door(status: Status, code: str | None) -> None:
    end = ended(status, code)
    assert outcome_told(end) == over_http(at_the_door(end)) == over_kafka(end)


@pytest.mark.parametrize("code", [ModelFailed.code, Blocked.code])
def test_what_a_model_server_said_is_the_same_end(code: str) -> None:
    end = ended("blocked" if code == Blocked.code else "failed", code, by_the_server=True)
    assert outcome_told(end) == over_http(at_the_door(end)) == over_kafka(end)


@pytest.mark.parametrize(("status", "code"), list(product(STATUSES, CODES)))
def test_an_end_is_what_its_status_says_unless_its_code_says_otherwise(status: Status, code: str) -> None:
    assert outcome_told(ended(status, code)) == ENDS.get(code, status)


def test_an_error_that_is_no_end_is_asked_again_about() -> None:
    for error in (Unavailable("not now"), KlatchError("our own fault"), as_klatch_error(TimeoutError())):
        assert over_http(error) is None
    assert over_http(StreamBroken("a hole")) == "broken"


@asynccontextmanager
async def reading(
    answers: list[web.Response | Talks], trouble: Trouble = NO_TROUBLE
) -> AsyncGenerator[HttpReader, None]:
    """A reader of a door that gives these answers, one after another."""

    async def answer(request: web.Request) -> web.StreamResponse:
        said = answers.pop(0)
        return said if isinstance(said, web.Response) else await said(request)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_route("*", "/v1/streams/{id}", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        yield HttpReader(session, url, "key", Asked(TENANT, TALK, Turn(0, REQUEST, 1, 1.0, trouble)))
    assert answers == []


def refusal(error: KlatchError) -> web.Response:
    headers = {name.decode(): said.decode() for name, said in error_headers(error, Answered(REQUEST))}
    return web.Response(status=status_of(error), body=error_body(error, Answered(REQUEST)), headers=headers)


# A worker's fault is a request's end, and none of the door's.
BROKEN = at_the_door(ended("failed", KlatchError.code))
FAILED = at_the_door(ended("failed", Unavailable.code))


async def test_a_reader_over_http_asks_again_until_it_is_told_of_the_end() -> None:
    for end in (FAILED, BROKEN):
        async with reading([refusal(Unavailable("not now", retry_after_ms=1)), refusal(end)]) as reader:
            await reader.read()
        seen = reader.observation()
        assert (seen.outcome, seen.unfit) == ("failed", ())
        assert reader.troubles == {"unavailable": 1}


async def test_a_reader_over_http_notes_answers_that_no_door_may_give() -> None:
    bare, hasty = web.Response(status=500, text="Internal Server Error"), refusal(Unavailable("not now"))
    crashed = refusal(as_klatch_error(ZeroDivisionError()))
    async with reading([bare, hasty, crashed, refusal(FAILED)]) as reader:
        await reader.read()
    assert reader.observation().unfit == (
        "POST was answered with a bare 500",
        "POST was answered with 503 and no Retry-After",
        "POST was answered with a failure of the door itself",
    )


async def test_a_reader_over_http_notes_such_answers_to_its_cancel_too() -> None:
    bare, later = web.Response(status=500, text="Internal Server Error"), Unavailable("not now", retry_after_ms=1)
    async with reading([bare, refusal(later), web.Response(status=202)]) as reader:
        assert not reader.observation().deleted
        await reader.cancel()
    seen = reader.observation()
    assert (seen.unfit, seen.deleted) == (("DELETE was answered with a bare 500",), True)


# --- going away --------------------------------------------------------------------------------------------------


def saying(chunks: int) -> Talks:
    """A door that says so many chunks, and then breaks off."""

    async def talk(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(chunks):
            chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": f"<<c1:{number}>>"}}]})
            await response.write(b"id: 0-%d\ndata: %b\n\n" % (number, chunk))
        return response

    return talk


async def test_who_leaves_the_call_that_asked_has_hung_up() -> None:
    async with reading([saying(1)], LEAVES) as reader:
        await reader.read()
    seen = reader.observation()
    assert (seen.left, seen.hung_up_ms > 0) == (True, True)


async def test_who_leaves_a_call_that_only_reads_has_not_hung_up() -> None:
    async with reading([saying(0), saying(1)], LEAVES) as reader:
        await reader.read()
    seen = reader.observation()
    assert (seen.left, seen.hung_up_ms) == (True, 0.0)


async def leaves_before_the_answer(before: list[web.Response | Talks]) -> float:
    """Goes away while its last call waits for an answer, and says when it hung up."""
    asked, left = asyncio.Event(), asyncio.Event()

    async def wait(_: web.Request) -> web.StreamResponse:
        asked.set()
        await left.wait()
        return web.Response()

    async with reading([*before, wait], LEAVES) as reader, asyncio.TaskGroup() as tasks:
        going = tasks.create_task(reader.read())
        await asked.wait()
        reader.leave()
        await going
        left.set()
    return reader.observation().hung_up_ms


async def test_who_leaves_before_the_answer_has_hung_up_if_nobody_else_can_have_asked() -> None:
    assert await leaves_before_the_answer([]) > 0
    # The door that failed may have written the request, and knows nothing of this client's going.
    assert await leaves_before_the_answer([refusal(Unavailable("not now", retry_after_ms=1))]) == 0
