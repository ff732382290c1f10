"""What is refused before anything is published, what is accepted only once it stands in the log, and the rest."""

import asyncio
import base64
import json
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from klatch_agents.gateway.errors import ErrorBody, RefusedError
from klatch_agents.gateway.port import Embedded, ModelCall
from klatch_schemas.events import ChatRequested
from klatch_schemas.records import Draft
from klatch_workers.http.door import Terms
from klatch_workers.http.embeddings import TextEmbeddings
from klatch_workers.http.request_ids import OWN_CONVERSATION, birth_of, new_request_id

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit, Kits


async def _error(kit: "Kit", path: str, body: Any, method: str = "POST", **kwargs: Any) -> tuple[int, dict[str, Any]]:
    answer = await kit.call(method, path, body, **kwargs)
    error = (await answer.json())["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert answer.headers["x-request-id"] == error["klatch"]["request"]
    return answer.status, error


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/models", "/v1/streams/x"])
async def test_nobody_enters_without_a_key(kit: "Kit", path: str) -> None:
    method = "GET" if path in {"/v1/models", "/v1/streams/x"} else "POST"
    for header in (None, "Basic x", "Bearer", "Bearer wrong", "key-of-acme", "Bearer key-of-acme-"):
        headers = {"authorization": header} if header else {}
        status, error = await _error(kit, path, {}, method, tenant=None, headers=headers)
        assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"stream": "perhaps"}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stream_options": {"include_usage": 7}}, "stream_options.include_usage"),
        ({"klatch": {"convresation": "c"}}, "klatch.convresation"),
        ({"klatch": {"conversation": "\u0001"}}, "klatch.conversation"),
        ({"klatch": {"memory": {"recent": 9999}}}, "klatch.memory.recent"),
        ({"klatch": {"priority": 10}}, "klatch.priority"),
        ({"klatch": {"deadline_ms": 1, "timeout_ms": 1}}, "klatch"),
        ({"klatch": {"deadline_ms": 10**400}}, "klatch.deadline_ms"),
        ({"klatch": {"on_disconnect": "panic"}}, "klatch.on_disconnect"),
        ({"klatch": []}, "klatch"),
    ],
)
async def test_a_wrong_field_is_named(kit: "Kit", change: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **change}
    status, error = await _error(kit, "/v1/chat/completions", body)
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert kit.said(ChatRequested, "chat.requests") == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b'{"messages": NaN}', b"\xff", b"[" * 200_000])
async def test_what_is_no_json_object_is_refused(kit: "Kit", body: bytes) -> None:
    assert (await _error(kit, "/v1/chat/completions", body))[0] == 400


async def test_a_body_nested_deeper_than_anybody_reads_is_refused(kit: "Kit") -> None:
    body = b'{"messages":[{"role":"user"}],"x":' + b"[" * 900 + b"]" * 900 + b"}"
    status, error = await _error(kit, "/v1/chat/completions", body)
    assert (status, error["code"]) == (400, "invalid_request")


async def test_half_a_surrogate_pair_reaches_the_log(kit: "Kit") -> None:
    body = b'{"messages":[{"role":"user","content":"\\ud83d"}]}'
    answer = await kit.call("POST", "/v1/chat/completions", body)
    assert answer.status == 200
    assert kit.said(ChatRequested, "chat.requests")[0].body["messages"][0]["content"] == "\ud83d"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_that_is_too_large_is_refused_before_it_is_read(kits: "Kits", declared: bool) -> None:
    async with kits.serving(Terms(max_body_bytes=1000)) as kit:
        if declared:
            status, error = await _error(kit, "/v1/chat/completions", b"x" * 1001)
            assert (status, error["code"]) == (413, "request_too_large")
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", kit.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: d\r\nauthorization: Bearer key-of-acme\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + (b"190\r\n" + b"x" * 400 + b"\r\n") * 4)
        assert b"413" in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_record_that_the_log_cannot_hold_is_too_large(kits: "Kits") -> None:
    async with kits.serving(Terms(max_body_bytes=2_000_000)) as kit:
        body = {"messages": [{"role": "user", "content": "x" * 1_500_000}]}
        assert (await _error(kit, "/v1/chat/completions", body))[0] == 413


@pytest.mark.parametrize("stands", [True, False])
async def test_a_request_that_may_not_stand_in_the_log_is_not_accepted(kit: "Kit", stands: bool) -> None:
    kit.log.fail_next_append(stands=stands)
    key = {"Idempotency-Key": "k"}
    refused = await kit.chat(headers=key)
    assert refused.status == 503
    assert refused.headers["retry-after"] == "1"
    assert (await refused.json())["error"]["code"] == "unavailable"
    accepted = await kit.chat(headers=key)
    assert [event.data for event in await accepted.events()][-1] == "[DONE]"
    assert len({asked.request for asked in kit.said(ChatRequested, "chat.requests")}) == 1


