"""The committed documents: current, valid, and true of what klatch writes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator
from jsonschema.exceptions import ValidationError as Invalid
from tests.schemas.conftest import instances

from klatch_schemas import codec, documents
from klatch_schemas.documents import ASYNCAPI, CONTRACT, JSON_SCHEMAS, ROOT, WRITTEN_OUTSIDE
from klatch_schemas.events import EVENTS, ChatAdmitted, ChatRequested, Event, Reservation, StreamDelta, StreamEnd
from klatch_schemas.ids import Conversation, RequestId, Tenant, Writer
from klatch_schemas.topics import CHAT_REQUESTS, MODELS, PROMPTS, TENANTS, TOPICS, Topic

Json = dict[str, Any]

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
ASYNCAPI_SCHEMA = HERE.parent / "house" / "asyncapi-3.0.0.schema.json"

ASKED = ChatRequested(
    request=RequestId("r-1"), tenant=Tenant("acme"), conversation=Conversation("c-1"), body={"messages": []}
)


def committed(kind: str) -> Json:
    schema: Json = json.loads((ROOT / JSON_SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    return schema


def misfits(kind: type[Event] | str, value: Any) -> list[str]:
    """What does not fit the committed schema of a kind."""
    return _errors(Draft202012Validator(committed(kind if isinstance(kind, str) else kind.KIND)), value)


def asyncapi_misfits(document: Json) -> list[str]:
    return _errors(Draft7Validator(json.loads(ASYNCAPI_SCHEMA.read_text(encoding="utf-8"))), document)


def _errors(validator: Any, value: Any) -> list[str]:
    # jsonschema's stubs leave the iterator's items unknown.
    errors: list[Invalid] = list(validator.iter_errors(value))
    return [error.message for error in errors]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the generator reads and writes."""
    shutil.copytree(ROOT / JSON_SCHEMAS, tmp_path / JSON_SCHEMAS)
    for path in (ASYNCAPI, CONTRACT):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


@pytest.mark.parametrize(
    ("topic", "readers"),
    [
        (CHAT_REQUESTS, {"admission", "screening", "generation", "doors", "views", "operators"}),
        (PROMPTS, {"generation", "operators"}),
        (MODELS, {"generation", "doors", "operators"}),
        (TENANTS, {"doors", "operators"}),
    ],
    ids=lambda value: value.name if isinstance(value, Topic) else "",
)
def test_a_topic_names_who_reads_it_and_nobody_else(topic: Topic, readers: set[str]) -> None:
    assert set(topic.read_by) == readers


def test_the_committed_documents_are_current() -> None:
    assert documents.outdated() == [], "run `make docs` and commit what it wrote"


def test_checking_says_which_documents_are_not_current(checkout: Path) -> None:
    (checkout / ASYNCAPI).write_text("{}")
    checked = CliRunner().invoke(documents.main, ["--check", "--root", str(checkout)])
    assert checked.exit_code == 1
    assert str(ASYNCAPI) in checked.output
    assert "make docs" in checked.output


def test_writing_mends_what_is_missing_changed_or_left_over(checkout: Path) -> None:
    missing, leftover = JSON_SCHEMAS / "stream.end.v1.json", JSON_SCHEMAS / "chat.gone.v1.json"
    (checkout / missing).unlink()
    (checkout / leftover).write_text("{}")
    (checkout / CONTRACT).write_text((checkout / CONTRACT).read_text().replace("`rate_limit_exceeded`", "`limit`"))
    assert set(documents.write(checkout)) == {missing, leftover, CONTRACT}
    assert documents.outdated(checkout) == []
    assert not (checkout / leftover).exists()


def test_a_contract_without_its_marks_is_an_error_that_names_them(checkout: Path) -> None:
    (checkout / CONTRACT).write_text("# The contract\n")
    with pytest.raises(Exception, match="generated: topics"):
        documents.outdated(checkout)


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.KIND)
def test_every_schema_is_valid_json_schema_and_describes_its_kind(kind: type[Event]) -> None:
    schema = committed(kind.KIND)
    Draft202012Validator.check_schema(schema)
    assert schema["description"]
    assert schema["properties"]["kind"]["const"] == kind.KIND
    assert "kind" in schema["required"]


def test_field_docstrings_become_descriptions() -> None:
    described = committed(ChatRequested.KIND)["properties"]["priority"]["description"]
    assert described == "0 is served first."


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.KIND)
def test_only_what_others_write_is_closed_against_unknown_fields(kind: type[Event]) -> None:
    closed = {schema.get("additionalProperties") is False for schema in _models(committed(kind.KIND))}
    assert closed == {kind in WRITTEN_OUTSIDE}


