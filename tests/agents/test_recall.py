"""Turns become memories once, and a question finds those that bear on it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_agents.memory.edge import EdgeIndex
from klatch_agents.memory.port import Scope
from klatch_agents.memory.recall import Recall, memories_of, split_text
from klatch_agents.testing.embedder import HashingEmbedder
from klatch_schemas.events import TurnFinished, Usage
from klatch_schemas.ids import Person, Tenant

ANN = Scope(Tenant("t"), Person("ann"))


@pytest.fixture
async def recall(tmp_path: Path) -> AsyncIterator[Recall]:
    embedder = HashingEmbedder(512)
    index = await EdgeIndex.open(tmp_path, embedder.model_id, embedder.dimension)
    yield Recall(embedder, index, threshold=0.3)
    await index.close()


def turn(request: str, question: Any, answer: str = "Noted.", **changes: Any) -> TurnFinished:
    fields: dict[str, Any] = {
        "request": request,
        "tenant": "t",
        "conversation": "c",
        "person": "ann",
        "status": "completed",
        "messages": ({"role": "user", "content": question},),
        "reply": ({"role": "assistant", "content": answer},),
        "usage": Usage(),
        "store": True,
        "attempt": 1,
        "started_ms": 1,
        "finished_ms": 7,
    }
    return TurnFinished.model_validate(fields | changes)


async def test_a_question_recalls_what_was_said_about_it_and_nothing_else(recall: Recall) -> None:
    turns = [turn("r1", "My sister lives in Basel"), turn("r2", "I like green tea with milk")]
    assert await recall.remember(turns) == 4
    (recalled,) = await recall.recall(ANN, "do I like tea or milk", 5)
    assert recalled.text == "I like green tea with milk"
    assert (recalled.request, recalled.role, recalled.at_ms) == ("r2", "user", 7)
    assert 0.3 <= recalled.score <= 1
    assert await recall.recall(ANN, "quantum chromodynamics", 5) == []


async def test_turns_told_again_are_remembered_once(recall: Recall) -> None:
    turns = [turn("r1", "I like tea", "You like tea, I see")]
    for _ in range(3):
        await recall.remember(turns)
    assert len(await recall.recall(ANN, "I like tea", 10)) == 2


async def test_what_says_the_same_again_is_recalled_once(recall: Recall) -> None:
    await recall.remember([turn(f"r{i}", said) for i, said in enumerate(["I like tea", "i  LIKE tea", "I like tea "])])
    assert len(await recall.recall(ANN, "I like tea", 10)) == 1


async def test_another_person_and_another_tenant_recall_nothing(recall: Recall) -> None:
    await recall.remember([turn("r1", "I like tea")])
    for tenant, person in (("t", "bob"), ("u", "ann")):
        assert await recall.recall(Scope(Tenant(tenant), Person(person)), "I like tea", 5) == []


async def test_an_empty_question_or_no_limit_recalls_nothing(recall: Recall) -> None:
    await recall.remember([turn("r1", "I like tea")])
    assert await recall.recall(ANN, "  ", 5) == []
    assert await recall.recall(ANN, "I like tea", 0) == []
    assert await recall.remember([]) == 0


@pytest.mark.parametrize(
    "changes", [{"store": False}, {"status": "blocked"}, {"status": "cancelled"}, {"messages": (), "reply": ()}]
)
def test_a_turn_that_is_not_to_be_stored_makes_no_memories(changes: dict[str, Any]) -> None:
    assert list(memories_of(turn("r1", "I like tea", **changes))) == []


def test_only_what_people_and_the_assistant_said_is_remembered() -> None:
    messages: tuple[dict[str, Any], ...] = (
        {"role": "system", "content": "secret"},
        {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "result", "tool_call_id": "x"},
        {"role": "user", "content": "and this"},
    )
    reply = ({"role": "assistant", "content": "first"}, {"role": "assistant", "content": "second"})
    made = list(memories_of(turn("r1", "", messages=messages, reply=reply)))
    assert [(each.role, each.part, each.text) for each in made] == [
        ("user", 0, "look"),
        ("user", 1, "and this"),
        ("assistant", 0, "first"),
    ]
    assert len({each.id for each in made}) == 3


def test_a_long_text_is_cut_where_a_sentence_ends() -> None:
    sentence = "This is a sentence of some length. "
    parts = list(split_text(sentence * 100))
    assert all(part.endswith("length.") for part in parts)
    assert [len(part) <= 1_000 for part in parts] == [True] * len(parts)


@given(st.text(alphabet="ab .\n", max_size=300), st.integers(2, 40))
def test_cutting_loses_nothing_but_space(text: str, most: int) -> None:
    parts = list(split_text(text, most))
    assert all(0 < len(part) <= most for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
