"""Records that any version of klatch ever wrote are read to the same meaning by this one."""

# Compares plain JSON data.
# pyright: basic
import json
from pathlib import Path
from typing import Any

import pytest

from klatch_schemas import codec
from klatch_schemas.codec import Delta
from klatch_schemas.events import EVENTS

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path.name for path in GOLDEN.glob("*.json"))


def _read(value: bytes) -> dict[str, Any]:
    event = codec.decode(value)
    if isinstance(event, Delta):
        return {
            "kind": "stream.delta.v1",
            "request": event.request,
            "attempt": event.attempt,
            "writer": event.writer,
            "seq": event.seq,
            "deployment": event.deployment,
            "chunk": codec.loads(bytes(event.chunk)),
        }
    fields: dict[str, Any] = json.loads(codec.encode(event))
    return fields


def _holds(today: object, then: object) -> bool:
    """Whether `today` says all that `then` said; it may say more, in fields that did not exist then."""
    if isinstance(then, dict) and isinstance(today, dict):
        return all(name in today and _holds(today[name], value) for name, value in then.items())
    if isinstance(then, list) and isinstance(today, list):
        return len(today) == len(then) and all(map(_holds, today, then))
    return type(today) is type(then) and today == then


@pytest.mark.parametrize("name", FILES)
def test_a_committed_record_means_what_it_meant_when_it_was_written(name: str) -> None:
    then = json.loads((GOLDEN / "means" / name).read_bytes())
    assert _holds(_read((GOLDEN / name).read_bytes()), then)


def test_every_kind_has_a_record_that_says_all_and_one_that_says_the_least() -> None:
    assert {f"{event.KIND}.{name}.json" for event in EVENTS for name in ("full", "least")} <= set(FILES)


def test_a_record_that_says_all_names_every_field_of_its_kind() -> None:
    for event in EVENTS:
        written = json.loads((GOLDEN / f"{event.KIND}.full.json").read_bytes())
        # A field that came later is missing in the old record: add a `.full-2.json` beside it that has it.
        later = [json.loads(path.read_bytes()) for path in GOLDEN.glob(f"{event.KIND}.full-*.json")]
        assert set(event.model_fields) <= set(written).union(*later), event.KIND


def test_a_meaning_that_was_lost_would_be_seen() -> None:
    assert _holds({"a": [1, {"b": 2, "new": 3}]}, {"a": [1, {"b": 2}]})
    assert not _holds({"a": [1, {"b": 2}]}, {"a": [1, {"b": None}]})
    assert not _holds({"a": [1]}, {"a": [1, 2]})
    assert not _holds({"a": 1}, {"a": True})
    assert not _holds({}, {"a": None})
