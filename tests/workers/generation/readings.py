"""What every reader must see in the log, whoever died: one text of one call, one end, one settlement, one past."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from tests.workers.generation.mortal import World

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Ended, ReplyReader, Said, Spoke, Standing, StreamState, fold
from klatch_schemas.errors import Superseded
from klatch_schemas.events import UsageSettled
from klatch_schemas.records import Partition
from klatch_schemas.topics import DEAD_LETTERS


def text_of(standing: Sequence[Standing]) -> str:
    """The text of choice 0."""
    return "".join(_content(codec.loads(bytes(said.chunk))) for said in standing)


def _content(chunk: Any) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def lineage(text: str) -> tuple[str | None, int]:
    """Which call a `reply=unique` text is from and how many tokens it has; fails for any other text."""
    tokens = re.findall(r"<<(\w+):(\d+)>>", text)
    assert "".join(f"<<{call}:{number}>>" for call, number in tokens) == text, f"torn: {text}"
    assert [int(number) for _, number in tokens] == list(range(len(tokens))), f"not in order: {text}"
    assert len({call for call, _ in tokens}) <= 1, f"spliced: {text}"
    return (tokens[0][0] if tokens else None), len(tokens)


def assembled(stream: Sequence[tuple[int, Said]]) -> Assembly:
    assembly = Assembly()
    for offset, said in stream:
        assembly.hear(offset, said)
    return assembly


def every_reader_agrees(stream: Sequence[tuple[int, Said]]) -> None:
    """Whoever reads from wherever, and goes live whenever, sees the text that stands, or is told that it does not."""
    whole = assembled(stream)
    text, status = text_of(whole.standing), whole.state.status
    for live_at in range(len(stream) + 1):
        _reads(stream, live_at, None, text, status)
    state = StreamState()
    for offset, said in stream:
        state, heard = fold(state, said)
        # Nobody was shown any other delta, so that nobody resumes there.
        if isinstance(heard, Spoke):
            _reads(stream, len(stream), offset, text, status)


def _reads(stream: Sequence[tuple[int, Said]], live_at: int, after: int | None, text: str, status: object) -> None:
    reader = ReplyReader(after)
    shown = list[Standing | Ended]()
    try:
        for index, (offset, said) in enumerate(stream):
            if index == live_at:
                shown += reader.go_live()
            if one := reader.hear(offset, said):
                shown.append(one)
        if live_at == len(stream):
            shown += reader.go_live()
    except Superseded:
        # Told so; what was shown before was of one lineage.
        lineage_or_part(text_of([one for one in shown if isinstance(one, Standing)]))
        return
    seen = text_of([one for one in shown if isinstance(one, Standing)])
    assert seen == text if after is None else text.endswith(seen)
    assert [one.status for one in shown if isinstance(one, Ended)] == [status]


def lineage_or_part(text: str) -> None:
    """Text of one call, from anywhere on."""
    assert len({call for call, _ in re.findall(r"<<(\w+):(\d+)>>", text)}) <= 1, f"spliced: {text}"


def check_settled_once(world: World, request: str) -> UsageSettled:
    """One settlement, however often it was written."""
    settlements = world.settlements(request)
    assert settlements, f"{request} was never settled"
    assert len({event_id for event_id, _ in settlements}) == 1
    assert len({(said.status, said.usage) for _, said in settlements}) == 1, settlements
    return settlements[0][1]


def check_turns(world: World, heads: Mapping[tuple[Partition, str], int], wanted: Mapping[str, Sequence[str]]) -> None:
    """Following `previous` from the last turns gives the wanted requests of each conversation, in order."""
    turns = world.turns()
    for (partition, conversation), head in heads.items():
        chain, offset = list[str](), cast("int | None", head)
        while offset is not None:
            turn = turns[partition][offset]
            assert turn.conversation == conversation
            if turn.request not in chain:
                chain.append(turn.request)
            assert turn.previous is None or turn.previous < offset
            offset = turn.previous
        assert list(reversed(chain)) == list(wanted[conversation]), conversation
    assert {conversation for _, conversation in heads} == {name for name, requests in wanted.items() if requests}


def check_no_dead_letters(world: World) -> None:
    assert not world.log.records(DEAD_LETTERS.name)
