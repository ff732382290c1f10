"""Whether what admission kept of each tenant is what the tenant's log comes to, folded by the decider once more.

Every snapshot is compared that a restore would have found, with the fold up to the position that it says it covers,
whoever wrote it: not only the last one, for when all has come to rest nothing is reserved any more. What a zombie wrote
over a newer one counts for nothing, to its successors and so here. How far snapshots may lag behind is not judged: all
that they leave out is read again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from klatch_schemas import codec
from klatch_schemas.events import Event
from klatch_schemas.topics import CHAT_REQUESTS
from klatch_streams.admission import Admission
from klatch_streams.kernel import Input
from klatch_workers.torture.evidence import Entry, Evidence, Kept
from klatch_workers.torture.report import Violation

Key = tuple[int, str]
"""Partition and tenant: each has a ledger of its own."""


def forgotten(evidence: Evidence) -> Iterator[Violation]:
    """Ledgers of which a snapshot is not what its log says: the first such, and how many more."""
    logs = _logs(evidence)
    for key, kept in _snapshots(evidence).items():
        if wrong := list(_wrong(kept, logs.get(key, ()))):
            (first, parts), *more = wrong
            covered = f"{CHAT_REQUESTS.name}/{first.partition}/{first.applied}"
            others = f", nor are {len(more)} later ones" if more else ""
            what = f"its snapshot up to {covered} is not what its log says in {', '.join(parts)}{others}"
            yield Violation("missettled", f"{first.tenant}/{first.partition}", what, (first.position, covered))


def checked(evidence: Evidence) -> Mapping[str, int]:
    """How many snapshots were compared, and of how many ledgers none covers the end of the log."""
    snapshots, logs = _snapshots(evidence), _logs(evidence)
    covered = {key: max(one.applied for one in kept) for key, kept in snapshots.items()}
    behind = sum(log[-1].offset > covered.get(key, -1) for key, log in logs.items())
    return {"snapshots_compared": len(evidence.snapshots), "snapshots_behind": 0 if evidence.bare else behind}


def _wrong(kept: Sequence[Kept], log: Sequence[Entry]) -> Iterator[tuple[Kept, list[str]]]:
    """Snapshots of one ledger that differ from the fold of its log, with the names of the parts that do."""
    admission, at = Admission(), 0
    state = admission.initial(kept[0].tenant)
    for one in sorted(kept, key=lambda one: one.applied):
        while at < len(log) and log[at].offset <= one.applied:
            said = log[at].said
            if isinstance(said, Event):
                state, _ = admission.decide(state, Input(said, log[at].timestamp_ms))
            at += 1
        # As it comes back from a snapshot: JSON has lists for tuples.
        due: Mapping[str, object] = codec.loads(codec.dumps(admission.dump(state)))
        if parts := sorted(name for name in {*due, *one.parts} if due.get(name) != one.parts.get(name)):
            yield one, parts


def _snapshots(evidence: Evidence) -> Mapping[Key, Sequence[Kept]]:
    found = defaultdict[Key, list[Kept]](list)
    for one in evidence.snapshots:
        found[one.partition, one.tenant].append(one)
    return found


def _logs(evidence: Evidence) -> Mapping[Key, Sequence[Entry]]:
    found = defaultdict[Key, list[Entry]](list)
    for entry in evidence.requests:
        if tenant := getattr(entry.said, "tenant", None):
            found[entry.partition, str(tenant)].append(entry)
    return found
