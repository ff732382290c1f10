"""The table of stages fits together, and `faults` says so when it does not."""

from dataclasses import replace

import pytest

from klatch_schemas import topics as t
from klatch_streams.admission import Admission
from klatch_streams.topology import ADMISSION, GENERATION, STAGES, Stage, faults


def test_the_table_has_no_faults() -> None:
    assert list(faults()) == []


def test_the_decider_is_what_its_row_says() -> None:
    decider = Admission()
    assert (decider.name, decider.input, decider.state) == (ADMISSION.name, ADMISSION.consumes, ADMISSION.state)


def test_every_stage_has_a_row_of_its_own() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (replace(GENERATION, follows=(t.CHAT_REQUESTS,)), "give both the same partitioning"),
        (replace(GENERATION, name="other", state=None, follows=()), 'add "other" to its row'),
        (replace(GENERATION, state=t.CHAT_STREAM), "set cleanup to compact"),
    ],
)
def test_a_fault_says_what_to_change(stage: Stage, words: str) -> None:
    assert any(words in fault for fault in faults([stage]))
