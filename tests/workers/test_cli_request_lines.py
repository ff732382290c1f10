"""From lines of JSON to requests: the three forms, and what is said of lines that are none."""

import json
from typing import Any

import pytest

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, MemoryPolicy
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_workers.cli.request_lines import BadLine, Defaults, request_of

MESSAGES = [{"role": "user", "content": "hi"}]
ACME = Defaults(tenant=Tenant("acme"))


def read(said: Any, defaults: Defaults = ACME, number: int = 1) -> ChatRequested:
    return request_of(json.dumps(said).encode(), number, defaults)


def test_a_whole_event_is_published_as_it_is() -> None:
    event = ChatRequested(
        request=RequestId("r1"),
        tenant=Tenant("globex"),
        conversation=Conversation("c1"),
        body={"model": "m", "messages": [{"role": "user", "content": "hi"}], "vendor": 1},
    )
    assert request_of(codec.encode(event), 1, ACME) == event


def test_shorthand_has_klatchs_fields_beside_those_of_the_body() -> None:
    said = read({"messages": MESSAGES, "model": "m", "seed": 7, "conversation": "c1", "prompt": "assistant"})
    assert said.body == {"messages": MESSAGES, "model": "m", "seed": 7}
    assert (said.conversation, said.tenant) == ("c1", "acme")
    assert said.prompt
    assert (said.prompt.name, said.prompt.version) == ("assistant", None)


def test_shorthand_may_name_its_request_and_its_tenant() -> None:
    said = read({"messages": MESSAGES, "request": "r7", "tenant": "globex"})
    assert (said.request, said.tenant, said.conversation) == ("r7", "globex", "r7")
    assert said.body == {"messages": MESSAGES}


def test_a_body_with_klatch_is_what_the_http_door_takes() -> None:
    said = read({"messages": MESSAGES, "priority": 3, "klatch": {"conversation": "c1", "priority": 1}})
    assert said.priority == 1
    assert said.body == {"messages": MESSAGES, "priority": 3}, "beside `klatch`, every field is the model server's"
    assert said.memory == MemoryPolicy(recent=20, store=True)


def test_a_model_is_filled_in_only_where_a_line_names_none() -> None:
    defaults = Defaults(Tenant("acme"), model="tiny")
    assert read({"messages": MESSAGES}, defaults).body["model"] == "tiny"
    assert read({"messages": MESSAGES, "model": "big"}, defaults).body["model"] == "big"


def test_lines_of_a_named_batch_have_the_same_ids_again_and_different_ones_among_themselves() -> None:
    batch = Defaults(Tenant("acme"), batch="monday")
    ids = [read({"messages": MESSAGES}, batch, number).request for number in (1, 2, 1)]
    assert ids[0] == ids[2] != ids[1]
    assert read({"messages": MESSAGES}).request != read({"messages": MESSAGES}).request


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"messages": []}, "messages"),
        ({"model": "m"}, "messages"),
        ({"messages": MESSAGES, "conversation": ""}, "conversation"),
        ({"messages": MESSAGES, "request": "no spaces"}, "request"),
        ({"messages": MESSAGES, "priority": 11}, "priority"),
        ({"messages": MESSAGES, "deadline_ms": 10**400}, "deadline_ms"),
        ({"messages": MESSAGES, "klatch": {"convresation": "c1"}}, "klatch.convresation"),
        ({"kind": "chat.requested.v1", "messages": MESSAGES}, "tenant"),
        ({"kind": "stream.end.v1"}, "kind"),
        ([1], "object"),
    ],
)
def test_what_is_wrong_is_said_by_field(said: Any, named: str) -> None:
    with pytest.raises(BadLine, match=named):
        read(said)


def test_a_field_of_klatch_is_named_as_the_line_named_it() -> None:
    with pytest.raises(BadLine, match=r"^conversation: "):
        read({"messages": MESSAGES, "conversation": ""})


def test_without_a_tenant_the_line_says_how_to_name_one() -> None:
    with pytest.raises(BadLine, match="--tenant"):
        read({"messages": MESSAGES}, Defaults())


def test_what_is_no_json_is_said_to_be_none() -> None:
    with pytest.raises(BadLine, match="not JSON"):
        request_of(b'{"messages": ', 1, ACME)
