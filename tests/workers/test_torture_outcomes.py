"""Whoever reads a stream to its end is told of one and the same outcome, whatever error the end names."""

from collections.abc import AsyncGenerator
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
from klatch_workers.http.errors import as_klatch_error, error_body, error_headers, error_of_end, status_of
from klatch_workers.torture.door import HttpReader
from klatch_workers.torture.evidence import Asked
from klatch_workers.torture.load import Turn
from klatch_workers.torture.told import ENDS, outcome_of, outcome_told

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
    said = codec.loads(error_body(error, REQUEST))["error"]["klatch"]
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
async def reading(answers: list[web.Response]) -> AsyncGenerator[HttpReader, None]:
    """A reader of a door that gives these answers, one after another."""

    async def answer(_: web.Request) -> web.Response:
        return answers.pop(0)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_delete("/v1/streams/{id}", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        yield HttpReader(session, url, "key", Asked(TENANT, TALK, Turn(0, REQUEST, 1, 1.0)))
    assert answers == []


def refusal(error: KlatchError) -> web.Response:
    headers = {name.decode(): said.decode() for name, said in error_headers(error)}
    return web.Response(status=status_of(error), body=error_body(error, REQUEST), headers=headers)


FAILED = at_the_door(ended("failed", Unavailable.code))


async def test_a_reader_over_http_asks_again_until_it_is_told_of_the_end() -> None:
    async with reading([refusal(Unavailable("not now", retry_after_ms=1)), refusal(FAILED)]) as reader:
        await reader.read()
    seen = reader.observation()
    assert (seen.outcome, seen.unfit) == ("failed", ())
    assert reader.troubles == {"unavailable": 1}


async def test_a_reader_over_http_notes_answers_that_no_door_may_give() -> None:
    bare, hasty = web.Response(status=500, text="Internal Server Error"), refusal(Unavailable("not now"))
    async with reading([bare, hasty, refusal(FAILED)]) as reader:
        await reader.read()
    assert reader.observation().unfit == (
        "POST was answered with a bare 500",
        "POST was answered with 503 and no Retry-After",
    )


async def test_a_reader_over_http_notes_such_answers_to_its_cancel_too() -> None:
    bare, later = web.Response(status=500, text="Internal Server Error"), Unavailable("not now", retry_after_ms=1)
    async with reading([bare, refusal(later), web.Response(status=202)]) as reader:
        await reader.cancel()
    assert reader.observation().unfit == ("DELETE was answered with a bare 500",)
