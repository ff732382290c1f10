"""What memory does with a turn that cannot be remembered, and how it tells that from a service that takes none."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from tests.workers.test_memory_worker import turn

from klatch_agents.embeddings.openai_compatible import OpenAICompatibleEmbedder
from klatch_agents.embeddings.port import EmbeddingFailed, EmbeddingUnavailable
from klatch_agents.memory.edge import EdgeIndex
from klatch_agents.memory.port import MemoryFailed, Point, Scope
from klatch_agents.memory.recall import Recall
from klatch_agents.testing.embedder import HashingEmbedder, embeddings_app
from klatch_schemas import codec
from klatch_schemas.ids import Conversation, Person, Tenant
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import CHAT_TURNS, DEAD_LETTERS, TOPICS, Namespace
from klatch_streams.dead_headers import ATTEMPTS, ERROR, REASON, STAGE
from klatch_streams.memory_log import MemoryLog
from klatch_workers.memory.stage import MemoryStage

PLACE = Partition(CHAT_TURNS.name, 0)
HASHING = HashingEmbedder()
PAUSES = (0.0, 0.0, 0.0)


@dataclass
class Server:
    """An embeddings server that refuses some texts."""

    status: int = 400
    refuses: str = "poison"
    refusals_left: int = 1_000
    url: str = ""
    asked: list[list[str]] = field(default_factory=list[list[str]])

    def application(self) -> web.Application:
        app = embeddings_app(HASHING)
        app.middlewares.append(self.refuse)
        return app

    @property
    def refuse(self) -> Middleware:
        @web.middleware
        async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
            texts = (await request.json())["input"]
            self.asked.append(texts)
            if self.refusals_left and any(self.refuses in text for text in texts):
                self.refusals_left -= 1
                return web.json_response({"error": {"message": f"bad input: {texts}"}}, status=self.status)
            return await handler(request)

        return refuse


class ReadOnly(EdgeIndex):
    """An index whose key may only read."""

    async def upsert(self, points: Sequence[Point]) -> None:
        raise MemoryFailed(f"{len(points)} points: 403")


@dataclass
class Remembering:
    """A stage without a runner, whose embeddings come from `server`."""

    log: MemoryLog
    server: Server
    index: EdgeIndex
    recall: Recall
    stage: MemoryStage
    taken: int = 0

    async def take(self, *texts: str) -> int:
        """Tell turns of these texts in one batch; returns what may be committed."""
        first = self.taken
        drafts = [
            codec.draft(CHAT_TURNS.name, "c1", turn(f"r{first + number}", "acme", "ada", text))
            for number, text in enumerate(texts)
        ]
        owner = await self.stage.own(PLACE, first)
        await owner.take([_record(draft, first + number) for number, draft in enumerate(drafts)])
        self.taken += len(texts)
        return await owner.checkpoint()

    async def knows(self, text: str) -> bool:
        found = await self.recall.recall(Scope(Tenant("acme"), Person("ada")), text, 1)
        return [one.text for one in found] == [text]

    def letters(self) -> list[dict[str, str]]:
        named = (STAGE, REASON, ATTEMPTS)
        letters = self.log.records(DEAD_LETTERS.name)
        return [{name: (letter.header(name) or b"").decode() for name in named} for letter in letters]


def _record(draft: Draft, offset: int) -> Record:
    return Record(PLACE, offset, 1, draft.key, draft.value, tuple(draft.headers))


@pytest.fixture
async def remembering(tmp_path: Path) -> AsyncIterator[Remembering]:
    async with AsyncExitStack() as parts:
        server = Server()
        serving = web.AppRunner(server.application())
        await serving.setup()
        parts.push_async_callback(serving.cleanup)
        await web.TCPSite(serving, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{serving.addresses[0][1]}/v1"
        embedder = OpenAICompatibleEmbedder(server.url, HASHING.model_id, HASHING.dimension)
        parts.push_async_callback(embedder.close)
        index = await EdgeIndex.open(tmp_path / "index", embedder.model_id, embedder.dimension)
        parts.push_async_callback(index.close)
        log = MemoryLog({topic.name: 1 for topic in TOPICS})
        recall = Recall(embedder, index, threshold=0.1)
        yield Remembering(log, server, index, recall, MemoryStage(log, Namespace(), recall, PAUSES))


async def test_a_turn_that_the_model_refuses_is_a_dead_letter_and_its_neighbours_are_remembered(
    remembering: Remembering,
) -> None:
    assert await remembering.take("my boat is red", "poison", "my house is blue") == 3
    assert remembering.letters() == [{"dead-stage": "memory", "dead-reason": "failed", "dead-attempts": "2"}]
    assert await remembering.knows("my boat is red")
    assert await remembering.knows("my house is blue")


async def test_a_letter_does_not_quote_what_the_server_said(remembering: Remembering) -> None:
    await remembering.take("poison")
    [letter] = remembering.log.records(DEAD_LETTERS.name)
    said = (letter.header(ERROR) or b"").decode()
    assert said.startswith("EmbeddingFailed at ")
    assert "poison" not in said


async def test_a_refused_turn_that_is_alone_in_its_batch_does_not_stop_memory(remembering: Remembering) -> None:
    assert await remembering.take("poison") == 1
    assert await remembering.take("my boat is red") == 2
    assert len(remembering.letters()) == 1
    assert await remembering.knows("my boat is red")


async def test_nobody_recalls_the_text_that_the_service_was_tried_with(remembering: Remembering) -> None:
    await remembering.take("poison")
    assert ["hello"] in remembering.server.asked
    nobody = Scope(Tenant("(probe)"), None, Conversation("probe"))
    assert not await remembering.recall.recall(nobody, "hello", 1)


async def test_a_server_that_refuses_everything_buries_nothing(remembering: Remembering) -> None:
    remembering.server.refuses, remembering.server.status = "", 401
    with pytest.raises(EmbeddingFailed):
        await remembering.take("my boat is red", "my house is blue")
    assert remembering.letters() == []


async def test_a_wrong_dimension_buries_nothing(remembering: Remembering) -> None:
    wrong = OpenAICompatibleEmbedder(remembering.server.url, HASHING.model_id, HASHING.dimension + 1)
    remembering.stage.recall = Recall(wrong, remembering.index)
    with pytest.raises(EmbeddingFailed, match="set the embedding dimension"):
        await remembering.take("my boat is red")
    await wrong.close()
    assert remembering.letters() == []


async def test_a_server_that_is_down_buries_nothing(remembering: Remembering) -> None:
    remembering.server.refuses, remembering.server.status = "", 503
    with pytest.raises(EmbeddingUnavailable):
        await remembering.take("my boat is red")
    assert remembering.letters() == []


async def test_an_index_that_takes_no_writes_buries_nothing(remembering: Remembering, tmp_path: Path) -> None:
    index = await ReadOnly.open(tmp_path / "other", HASHING.model_id, HASHING.dimension)
    remembering.stage.recall = Recall(HASHING, index)
    with pytest.raises(MemoryFailed, match="403"):
        await remembering.take("my boat is red")
    await index.close()
    assert remembering.letters() == []


async def test_a_turn_that_fails_as_if_it_may_be_mended_is_tried_again_and_remembered(remembering: Remembering) -> None:
    # Of the batch, and three of the turn alone.
    remembering.server.status, remembering.server.refusals_left = 500, 4
    assert await remembering.take("poison") == 1
    assert remembering.letters() == []
    assert await remembering.knows("poison")


async def test_a_turn_on_which_the_server_fails_each_time_is_given_up_after_all_its_tries(
    remembering: Remembering,
) -> None:
    remembering.server.status = 500
    assert await remembering.take("poison", "my boat is red") == 2
    assert remembering.letters() == [{"dead-stage": "memory", "dead-reason": "failed", "dead-attempts": "4"}]
    assert await remembering.knows("my boat is red")
