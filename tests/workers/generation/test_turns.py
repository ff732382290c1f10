"""A conversation's past, read from the log: in order, once, as far as retention leaves it, and for its tenant only."""
# pyright: reportPrivateUsage=false
# How much is cached is seen nowhere else.

import asyncio
from collections.abc import Sequence

import pytest
from tests.workers.generation.conftest import Generation
from tests.workers.generation.readings import text_of

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested, MemoryPolicy, TurnFinished, Usage
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Partition
from klatch_schemas.topics import CHAT_TURNS, MAX_RECORD_BYTES
from klatch_streams.memory_log import MemoryLog
from klatch_workers.generation import turns as module
from klatch_workers.generation.heads import Head
from klatch_workers.generation.turns import Conversations, TurnReader

PARTITION = Partition(CHAT_TURNS.name, 0)
REMEMBERED = MemoryPolicy(recent=10)


def request_of(turn: TurnFinished, memory: MemoryPolicy) -> ChatRequested:
    """The request that a turn is of."""
    return ChatRequested(
        request=turn.request, tenant=turn.tenant, conversation=turn.conversation, body={"messages": []}, memory=memory
    )


class Written:
    """Turns in a log, and who reads them."""

    def __init__(self) -> None:
        self.log = MemoryLog({CHAT_TURNS.name: 1}, max_record_bytes=MAX_RECORD_BYTES)
        self.reader = TurnReader(self.log)
        self.conversations = Conversations(PARTITION, self.reader)

    async def turn(
        self,
        request: str,
        conversation: str = "c",
        tenant: str = "acme",
        previous: int | None = -1,
        text: str = "",
        memory: MemoryPolicy = REMEMBERED,
    ) -> int:
        """Append the next turn of a conversation; `previous` of -1 is the last one."""
        head = self.conversations.head(tenant, conversation)
        before = (head.offset if head else None) if previous == -1 else previous
        turn = TurnFinished(
            request=RequestId(request),
            tenant=Tenant(tenant),
            conversation=Conversation(conversation),
            status="completed",
            messages=({"role": "user", "content": text},),
            reply=(),
            usage=Usage(),
            attempt=1,
            started_ms=0,
            finished_ms=0,
            previous=before,
        )
        draft = codec.draft(CHAT_TURNS.name, conversation, turn)
        [(_, offset)] = await self.log.append([draft])
        self.conversations.append(request_of(turn, memory), offset, turn, len(draft.value or b""), offset)
        return offset

    def forget(self) -> None:
        """What a restart keeps are the heads."""
        heads = self.conversations.heads
        self.reader = TurnReader(self.log)
        self.conversations = Conversations(PARTITION, self.reader)
        self.conversations.heads = heads

    async def recent(self, most: int = 10, conversation: str = "c", tenant: str = "acme") -> Sequence[str]:
        return [turn.request for turn in await self.conversations.recent(tenant, conversation, most)]


@pytest.mark.parametrize("restarted", [False, True])
async def test_the_last_turns_come_oldest_first_whatever_stands_between_them(restarted: bool) -> None:
    written = Written()
    for number in range(6):
        await written.turn(f"r{number}")
        await written.turn(f"o{number}", conversation="other")
    if restarted:
        written.forget()
    assert await written.recent() == [f"r{number}" for number in range(6)]
    assert await written.recent(2) == ["r4", "r5"]
    assert await written.recent(conversation="nobody's") == []


async def test_a_turn_that_a_crash_wrote_twice_is_read_once() -> None:
    written = Written()
    for request in ("r1", "r2", "r2", "r3", "r3", "r4"):
        await written.turn(request)
    written.forget()
    assert await written.recent() == ["r1", "r2", "r3", "r4"]
    assert await written.recent(3) == ["r2", "r3", "r4"]


@pytest.mark.parametrize(("tenant", "conversation"), [("globex", "c"), ("acme", "another")])
async def test_a_turn_of_somebody_else_that_took_the_place_of_a_lost_one_is_shown_to_nobody(
    tenant: str, conversation: str
) -> None:
    written = Written()
    await written.turn("mine", "c")
    await written.turn("theirs", conversation, tenant)
    head = written.conversations.head(tenant, conversation)
    assert head
    written.conversations.heads.put("acme/c", head)
    assert await written.recent(conversation="c") == []
    assert await written.recent(conversation=conversation, tenant=tenant) == ["theirs"]


