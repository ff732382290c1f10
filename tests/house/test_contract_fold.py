"""The fold that docs/contract.md shows is the fold that klatch uses, on every case it lists and on random logs."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Said
from klatch_schemas.documents import CONTRACT, ROOT, examples

Json = dict[str, Any]
Outcome = tuple[list[Json], str | None]

ROW = re.compile(r"^\| ((?:open|cancel|end|continue) .*?) \| (.*?) ?\| (.*?) ?\| (.*?) ?\|$", re.MULTILINE)


class Case(NamedTuple):
    """A row of the contract's table."""

    log: str
    text: str
    outcome: str | None


def cases() -> list[Case]:
    rows: list[tuple[str, ...]] = ROW.findall((ROOT / CONTRACT).read_text(encoding="utf-8"))
    return [Case(log, text, outcome or None) for log, text, outcome, _ in rows]


def as_shown() -> Callable[[Sequence[Json]], Outcome]:
    scope: dict[str, Any] = {}
    exec(examples()["assemble"], scope)  # noqa: S102 - the example is ours, and is what is tested
    shown: Callable[[Sequence[Json]], Outcome] = scope["assemble"]
    return shown


def as_used(records: Sequence[Json]) -> Outcome:
    """What `Assembly`, which stages and readers use, makes of the same records."""
    assembly = Assembly()
    for offset, record in enumerate(records):
        assembly.hear(offset, heard(record))
        if assembly.state.status is not None:
            break
    chunks = [codec.loads(bytes(standing.chunk)) for standing in assembly.standing]
    broken = assembly.gap is not None and assembly.state.status is not None
    return chunks, "broken" if broken else assembly.state.status


def heard(record: Json) -> Said:
    said: Said = codec.decode(codec.dumps(record))
    return said


# --- records in short --------------------------------------------------------------------------------------------


def attempt(number: int, writer: str, mode: str = "restart") -> Json:
    return {**about("stream.attempt.v1"), "attempt": number, "writer": writer, "mode": mode}


def delta(number: int, writer: str, seq: int, text: str) -> Json:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return {
        "kind": "stream.delta.v1",
        "request": "r-1",
        "attempt": number,
        "writer": writer,
        "seq": seq,
        "chunk": chunk,
    }


def end(number: int, writer: str, seq: int, status: str) -> Json:
    return {**about("stream.end.v1"), "attempt": number, "writer": writer, "seq": seq, "status": status}


def cancel() -> Json:
    return {**about("stream.cancel.v1"), "by": "me"}


def retract(from_seq: int) -> Json:
    return {**about("stream.retract.v1"), "from_seq": from_seq}


def about(kind: str) -> Json:
    return {"kind": kind, "request": "r-1", "tenant": "acme", "conversation": "c-1"}


def records(log: str) -> Iterator[Json]:
    """The records that a row of the table stands for."""
    for step in log.split(" · "):
        match step.split(" "):
            case ["cancel"]:
                yield cancel()
            case ["retract", seq]:
                yield retract(int(seq))
            case ["open" | "continue" as verb, who]:
                yield attempt(int(who[0]), who[1], "restart" if verb == "open" else "continue")
            case ["end", who, seq, status]:
                yield end(int(who[0]), who[1], int(seq), status)
            case [who, text]:
                yield delta(int(who[0]), who[1], int(who[2]), text)
            case _:
                pytest.fail(f"the table has a step that no test understands: {step}")


def text_of(chunks: Sequence[Json]) -> str:
    return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


# --- the tests ---------------------------------------------------------------------------------------------------


def test_the_table_of_cases_is_found() -> None:
    assert len(cases()) >= 15


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.log)
@pytest.mark.parametrize("fold", [as_shown(), as_used], ids=["as shown", "as used"])
def test_every_case_of_the_contract_comes_out_as_it_says(case: Case, fold: Callable[[Sequence[Json]], Outcome]) -> None:
    chunks, outcome = fold(list(records(case.log)))
    assert (text_of(chunks), outcome) == (case.text, case.outcome)


@st.composite
def logs(draw: st.DrawFn) -> list[Json]:
    """Logs as zombies and successors write them: most records nearly fit what went before, few end the stream."""
    log = [attempt(1, "a")] if draw(st.integers(0, 9)) else []
    number, writer, following = 1, "a", 0
    near = st.integers(-1, 1)
    # Ends are rare, as nothing counts after them.
    moves = ["open"] * 4 + ["speak"] * 8 + ["elsewhere"] * 4 + ["retract"] * 3 + ["end", "cancel"]
    for move in draw(st.lists(st.sampled_from(moves), min_size=6, max_size=20)):
        other, at = draw(st.sampled_from("ab")), max(0, following + draw(near))
        match move:
            case "open":
                opened = max(1, number + draw(st.sampled_from([-1, 0, 1, 1])))
                log.append(attempt(opened, other, draw(st.sampled_from(["restart", "continue"]))))
                if opened > number:
                    number, writer, following = opened, other, 0
            case "speak":
                log.append(delta(number, writer, following, str(len(log))))
                following += 1
            case "elsewhere":
                log.append(delta(max(1, number + draw(near)), other, at, str(len(log))))
            case "retract":
                log.append(retract(at))
            case "end":
                log.append(end(max(0, number + draw(near)), other, at, "completed"))
            case _:
                log.append(cancel())
    return [*log, end(number, writer, following, "completed")]


@given(log=logs())
@example(log=[end(0, "x", 1, "rejected")])
@settings(max_examples=500)
def test_the_fold_in_the_contract_and_the_fold_in_use_agree_on_every_log(log: list[Json]) -> None:
    assert as_shown()(log) == as_used(log)
