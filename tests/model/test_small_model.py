"""The small model: every interleaving of a few requests, owners, faults and clients, and what holds in them all.

`--model-size 2` visits larger bounds than the default, 3 still larger ones; see docs/reliability.md.
"""

import pytest
from tests.model.explore import explore
from tests.model.parts import Broken, Parts
from tests.model.planted import PLANTED, folded_by
from tests.model.world import Bounds

from klatch_schemas import assembly

# By name: the size, the bounds, and the least number of states that they are known to have.
VISITED: dict[str, tuple[int, Bounds, int]] = {
    "a takeover": (1, Bounds(takeovers=1), 150_000),
    "a takeover that continues": (1, Bounds(takeovers=1, continues=True), 150_000),
    "a takeover, a deadline": (1, Bounds(chunks=0, takeovers=1, deadlines=True), 10_000),
    "a takeover, a cancel": (1, Bounds(chunks=0, takeovers=1, cancels=1), 40_000),
    "a takeover, an impatient zombie": (1, Bounds(chunks=0, takeovers=1, impatience=1), 10_000),
    "a takeover of admission, a request sent twice": (1, Bounds(chunks=1, repeats=1, admission_takeovers=1), 500),
    "one of two requests is refused": (1, Bounds(requests=2, chunks=1, concurrent=1), 200),
    "failures of the model, a cancel": (1, Bounds(cancels=1, breaks=1), 1_000),
    "failures of the model that are continued": (1, Bounds(chunks=3, breaks=2, continues=True), 100),
    "two requests, a cancel": (1, Bounds(requests=2, chunks=1, cancels=1), 4_000),
    "two requests, the later rejected, a cancel": (1, Bounds(requests=2, cancels=1, if_busy="reject"), 5_000),
    "two requests, the later interrupts, a cancel": (1, Bounds(requests=2, cancels=1, if_busy="interrupt"), 5_000),
    "two requests, the later rolls back, a cancel": (1, Bounds(requests=2, cancels=1, if_busy="rollback"), 5_000),
    "a takeover, a cancel, a reply of a token": (2, Bounds(chunks=1, takeovers=1, cancels=1), 300_000),
    "a takeover, a deadline, a reply of a token": (2, Bounds(chunks=1, takeovers=1, deadlines=True), 150_000),
    "a takeover, a failure": (2, Bounds(chunks=1, takeovers=1, breaks=1), 300_000),
    "a takeover, a failure, continued or not": (2, Bounds(chunks=1, takeovers=1, breaks=1, continues=True), 200_000),
    "a takeover, deltas in flight": (2, Bounds(chunks=2, takeovers=1, in_flight=True), 200_000),
    "a takeover, two requests": (2, Bounds(requests=2, chunks=0, takeovers=1), 800_000),
    "a takeover, impatience, a reply of a token": (3, Bounds(chunks=1, takeovers=1, impatience=1), 300_000),
    "three owners": (3, Bounds(chunks=0, takeovers=2), 300_000),
    "a takeover, a longer reply": (3, Bounds(chunks=3, takeovers=1), 800_000),
}


@pytest.mark.parametrize("name", VISITED)
@pytest.mark.timeout(3_000)
def test_every_promise_holds_in_every_interleaving_of(name: str, model_size: int) -> None:
    size, bounds, least = VISITED[name]
    if size > model_size:
        pytest.skip(f"--model-size {size}")
    explored = explore(bounds)
    print(f"\n{name}: {explored}")  # noqa: T201 - what a run of it is for
    assert explored.states >= least, "the model has shrunk"
    assert explored.interleavings > 100
    assert explored.superseded or not bounds.takeovers


@pytest.mark.parametrize("bug", PLANTED)
def test_the_model_finds_that(bug: str) -> None:
    parts, bounds = PLANTED[bug]
    with pytest.raises(Broken) as found:
        explore(bounds, parts)
    print(f"\n{bug}: {found.value}")  # noqa: T201


def test_the_reader_of_planted_folds_finds_nothing_in_the_right_one() -> None:
    bounds = Bounds(chunks=1, takeovers=1)
    ours, theirs = explore(bounds), explore(bounds, folded_by(assembly.fold))
    assert (ours.states, ours.streams, ours.outcomes) == (theirs.states, theirs.streams, theirs.outcomes)


def test_parts_that_are_not_planted_are_productions() -> None:
    assert Parts().fold is assembly.fold
    assert Parts().reader is assembly.ReplyReader