async def test_a_log_that_does_not_answer_in_time_is_a_503(kits: "Kits") -> None:
    async def held(drafts: Sequence[Draft]) -> None:
        if drafts[0].topic == "chat.requests":
            await asyncio.Event().wait()

    async with kits.serving(Terms(append_timeout_s=0.2), appending=held) as kit:
        answer = await kit.chat()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


async def test_request_ids_hold_their_time_and_partition() -> None:
    birth = birth_of(new_request_id(1234))
    assert birth
    assert birth.partition == 1234
    own = birth_of(new_request_id())
    assert own
    assert own.partition == OWN_CONVERSATION
    assert own.milliseconds >= birth.milliseconds
    assert birth_of("x") is None
    assert birth_of("6f9619ff-8b86-4011-b42d-00c04fc964ff") is None


async def test_health_needs_no_key_and_readiness_waits_for_the_ledgers_and_the_log(kits: "Kits") -> None:
    complete = False
    async with kits.serving(ready=lambda: complete) as kit:
        assert (await kit.call("GET", "/healthz", tenant=None)).status == 200
        assert (await kit.call("GET", "/readyz", tenant=None)).status == 503
        complete = True
        assert (await kit.call("GET", "/readyz", tenant=None)).status == 200


async def test_unknown_paths_and_methods_are_refused_in_openais_shape(kit: "Kit") -> None:
    assert (await _error(kit, "/v1/assistants", {}))[0] == 404
    answer = await kit.call("GET", "/v1/chat/completions")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert (await answer.json())["error"]["code"] == "method_not_allowed"


async def _letters(texts: list[str]) -> list[list[float]]:
    return [[float(len(text)), 0.5] for text in texts]


async def test_the_openai_client_embeds_texts(kits: "Kits") -> None:
    async with kits.serving(embeddings=TextEmbeddings("mini", _letters)) as kit:
        answer = await kit.client().embeddings.create(model="mini", input=["a", "abc"])
        assert [item.embedding for item in answer.data] == [[1.0, 0.5], [3.0, 0.5]]
        raw = await kit.call("POST", "/v1/embeddings", {"model": "mini", "input": "ab", "encoding_format": "base64"})
        packed = (await raw.json())["data"][0]["embedding"]
        assert struct.unpack("<2f", base64.b64decode(packed)) == (2.0, 0.5)
        status, error = await _error(kit, "/v1/embeddings", {"model": "mini", "input": [1]})
        assert (status, error["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("said", "fix"),
    [({"dimensions": 3}, "ask for 2"), ({"dimensions": "2"}, "ask for 2"), ({"encoding_format": "int8"}, "'base64'")],
)
async def test_what_klatchs_own_embedder_cannot_give_is_refused_by_name(
    kits: "Kits", said: dict[str, Any], fix: str
) -> None:
    async with kits.serving(embeddings=TextEmbeddings("mini", _letters)) as kit:
        status, error = await _error(kit, "/v1/embeddings", {"model": "mini", "input": "ab", **said})
        [param] = said
        assert (status, error["code"], error["param"]) == (400, "invalid_request", param)
        assert fix in error["message"]


async def test_klatchs_own_embedder_takes_what_it_gives_anyway(kits: "Kits") -> None:
    async with kits.serving(embeddings=TextEmbeddings("mini", _letters)) as kit:
        for said in ({"dimensions": 2}, {"dimensions": None}, {"encoding_format": "float"}, {"encoding_format": None}):
            answer = await kit.call("POST", "/v1/embeddings", {"model": "mini", "input": "ab", **said})
            assert [item["embedding"] for item in (await answer.json())["data"]] == [[2.0, 0.5]]


class _Models:
    async def models(self) -> list[str]:
        return ["tiny", "large"]


class _Refusing:
    async def embed(self, _: ModelCall) -> Embedded:
        raise RefusedError(429, ErrorBody("slow down", "requests", None, "rate"), retry_after=2.0)


async def test_models_are_listed_and_a_servers_refusal_keeps_its_status(kits: "Kits") -> None:
    async with kits.serving(models=_Models(), embeddings=_Refusing()) as kit:
        assert [model.id for model in (await kit.client().models.list()).data] == ["tiny", "large"]
        answer = await kit.call("POST", "/v1/embeddings", {"input": "x"})
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["type"]) == (429, "rate", "requests")
        assert answer.headers["retry-after"] == "2"


async def test_no_embeddings_without_a_model(kit: "Kit") -> None:
    assert (await _error(kit, "/v1/embeddings", {"input": "x"}))[0] == 404


async def test_an_error_of_our_own_says_nothing_about_the_inside(kits: "Kits") -> None:
    class Broken:
        async def models(self) -> list[str]:
            raise RuntimeError("secret inside")

    async with kits.serving(models=Broken()) as kit:
        answer = await kit.call("GET", "/v1/models")
        assert answer.status == 500
        assert "secret" not in json.dumps(await answer.json())
