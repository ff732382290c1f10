"""What is written is read back, whatever it holds; what is no event is refused with a reason, and never a crash."""

import json
from typing import Any

import msgspec
import pytest
from aiokafka.partitioner import murmur2  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.schemas.conftest import instances, json_values

from klatch_schemas import codec
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import EVENTS, ChatRequested, Event, StreamDelta
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Cause, Partition, partition_of

KINDS = {event.KIND: event for event in EVENTS}
TEXT = "what-a-message-says"
REQUESTED: dict[str, Any] = {"kind": "chat.requested.v1", "request": "r1", "tenant": "acme", "conversation": "c1"}


def _value(**fields: object) -> bytes:
    return json.dumps({**REQUESTED, "body": {}, **fields}).encode()


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {StreamDelta.KIND}))
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])  # strategies are made on the way
@given(st.data())
def test_every_event_is_read_back_as_it_was_written(kind: str, data: st.DataObject) -> None:
    event: Event = data.draw(instances(KINDS[kind]))
    value = codec.encode(event)
    assert codec.decode(value) == event
    assert codec.encode(codec.decode_as(KINDS[kind], value)) == value
    assert json.loads(value)["kind"] == kind


@given(instances(StreamDelta))
def test_a_delta_written_either_way_is_read_as_the_same(event: StreamDelta) -> None:
    prefix = codec.delta_prefix(event.request, event.attempt, event.writer)
    by_hand = codec.decode(codec.encode_delta(prefix, event.seq, codec.dumps(event.chunk), event.deployment))
    by_model = codec.decode(codec.encode(event))
    for delta in (by_hand, by_model):
        assert isinstance(delta, Delta)
        assert (delta.request, delta.attempt, delta.writer) == (event.request, event.attempt, event.writer)
        assert (delta.seq, codec.loads(bytes(delta.chunk))) == (event.seq, event.chunk)
        assert delta.deployment == event.deployment


def test_a_chunk_passes_through_as_the_bytes_that_came() -> None:
    chunk = b'{ "id" : "x",  "n":1.50, "t":"\\u00e9" }'
    delta = codec.decode(codec.encode_delta(codec.delta_prefix("r", 1, "w"), 0, chunk))
    assert isinstance(delta, Delta)
    assert bytes(delta.chunk) == chunk


def test_half_a_surrogate_pair_in_a_chunk_survives() -> None:
    delta = codec.decode(codec.encode_delta(codec.delta_prefix("r", 1, "w"), 0, b'{"t":"\\ud83d"}'))
    assert isinstance(delta, Delta)
    assert codec.loads(bytes(delta.chunk)) == {"t": "\ud83d"}


@given(json_values)
def test_json_is_read_back_as_it_was_written(value: object) -> None:
    assert codec.loads(codec.dumps(value)) == value


def test_half_a_surrogate_pair_survives_since_a_model_server_may_split_one() -> None:
    event = ChatRequested(
        request=RequestId("r1"), tenant=Tenant("acme"), conversation=Conversation("c1"), body={"\ud83d": ["\ude00"]}
    )
    assert codec.decode(codec.encode(event)) == event


@settings(max_examples=150)
@given(st.binary())
def test_any_bytes_are_an_event_or_unreadable(value: bytes) -> None:
    _read(value)


@settings(max_examples=150)
@given(st.sampled_from(sorted(KINDS)), st.dictionaries(st.text(), json_values), st.data())
def test_any_json_is_an_event_or_unreadable(kind: str, fields: dict[str, object], data: st.DataObject) -> None:
    names = st.sampled_from(sorted(KINDS[kind].model_fields))
    fields |= data.draw(st.dictionaries(names, json_values, max_size=6))
    _read(codec.dumps({**fields, "kind": kind}))
    _read(b'{"kind":"stream.delta.v1",' + codec.dumps(fields)[1:])


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])  # strategies are made on the way
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_a_record_that_was_cut_or_changed_on_its_way_is_an_event_or_unreadable(kind: str, data: st.DataObject) -> None:
    value = bytearray(codec.encode(data.draw(instances(KINDS[kind]))))
    at = data.draw(st.integers(0, len(value) - 1))
    value[at] = data.draw(st.integers(0, 255))
    _read(bytes(value))
    _read(bytes(value[:at]))


def _read(value: bytes) -> None:
    reason = ""
    try:
        event = codec.decode(value)
    except Unreadable as error:
        event, reason = None, str(error)
    assert (event is None) == bool(reason)
    assert len(reason) < 2_000
    if event is None:
        return
    if isinstance(event, Event):
        assert codec.decode(codec.encode(event)) == event
    else:
        assert isinstance(codec.loads(bytes(event.chunk)), dict)
        assert event.attempt >= 1


