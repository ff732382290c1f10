"""A decider's owner: effects with causes, dead letters for what it cannot use, records moved to where they belong."""
# pyright: reportPrivateUsage=false

from collections.abc import Sequence
from typing import cast

import pytest

from klatch_schemas import codec
from klatch_schemas.events import Event, PromptPublished, Usage, UsageSettled
from klatch_schemas.ids import RequestId, Tenant
from klatch_schemas.records import Cause, Draft, Partition, partition_of
from klatch_schemas.topics import ADMISSION_STATE, CHAT_REQUESTS, CHAT_STREAM, DEAD_LETTERS, Namespace
from klatch_streams.addresses import MOVED_FROM
from klatch_streams.decider_owner import DeciderOwner, DeciderStage
from klatch_streams.kernel import Emit, Input
from klatch_streams.memory_log import MemoryLog

HERE = Namespace.named("t")
REQUESTS, STREAM, DEAD = HERE.of(CHAT_REQUESTS), HERE.of(CHAT_STREAM), HERE.of(DEAD_LETTERS)


class Summing:
    """Sums what a tenant used and tells each sum; it stumbles over a request called `bug`, and bloats on `huge`."""

    name = "summing"
    input = CHAT_REQUESTS
    state = ADMISSION_STATE

    def initial(self, key: str) -> int:
        del key
        return 0

    def decide(self, state: int, said: Input[int]) -> tuple[int, Sequence[Emit]]:
        event = cast("UsageSettled", said.event)
        if event.request == "bug":
            raise ZeroDivisionError("the message's own words")
        total = state + event.usage.prompt_tokens
        model = "x" * 2_000_000 if event.request == "huge" else ""
        told = event.model_copy(update={"usage": Usage(prompt_tokens=total), "model": model})
        return total, [Emit(CHAT_STREAM, event.tenant, told)]

    def dump(self, state: int) -> dict[str, object]:
        return {"sum": state} if state else {}

    def load(self, key: str, parts: dict[str, object]) -> int:
        del key
        return cast("int", parts.get("sum", 0))


def a_log() -> MemoryLog:
    return MemoryLog({HERE.of(topic): 4 for topic in (CHAT_REQUESTS, ADMISSION_STATE, CHAT_STREAM, DEAD_LETTERS)})


def used(tokens: int, request: str = "r", tenant: str = "acme") -> UsageSettled:
    usage = Usage(prompt_tokens=tokens)
    return UsageSettled(request=RequestId(request), tenant=Tenant(tenant), status="completed", usage=usage)


ACME = partition_of(b"acme", 4)


async def owner_of(log: MemoryLog, number: int = ACME, committed: int = 0) -> DeciderOwner[int]:
    return await DeciderStage(Summing(), log, HERE).own(Partition(REQUESTS, number), committed)


async def fed(log: MemoryLog, *drafts: Draft, number: int = ACME) -> DeciderOwner[int]:
    """An owner that took everything that stands in a partition once `drafts` do."""
    await log.append(drafts)
    owner = await owner_of(log, number)
    await owner.take(log.held(Partition(REQUESTS, number)).records)
    return owner


def asked(event: Event, key: str = "acme", partition: int | None = None) -> Draft:
    return codec.draft(REQUESTS, key, event, partition=partition)


def sums(log: MemoryLog) -> list[int]:
    return [codec.decode_as(UsageSettled, record.value).usage.prompt_tokens for record in log.records(STREAM)]


async def test_effects_are_named_by_their_causes_and_the_next_offset_is_told() -> None:
    log = a_log()
    owner = await fed(log, asked(used(1)), asked(used(2)))
    assert sums(log) == [1, 3]
    causes = [Cause.parse((record.header(codec.CAUSE) or b"").decode()) for record in log.records(STREAM)]
    assert causes == [Cause(Partition(REQUESTS, ACME), offset, 0) for offset in (0, 1)]
    assert await owner.checkpoint() == 2


async def test_records_that_went_into_a_restored_state_are_passed_over() -> None:
    log = a_log()
    owner = await fed(log, asked(used(1)), asked(used(2)))
    await owner.checkpoint()
    await log.append([asked(used(4))])
    successor = await owner_of(log)
    await successor.take(log.held(Partition(REQUESTS, ACME)).records)
    assert sums(log) == [1, 3, 7]
    assert await successor.checkpoint() == 3


async def test_what_it_cannot_use_goes_to_dead_letters_and_the_rest_goes_on() -> None:
    log = a_log()
    bad = [
        Draft(REQUESTS, b"acme", b"\x00garbage", (("a", b"b"),), ACME),
        Draft(REQUESTS, b"acme", None, (), ACME),
        asked(PromptPublished(name="p", version=1, template=""), partition=ACME),
        asked(used(1, "bug")),
    ]
    owner = await fed(log, *bad, asked(used(5)))
    letters = {int(letter.header("dead-offset") or b""): letter for letter in log.records(DEAD)}
    reasons = [letters[offset].header("dead-reason") for offset in range(4)]
    assert reasons == [b"unreadable", b"unreadable", b"wrong-topic", b"decider-failed"]
    assert [letters[offset].value for offset in range(4)] == [draft.value for draft in bad]
    assert b"words" not in (letters[3].header("dead-error") or b"")
    assert sums(log) == [5]
    assert await owner.checkpoint() == 5


async def test_an_effect_too_large_for_the_log_sets_its_record_aside_alone() -> None:
    log = a_log()
    owner = await fed(log, asked(used(1)), asked(used(10, "huge")), asked(used(2)))
    [letter] = log.records(DEAD)
    assert (letter.header("dead-offset"), letter.header("dead-reason")) == (b"1", b"too-large")
    assert sums(log) == [1, 3], "what was set aside has left a trace in the state"
    assert await owner.checkpoint() == 3


@pytest.mark.parametrize(("key", "number"), [("other", None), ("acme", (ACME + 1) % 4)])
async def test_a_record_under_a_wrong_key_or_partition_is_moved_to_where_it_belongs(
    key: str, number: int | None
) -> None:
    log = a_log()
    wrong = partition_of(key.encode(), 4) if number is None else number
    owner = await fed(log, asked(used(5), key, number), number=wrong)
    assert sums(log) == []
    assert await owner.checkpoint() == 1
    moved = log.held(Partition(REQUESTS, ACME)).records[-1]
    original = log.held(Partition(REQUESTS, wrong)).records[0]
    assert (moved.key, moved.value) == (b"acme", original.value)
    assert moved.headers == (*original.headers, (MOVED_FROM, f"{REQUESTS}/{wrong}/0".encode()))
    await fed(log)
    assert sums(log) == [5]


async def test_a_record_is_moved_once_and_then_a_dead_letter() -> None:
    log = a_log()
    stray = asked(used(5), "other", 0)
    await fed(log, stray._replace(headers=[*stray.headers, (MOVED_FROM, b"x/0/0")]), number=0)
    [letter] = log.records(DEAD)
    assert letter.header("dead-reason") == b"mis-keyed"


async def test_a_key_whose_state_is_empty_again_leaves_memory_and_topic() -> None:
    log = a_log()
    owner = await fed(log, asked(used(0)))
    assert list(owner.states) == []
    await log.append([asked(used(3))])
    await owner.take(log.held(Partition(REQUESTS, ACME)).records[1:])
    assert owner.states["acme"].state == 3
