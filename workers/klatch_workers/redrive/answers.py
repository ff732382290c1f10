"""Which requests have been answered meanwhile, as far as `chat.stream` still tells and reading it is cheap.

Partitions that hold more than `MOST` records since are left out: then nothing is known of their requests, which does no
harm, since generation looks a redriven request up before it answers.
"""

from collections.abc import Mapping
from typing import Final

from klatch_schemas import codec
from klatch_schemas.assembly import Said, StreamState, fold
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import Status
from klatch_schemas.ids import RequestId
from klatch_schemas.records import Partition, Record, partition_of
from klatch_schemas.topics import CHAT_STREAM, HOUR_MS, Namespace
from klatch_streams.catch_up import catch_up
from klatch_streams.log import Log
from klatch_workers.redrive.letters import Asked

MOST: Final = 200_000


async def answers(log: Log, namespace: Namespace, asked: Mapping[Asked, int], most: int = MOST) -> dict[Asked, Status]:
    """How the streams of those requests ended that have; `asked` says since when each may have. Raises LogError."""
    topic = namespace.of(CHAT_STREAM)
    count = await log.partitions(topic) if asked else 0
    by_place = dict[Partition, dict[Asked, int]]()
    for one, since_ms in asked.items():
        place = Partition(topic, partition_of(one.conversation.encode(), count))
        by_place.setdefault(place, {})[one] = since_ms
    ended = dict[Asked, Status]()
    for place, here in by_place.items():
        ended |= await _in_partition(log, place, here, most)
    return ended


async def _in_partition(log: Log, place: Partition, asked: Mapping[Asked, int], most: int) -> dict[Asked, Status]:
    start = await log.offset_at(place, max(0, min(asked.values()) - HOUR_MS))
    _, end = await log.bounds(place)
    if end - start > most:
        return {}
    folding = _Folding(asked)
    tail = await log.tail()
    try:
        async for records in catch_up(tail, place, start, end):
            for record in records:
                folding.hear(record)
    finally:
        await tail.close()
    return folding.ended()


class _Folding:
    """Folds the streams of some requests, and passes over all others."""

    def __init__(self, asked: Mapping[Asked, int]) -> None:
        self._states = {one: StreamState() for one in asked}
        self._named = dict[RequestId | str, list[Asked]]()
        for one in asked:
            self._named.setdefault(one.request, []).append(one)

    def hear(self, record: Record) -> None:
        try:
            said = codec.decode(record.value)
        except Unreadable:
            return
        for one in self._named.get(str(getattr(said, "request", "")), ()):
            if _is_of(said, one):
                self._states[one], _ = fold(self._states[one], said)

    def ended(self) -> dict[Asked, Status]:
        return {one: state.status for one, state in self._states.items() if state.status and state.settled}


def _is_of(said: Said, asked: Asked) -> bool:
    # A delta names no tenant: it counts only under the opening of the right one.
    return isinstance(said, Delta) or getattr(said, "tenant", None) == asked.tenant