DEEP = 100_000
UNREADABLE = {
    "nothing": None,
    "no object": b"[]",
    "no kind": b"{}",
    "a kind that is no text": b'{"kind":7}',
    "a kind that nobody knows": b'{"kind":"chat.unknown.v1"}',
    "a version before the first": b'{"kind":"chat.requested.v0"}',
    "not a number": _value(body={"temperature": float("nan")}),
    "a number past all bounds": b'{"kind":"chat.requested.v1","body":{"temperature":1e999}}',
    "a body nested past all bounds": _value(body=0).replace(b'"body": 0', b'"body":' + b"[" * DEEP + b"]" * DEEP),
    "a member nested past all bounds": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b',"kind":"chat.requested.v1"}',
    "a chunk nested past all bounds": b'{"kind":"stream.delta.v1","chunk":' + b"[" * DEEP,
    "a delta of no attempt": b'{"kind":"stream.delta.v1","request":"r","attempt":0,"writer":"","seq":0,"chunk":{}}',
    "a delta before the first": b'{"kind":"stream.delta.v1","request":"r","attempt":1,"writer":"","seq":-1,"chunk":{}}',
    "a chunk that is no object": (
        b'{"kind":"stream.delta.v1","request":"r","attempt":1,"writer":"w","seq":0,"chunk":[]}'
    ),
    "a chunk that is no text": (
        b'{"kind":"stream.delta.v1","request":"r","attempt":1,"writer":"w","seq":0,"chunk":{"a":"\xff"}}'
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_reader_could_use_is_unreadable(name: str) -> None:
    with pytest.raises(Unreadable):
        codec.decode(UNREADABLE[name])


def test_a_newer_version_is_read_as_the_newest_that_is_known() -> None:
    value = _value(kind="chat.requested.v3", invented="later", memory={"recent": 4, "invented": True})
    event = codec.decode_as(ChatRequested, value)
    assert (event.request, event.memory.recent, event.kind) == ("r1", 4, "chat.requested.v1")


def test_a_newer_version_that_fits_no_longer_is_unreadable() -> None:
    with pytest.raises(Unreadable, match=r"chat\.requested\.v3: tenant"):
        codec.decode(_value(kind="chat.requested.v3", tenant={"name": "acme"}))


@pytest.mark.parametrize(
    "fields",
    [
        {"body": TEXT},
        {"body": [TEXT]},
        {"kind": TEXT},
        {"kind": f"{TEXT}.v1"},
        {"tenant": TEXT + "\n"},
        {"priority": TEXT},
        {"if_busy": TEXT},
        {"memory": {TEXT: 1, "recent": TEXT}},
        {"prompt": {"name": TEXT + "!", "variables": {TEXT: []}}},
        {"context": {"consent": {TEXT: TEXT}}},
        {"body": {TEXT: "x"}, "deadline_ms": -1},
        {"skills": [TEXT + " "] * 50},
    ],
)
def test_no_error_repeats_what_a_message_says(fields: dict[str, object]) -> None:
    with pytest.raises(Unreadable) as caught:
        codec.decode(_value(**fields))
    assert TEXT not in str(caught.value)
    assert len(str(caught.value)) < 1_000


def test_an_error_in_a_body_that_is_nested_too_deeply_repeats_none_of_its_keys() -> None:
    body = (b'{"%b":' % TEXT.encode()) * 300 + b"1" + b"}" * 300
    with pytest.raises(Unreadable) as caught:
        codec.decode(_value(body=0).replace(b'"body": 0', b'"body":' + body))
    assert TEXT not in str(caught.value)
    assert len(str(caught.value)) < 1_000


@given(st.binary(max_size=40), st.integers(1, 300))
def test_keys_go_to_the_partition_that_kafkas_own_partitioner_gives_them(key: bytes, count: int) -> None:
    assert partition_of(key, count) == (murmur2(key) & 0x7FFFFFFF) % count


@given(st.from_regex(r"\A[a-z./-]+\Z"), st.integers(0, 999), st.integers(0), st.integers(0))
def test_a_cause_is_read_back_as_it_was_written(topic: str, number: int, offset: int, effect: int) -> None:
    cause = Cause(Partition(topic, number), offset, effect)
    assert Cause.parse(str(cause)) == cause


def test_an_effect_that_is_repeated_has_the_same_event_id_and_another_effect_has_not() -> None:
    event = codec.decode_as(ChatRequested, _value())
    cause = Cause(Partition("chat.requests", 1), 7, 0)
    first, again = (codec.draft("t", "k", event, cause=cause) for _ in range(2))
    other = codec.draft("t", "k", event, cause=cause._replace(effect=1))
    assert first == again
    assert dict(first.headers)["event-id"] != dict(other.headers)["event-id"]


def test_the_short_way_and_the_long_way_refuse_the_same_deltas() -> None:
    for fields in ({"attempt": 0}, {"seq": -1}, {"request": 1}, {"chunk": 1}):
        whole: dict[str, object] = {"request": "r", "attempt": 1, "writer": "w", "seq": 0, "chunk": {}, **fields}
        for order in (["kind", *whole], [*whole, "kind"]):
            value = msgspec.json.encode({name: {**whole, "kind": StreamDelta.KIND}[name] for name in order})
            with pytest.raises(Unreadable):
                codec.decode(value)