async def test_turns_that_retention_took_end_the_list_and_leave_the_rest() -> None:
    written = Written()
    for number in range(5):
        await written.turn(f"r{number}")
    written.forget()
    written.log.truncate_before(PARTITION, 3)
    assert await written.recent() == ["r3", "r4"]
    written.log.truncate_before(PARTITION, 5)
    written.forget()
    assert await written.recent() == []
    # The reader lives on.
    await written.turn("r5")
    assert await written.recent() == ["r5"]


async def test_a_request_whose_past_is_gone_is_answered_without_it(generation: Generation) -> None:
    async with generation.worker():
        first = await generation.admit("fake?text=gone")
        await generation.turn(first)
    for partition in generation.log.records_of(CHAT_TURNS.name):  # type: ignore[attr-defined]
        generation.log.truncate_before(partition, 1)  # type: ignore[attr-defined]
    async with generation.worker():
        second = await generation.admit("fake?reply=echo-messages", memory={"recent": 5})
        ended = await generation.ended(second)
    assert ended.state.status == "completed"
    assert "gone" not in text_of(ended.standing)


async def test_tenants_that_chose_the_same_name_never_see_each_others_turns(generation: Generation) -> None:
    memory = {"recent": 10}
    async with generation.worker():
        for tenant in ("acme", "zeta"):
            first = await generation.admit(f"fake?text=secret of {tenant}", tenant=tenant, memory=memory)
            await generation.turn(first)
    async with generation.worker():
        for tenant, other in (("acme", "zeta"), ("zeta", "acme")):
            second = await generation.admit("fake?reply=echo-messages", tenant=tenant, memory=memory)
            text = text_of((await generation.ended(second)).standing)
            assert f"secret of {tenant}" in text
            assert f"secret of {other}" not in text


async def test_tenants_that_chose_the_same_name_do_not_wait_for_each_other(generation: Generation) -> None:
    async with generation.worker(), asyncio.timeout(30):
        slow = await generation.admit("fake?first_delay=60", tenant="acme")
        await generation.assembled(slow, lambda assembly: assembly.state.attempt == 1)
        quick = await generation.admit("fake?text=quick", tenant="zeta")
        assert (await generation.ended(quick)).state.status == "completed"


async def test_what_is_cached_is_bounded_and_what_is_not_cached_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED", 4)  # a setting, made small enough to reach
    written = Written()
    for number in range(20):
        await written.turn(f"r{number}")
    assert await written.recent(20) == [f"r{number}" for number in range(20)]
    assert len(written.reader._cache) <= 4


def size_of_cached(written: Written) -> int:
    """What is at hand, as the log has it."""
    return sum(len(written.log.held(PARTITION).records[offset].value or b"") for _, offset in written.reader._cache)


async def test_large_turns_that_stay_at_hand_are_bounded_by_their_size_and_the_others_are_read_again() -> None:
    written = Written()
    texts = [f"{number} " + "x" * 8_000_000 for number in range(10)]
    for number, text in enumerate(texts):
        await written.turn(f"r{number}", text=text)
        assert size_of_cached(written) <= module.CACHED_BYTES
    assert len(written.reader._cache) == 4, "as many as there is room for stay at hand"
    turns = await written.conversations.recent("acme", "c", 10)
    assert [turn.messages[0]["content"] for turn in turns] == texts
    assert size_of_cached(written) == written.reader.cached_bytes <= module.CACHED_BYTES


async def test_requests_that_stand_alone_leave_nothing_to_remember() -> None:
    written = Written()
    for number in range(20_000):
        await written.turn(f"r{number}", conversation=f"r{number}", memory=MemoryPolicy(recall=3))
    assert (len(written.conversations.heads), written.conversations.changed) == (0, {})
    assert len(written.reader._cache) == 0


@pytest.mark.parametrize("memory", [MemoryPolicy(recent=1), MemoryPolicy(store=True)])
async def test_a_conversation_that_is_named_as_its_first_request_goes_on_if_it_is_to_be_remembered(
    memory: MemoryPolicy,
) -> None:
    written = Written()
    await written.turn("c", conversation="c", memory=memory)
    assert await written.recent() == ["c"]


async def test_a_turn_that_the_log_has_lost_ends_the_list_and_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SILENT_S", 1)  # a setting, made short enough to wait for
    written = Written()
    offset = await written.turn("r1")
    await written.turn("r2", conversation="other", previous=offset + 2)
    written.conversations.heads.put("acme/other", Head(offset + 2, offset + 2))
    assert await written.recent(conversation="other") == []
