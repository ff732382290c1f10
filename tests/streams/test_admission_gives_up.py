"""A request that admission cannot decide, or cannot pass on, ends; its record is a dead letter beside that."""

from collections.abc import Mapping

from klatch_schemas import codec
from klatch_schemas.events import ChatAdmitted, ChatRequested, EmbeddingRequested, StreamEnd, Usage, UsageSettled
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Draft, Partition, Record
from klatch_schemas.topics import ADMISSION_STATE, CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, DEAD_LETTERS, Namespace
from klatch_streams.admission import Admission
from klatch_streams.decider_owner import DeciderStage
from klatch_streams.estimate import Estimate, Estimated
from klatch_streams.kernel import Input
from klatch_streams.memory_log import MemoryLog
from klatch_streams.redriving import redriven

TOPICS = (ADMISSION_STATE, CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, DEAD_LETTERS)
PLACE = Partition(CHAT_REQUESTS.name, 0)


class Stumbling(Estimate):
    """An estimate with a bug."""

    def of(self, body: Mapping[str, object]) -> Estimated:
        raise ZeroDivisionError(f"a body of {len(body)}")


def a_log() -> MemoryLog:
    return MemoryLog({topic.name: 1 for topic in TOPICS})


def asked(request: str, text: str = "hello") -> Draft:
    said = ChatRequested(
        request=RequestId(request),
        tenant=Tenant("acme"),
        conversation=Conversation("c1"),
        body={"messages": [{"role": "user", "content": text}]},
    )
    return codec.draft(CHAT_REQUESTS.name, "acme", said)


async def taken(log: MemoryLog, admission: Admission, *drafts: Draft) -> None:
    """A new owner takes all that stands in the log once `drafts` do, from where the last one stopped."""
    stage = DeciderStage(admission, log, Namespace(), admission.give_up)
    first = len(log.records(CHAT_REQUESTS.name))
    owner = await stage.own(PLACE, first)
    await log.append(drafts)
    await owner.take(log.held(PLACE).records[first:])
    await owner.checkpoint()


def ends(log: MemoryLog) -> list[tuple[str, str, str]]:
    said = [codec.decode_as(StreamEnd, record.value) for record in log.records(CHAT_STREAM.name)]
    return [(end.request, end.status, end.error.code if end.error else "") for end in said]


def letters(log: MemoryLog) -> list[Record]:
    return log.records(DEAD_LETTERS.name)


async def test_a_request_on_which_the_decider_fails_ends_and_is_a_dead_letter() -> None:
    log = a_log()
    await taken(log, Admission(Stumbling()), asked("r1"), asked("r2"))
    assert ends(log) == [("r1", "failed", "internal"), ("r2", "failed", "internal")]
    assert [letter.header("dead-reason") for letter in letters(log)] == [b"decider-failed"] * 2


async def test_a_request_that_ended_so_is_not_admitted_when_it_comes_again() -> None:
    log = a_log()
    await taken(log, Admission(Stumbling()), asked("r1"))
    [letter] = letters(log)
    # The bug is mended; the letter is redriven, and the client sends the same once more.
    await taken(log, Admission(), redriven(letter, letter.value), asked("r1"), asked("r2"))
    assert ends(log) == [("r1", "failed", "internal")]
    admitted = [codec.decode_as(ChatAdmitted, record.value) for record in log.records(CHAT_ADMITTED.name)]
    assert [one.request.request for one in admitted] == ["r2"]


async def test_a_request_whose_admission_the_log_cannot_hold_ends_and_its_neighbours_are_admitted() -> None:
    log = a_log()
    empty = asked("r1", "")
    taken_up = len(empty.key or b"") + len(empty.value or b"") + sum(len(n) + len(v or b"") for n, v in empty.headers)
    big = asked("r1", "x" * (1_000_000 - taken_up))
    await taken(log, Admission(), asked("r2"), big, asked("r3"))
    assert ends(log) == [("r1", "failed", "request_too_large")]
    admitted = [codec.decode_as(ChatAdmitted, record.value) for record in log.records(CHAT_ADMITTED.name)]
    assert [one.request.request for one in admitted] == ["r2", "r3"]


async def test_embeddings_that_cannot_be_decided_end_as_well() -> None:
    asked_for = EmbeddingRequested(
        request=RequestId("e1"), tenant=Tenant("acme"), conversation=Conversation("c1"), tokens=5
    )
    _, [emitted] = Admission().give_up(Admission().initial("acme"), Input(asked_for, 1_000), "internal")
    assert isinstance(emitted.event, StreamEnd)
    assert (emitted.event.request, emitted.event.status) == ("e1", "failed")


async def test_nothing_but_a_request_ends_when_it_cannot_be_decided() -> None:
    settled = UsageSettled(request=RequestId("r1"), tenant=Tenant("acme"), status="completed", usage=Usage())
    state = Admission().initial("acme")
    assert Admission().give_up(state, Input(settled, 1_000), "internal") == (state, ())
