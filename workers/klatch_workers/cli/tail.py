"""`klatch tail`: streams over Kafka while they are made, of one request, of one conversation, or all.

With `--request` it ends when that stream ends, with 0 if it was completed and is whole, 1 if not; otherwise Ctrl-C ends
it with 0. Streams that began before the place where reading begins are shown only in `--json` and `--raw`; how one of
them ended nobody can tell, so that with `--request` its end is an error.
"""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import click

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly, Gap, StreamState
from klatch_schemas.beginning import Beginning
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.ids import Tenant
from klatch_schemas.records import Partition, Record, partition_of
from klatch_schemas.topics import CHAT_STREAM, Namespace
from klatch_streams.log import Log, OffsetGone, Tail
from klatch_workers.cli.context import (
    FAILED,
    CommandFailed,
    Context,
    kafka_options,
    opened_log,
    perform,
    shared_options,
)
from klatch_workers.cli.replies import StreamEvent
from klatch_workers.cli.tail_view import JsonView, RawView, Said, TextView, View, moved
from klatch_workers.http.request_ids import birth_of

_READ_MS: Final = 1_000
_SKEW_MS: Final = 60_000
_AGO: Final = re.compile(r"-(\d{1,6})(s|m|h|d)")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class _Place(click.ParamType):
    """`beginning`, `end`, or how many seconds ago."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """See click."""
        said = str(value)
        if said in {"beginning", "end"}:
            return said
        if match := _AGO.fullmatch(said):
            return int(match[1]) * _SECONDS[match[2]]
        return self.fail(f"{value!r} is none of: beginning, end, or how long ago, such as -90s, -10m, -2h", param, ctx)


@dataclass(slots=True)
class Wanted:
    """Which records are shown, and whether the last of them has come."""

    conversation: str | None = None
    request: str | None = None
    tenant: Tenant | None = None
    """Of `request`, which two tenants may use."""
    partition: Partition | None = None
    """Where records of `request` were found."""
    _beginning: Beginning[Said] = field(default_factory=Beginning[Said])
    _assembly: Assembly = field(default_factory=Assembly)

    def takes(self, record: Record, said: Said) -> bool:
        """Whether the record is one of those wanted."""
        if self.conversation is not None and record.key != self.conversation.encode():
            return False
        if self.request is None:
            return True
        if said.request != self.request:
            return False
        if not isinstance(said, Delta) and self.tenant is not None and said.tenant != self.tenant:
            return False
        self.partition = record.partition
        for offset, kept in self._beginning.sift([(record.offset, said)]):
            self._assembly.hear(offset, kept)
        return True

    @property
    def has_begun(self) -> bool:
        """Whether a part of the wanted request was shown."""
        return self.request is not None and self._assembly.state != StreamState()

    @property
    def began_before(self) -> bool:
        """Whether what was read of the wanted request began before it, unless it begins anew further on."""
        return self._beginning.missing

    @property
    def has_ended(self) -> bool:
        """Whether the last record of the wanted request was shown."""
        return self.request is not None and self.status is not None

    @property
    def status(self) -> str | None:
        """How the wanted request ended, once it has."""
        return self._assembly.state.status

    @property
    def gap(self) -> Gap | None:
        """Deltas that the log lacks, of those that the wanted request should stand in."""
        return self._assembly.gap


@click.command()
@click.option("--request", "request_id", metavar="ID", help="Only this request; ends with it.")
@click.option("--conversation", help="Only this conversation.")
@click.option("--tenant", help="With --request: whose, where two tenants use one id.")
@click.option(
    "--from",
    "since",
    type=_Place(),
    metavar="PLACE",
    help="beginning, end, or how long ago: -90s, -10m, -2h.  [default: end; of a request, its beginning]",
)
@click.option("--raw", is_flag=True, help="Record values as they stand in the log.")
@kafka_options
@shared_options
def tail(
    request_id: str | None, conversation: str | None, since: str | int | None, raw: bool, as_json: bool, **options: Any
) -> None:
    """Follow streams while they are made; Ctrl-C ends."""
    tenant = Tenant(options.pop("tenant")) if options["tenant"] else options.pop("tenant")

    async def work() -> int:
        context = Context.read(**options)
        wanted = Wanted(conversation, request_id, tenant)
        view: View = RawView() if raw else JsonView() if as_json else TextView()
        async with opened_log(context) as log:
            await follow(log, context.namespace, wanted, since, view)
        return 0 if wanted.status in {None, "completed"} else FAILED

    perform(work, as_json=as_json, interrupted=0)


async def follow(log: Log, namespace: Namespace, wanted: Wanted, since: str | int | None, view: View) -> None:
    """Show what is wanted until its end, if it has one. Raises LogError, CommandFailed."""
    topic = namespace.of(CHAT_STREAM)
    count = await log.partitions(topic)
    numbers = range(count) if wanted.conversation is None else [partition_of(wanted.conversation.encode(), count)]
    places = [Partition(topic, number) for number in numbers]
    found = await asyncio.gather(*(_start(log, place, since, wanted.request) for place in places))
    starts = dict(zip(places, found, strict=True))
    reader = await log.tail()
    try:
        for place, (start, _) in starts.items():
            reader.follow(place, start)
        while not wanted.has_ended:
            for record in await _read(reader, wanted, view):
                _show(record, wanted, view)
                if wanted.has_ended:
                    break
            if wanted.began_before and all((reader.position(place) or 0) >= end for place, (_, end) in starts.items()):
                raise CommandFailed(await _began_before(log, wanted, starts))
    finally:
        await reader.close()
    if gap := wanted.gap:
        raise CommandFailed(f"the log lacks deltas {gap.expected} to {gap.got - 1} of this request")


async def _read(reader: Tail, wanted: Wanted, view: View) -> Sequence[Record]:
    try:
        return await reader.read(_READ_MS)
    except OffsetGone as error:
        # Retention overtook the reader: what is gone is gone. Of one request that is its end, of many a hole.
        if wanted.has_begun:
            raise CommandFailed(f"{moved(error)}; a part of this request is gone") from error
        view.moved(error)
        reader.follow(error.partition, error.first)
        return ()


async def _began_before(log: Log, wanted: Wanted, starts: Mapping[Partition, tuple[int, int]]) -> str:
    for place, (start, _) in starts.items():
        if place == wanted.partition and start > (await log.bounds(place))[0]:
            return "this request began before the place where reading began; read it with --from beginning"
    return "the log no longer holds the beginning of this request"


async def _start(log: Log, place: Partition, since: str | int | None, request: str | None) -> tuple[int, int]:
    """Where reading begins, and where the partition ended then."""
    first, end = await log.bounds(place)
    if since is None:
        birth = birth_of(request) if request else None
        if birth:
            # Ids that klatch's doors make say when; others may stand anywhere.
            return await log.offset_at(place, birth.milliseconds - _SKEW_MS), end
        return first if request else end, end
    if isinstance(since, int):
        return await log.offset_at(place, time.time_ns() // 1_000_000 - since * 1000), end
    return first if since == "beginning" else end, end


def _show(record: Record, wanted: Wanted, view: View) -> None:
    try:
        said = codec.decode(record.value)
    except Unreadable as error:
        if wanted.request is None and wanted.conversation is None:
            view.unreadable(record, str(error))
        return
    if isinstance(said, Delta | StreamEvent) and wanted.takes(record, said):
        view.show(record, said)
