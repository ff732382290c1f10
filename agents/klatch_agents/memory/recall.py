"""Recall and remembering: turns into memories, and a question into the memories that bear on it.

What a person and the assistant said is remembered, in parts that the embedding model can read whole; what tools
returned is not. A turn that is told twice leaves the same memories. Recall drops what is too far from the question
and what says the same again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from klatch_agents.embeddings.port import Embedder
from klatch_agents.memory.port import Memory, Point, Scope, VectorIndex, WholeTenant
from klatch_schemas.events import TurnFinished
from klatch_schemas.ids import Conversation, RequestId, Tenant

# About 256 tokens of English, which MiniLM reads; less of other languages.
_PART: Final = 1_000
_SPOKEN: Final = ("user", "assistant")
# Repetitions are dropped after the search, so a little more is searched for than is wanted.
_SPARE: Final = 2
# No real tenant can have this name, so nobody's recall finds it.
_PROBE: Final = Memory(
    tenant=Tenant("(probe)"),
    person=None,
    conversation=Conversation("probe"),
    request=RequestId("probe"),
    role="user",
    part=0,
    text="hello",
    at_ms=0,
)


@dataclass(frozen=True, slots=True)
class Recalled:
    """A memory that bears on the question; `score` is the cosine, from the threshold up to 1."""

    id: str
    text: str
    score: float
    role: str
    request: RequestId
    at_ms: int


class Recall:
    """Remembers turns and recalls them, within one scope at a time.

    `threshold` is the least cosine of what is recalled; it depends on the model. For MiniLM, 0.3 keeps what is on the
    subject and drops small talk.
    """

    def __init__(self, embedder: Embedder, index: VectorIndex, threshold: float = 0.3) -> None:
        self._embedder = embedder
        self._index = index
        self._threshold = threshold

    async def recall(self, scope: Scope, question: str, limit: int) -> list[Recalled]:
        """At most `limit` memories of the scope, the nearest first.

        Raises `EmbeddingFailed` and `MemoryFailed`; whether a request goes on without its memories is the caller's.
        """
        if limit <= 0 or not question.strip():
            return []
        (vector,) = await self._embedder.embed([question])
        hits = await self._index.search(vector, scope, limit * _SPARE)
        near = [
            Recalled(
                id=str(hit.memory.id),
                text=hit.memory.text,
                score=hit.score,
                role=hit.memory.role,
                request=hit.memory.request,
                at_ms=hit.memory.at_ms,
            )
            for hit in hits
            if hit.score >= self._threshold
        ]
        return list(_distinct(near))[:limit]

    async def remember(self, turns: Iterable[TurnFinished]) -> int:
        """Embeds and stores the turns that ask for it, all in one batch; returns how many memories they made."""
        memories = [memory for turn in turns for memory in memories_of(turn)]
        vectors = await self._embedder.embed([memory.text for memory in memories])
        await self._index.upsert([Point(*pair) for pair in zip(memories, vectors, strict=True)])
        return len(memories)

    async def probe(self) -> None:
        """See whether a plain text can be remembered at all, and forget it. Raises as `remember` does."""
        (vector,) = await self._embedder.embed([_PROBE.text])
        await self._index.upsert([Point(_PROBE, vector)])
        await self._index.forget(WholeTenant(_PROBE.tenant))


def memories_of(turn: TurnFinished) -> Iterator[Memory]:
    """What is to be remembered of a turn: nothing, unless it completed and was to be stored."""
    if not turn.store or turn.status != "completed":
        return
    parts = dict.fromkeys(_SPOKEN, 0)
    # Of several choices the first is the reply that a conversation goes on from.
    for message in (*turn.messages, *turn.reply[:1]):
        role = message.get("role")
        if not isinstance(role, str) or role not in _SPOKEN:
            continue
        for text in split_text(text_of(message)):
            yield Memory(
                tenant=turn.tenant,
                person=turn.person,
                conversation=turn.conversation,
                request=turn.request,
                role=role,
                part=parts[role],
                text=text,
                at_ms=turn.finished_ms,
            )
            parts[role] += 1


def text_of(message: Mapping[str, object]) -> str:
    """The text of a message: its content, or the text parts of it, an empty line between them."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    return "\n\n".join(_part_texts(cast("Sequence[object]", content)))


def split_text(text: str, most: int = _PART) -> Iterator[str]:
    """`text` in parts of at most `most` characters, cut where a paragraph, a line, a sentence or a word ends."""
    rest = text.strip()
    while len(rest) > most:
        cut = _cut(rest, most)
        yield rest[:cut].rstrip()
        rest = rest[cut:].lstrip()
    if rest:
        yield rest


def _cut(text: str, most: int) -> int:
    """Where to cut: at the best mark in the second half of the first `most` characters."""
    for mark in ("\n\n", "\n", ". ", " "):
        found = text.rfind(mark, most // 2, most)
        if found > 0:
            return found + len(mark)
    return most


def _part_texts(content: Sequence[object]) -> Iterator[str]:
    for part in content:
        if isinstance(part, Mapping):
            text = cast("Mapping[str, object]", part).get("text")
            if isinstance(text, str):
                yield text


def _distinct(found: Iterable[Recalled]) -> Iterator[Recalled]:
    """The best of those that say the same but for case and spacing."""
    seen: set[str] = set()
    for recalled in found:
        said = " ".join(recalled.text.casefold().split())
        if said not in seen:
            seen.add(said)
            yield recalled