def _models(schema: Json) -> Iterator[Json]:
    yield schema
    yield from (nested for nested in schema.get("$defs", {}).values() if "properties" in nested)


def test_a_misspelt_field_of_a_request_is_found_by_its_schema() -> None:
    value = json.loads(codec.encode(ASKED))
    assert misfits(ChatRequested, value) == []
    assert misfits(ChatRequested, {**value, "deadlin_ms": 1})


def test_a_reader_of_an_older_version_accepts_a_field_that_was_added() -> None:
    admitted = ChatAdmitted(request=ASKED, requested_ms=1, reservation=Reservation(tokens=1, expires_ms=2))
    value = json.loads(codec.encode(admitted))
    value["request"]["added"] = value["added"] = 1
    assert misfits(ChatAdmitted, value) == []


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.KIND)
@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])  # strategies are made on the way
def test_whatever_klatch_may_write_fits_the_schema_of_its_kind(kind: type[Event], data: st.DataObject) -> None:
    event: Event = data.draw(instances(kind))
    assert misfits(kind, codec.loads(codec.encode(event))) == []


@given(seq=st.integers(0, 1 << 40), text=st.text())
def test_a_delta_of_the_hot_path_fits_its_schema(seq: int, text: str) -> None:
    chunk = codec.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
    value = codec.encode_delta(codec.delta_prefix("r-1", 1, "w.0.1"), seq, chunk)
    assert misfits(StreamDelta, codec.loads(value)) == []


def test_every_golden_event_fits_the_schema_of_its_kind() -> None:
    golden = [codec.loads(path.read_bytes()) for path in sorted(GOLDEN.glob("*.json"))]
    assert {value["kind"] for value in golden} >= {kind.KIND for kind in EVENTS}
    assert {value["kind"]: wrong for value in golden if (wrong := misfits(value["kind"], value))} == {}


def test_the_asyncapi_document_fits_the_official_schema() -> None:
    assert asyncapi_misfits(documents.asyncapi()) == []


def test_the_official_schema_refuses_what_is_not_asyncapi() -> None:
    document = documents.asyncapi()
    document["channels"]["chat.stream"]["bindings"]["kafka"]["topicConfiguration"]["cleanup.policy"] = "compact"
    assert asyncapi_misfits(document)


def test_every_topic_is_a_channel_with_a_message_for_each_kind_it_holds() -> None:
    channels: Json = documents.asyncapi()["channels"]
    assert {name: set(channel["messages"]) for name, channel in channels.items()} == {
        topic.name: {kind.KIND for kind in topic.holds} or {"dead.letter", "dead.receipt"} for topic in TOPICS
    }


def test_every_reference_in_the_asyncapi_document_leads_somewhere() -> None:
    document = documents.asyncapi()
    references = set(_references(document))
    assert references
    for reference in references:
        file, _, pointer = reference.partition("#")
        target: Any = document
        if file:
            assert (ROOT / ASYNCAPI.parent / file).is_file()
        for step in pointer.split("/")[1:]:
            target = target[step]


def _references(node: Json) -> Iterator[str]:
    for name, value in node.items():
        if name == "$ref":
            yield value
        elif isinstance(value, dict):
            yield from _references(cast("Json", value))


def test_who_sends_and_receives_is_as_the_topic_table_says() -> None:
    operations: Json = documents.asyncapi()["operations"]
    assert operations["generation.send.chat.stream"]["action"] == "send"
    assert operations["admission.receive.chat.requests"]["channel"] == {"$ref": "#/channels/chat.requests"}
    assert len(operations) == sum(len(topic.written_by) + len(topic.read_by) for topic in TOPICS)


def test_the_schema_and_the_codec_agree_on_what_must_be_there() -> None:
    end = StreamEnd(
        request=RequestId("r-1"),
        tenant=Tenant("acme"),
        conversation=Conversation("c-1"),
        writer=Writer("w"),
        status="completed",
    )
    value = json.loads(codec.encode(end))
    required = committed(StreamEnd.KIND)["required"]
    for name in value:
        without = {other: held for other, held in value.items() if other != name}
        fits = not misfits(StreamEnd, without)
        assert fits == (name not in required)
        assert fits == _reads(without)


def _reads(value: Json) -> bool:
    try:
        codec.decode(codec.dumps(value))
    except codec.Unreadable:
        return False
    return True
