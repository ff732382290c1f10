"""One reader of one stream: hands out its records in order, whether they stand in the past or come from the hub.

Records are neither skipped nor repeated. What the hub brings waits in a buffer of bounded size; a reader that does
not keep up leaves the hub, and continues from where it left on a `Tail` of its own until it has caught up again. If
the log has lost what comes next by then, it says so (`LogMoved`); and also if it has lost the stream's beginning.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from klatch_schemas import codec
from klatch_schemas.beginning import Beginning
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.errors import KlatchError, LogMoved, NotFound
from klatch_schemas.events import EmbeddingAdmitted, StreamAttempt, StreamCancel, StreamEnd, StreamRetract
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Partition, Record
from klatch_streams.log import Log, OffsetGone, Tail
from klatch_workers.http.clock import now_ms

Spoken = Delta | StreamAttempt | StreamEnd | StreamCancel | StreamRetract | EmbeddingAdmitted
"""What doors read of `chat.stream`."""

Heard = tuple[int, Spoken]
"""A record of the stream: its offset, and what it says."""

_PAST_WAIT_MS = 200


class Stream(NamedTuple):
    """A stream's identity."""

    tenant: Tenant
    request: RequestId


class Registry(Protocol):
    """Where readers register for what comes."""

    log: Log

    async def register(self, reader: "Reader") -> int:
        """From the returned offset on, `reader.offer` gets every record of its partition that names its request."""
        ...

    def leave(self, reader: "Reader") -> None:
        """Offer it nothing any more; it may register again."""
        ...

    def closed(self, reader: "Reader") -> None:
        """Forget it."""
        ...


def said_in(record: Record) -> "Spoken | None":
    """What a record of `chat.stream` says; None if it is no such thing (the stages bury those)."""
    try:
        said = codec.decode(record.value)
    except Unreadable:
        return None
    # Nearly all are deltas: a check against the whole union would cost more than the rest of this function.
    return said if type(said) is Delta or isinstance(said, Spoken) else None


class Reader:
    """Reads `stream` in `partition`; made by `Hub.open`."""

    def __init__(self, registry: Registry, stream: Stream, partition: Partition, buffer_bytes: int) -> None:
        self.stream = stream
        self.partition = partition
        self._registry = registry
        # Ids of plain characters stand in JSON as they are; whatever else may be escaped is not looked for.
        self._mark = stream.request.encode() if re.fullmatch(r"[\w.:-]+", stream.request, re.ASCII) else b""
        self._room = self._buffer_bytes = buffer_bytes
        self._buffer: list[Heard] = []
        self._peeked: list[Heard] = []
        self._next = 0
        self._joined = 0
        self._start: int | None = None
        """Where it began to read what stood in the log; None: it has heard all from the stream's first record on."""
        self._beginning = Beginning[Spoken]()
        self._left_at: int | None = None
        self._past: Tail | None = None
        self._error: KlatchError | None = None
        self.conversation: Conversation | None = None
        """The stream's, once a record was read that proves that it is there."""
        self._first: tuple[int, int] | None = None
        self.on_found: Callable[[int, int, Conversation], None] | None = None
        """Called then, with offset and timestamp of the first record that was read, or now if it comes just now."""
        self._nudged = False
        self._abandoned = False
        self._waiting: asyncio.Future[None] | None = None

    @property
    def caught_up(self) -> bool:
        """Whether everything that stood in the log when this reader joined the hub was handed out."""
        return self._next >= self._joined and not self._peeked

    async def join(self, start: int | None) -> None:
        """Begin at `start`, or at what comes next."""
        self._start = start
        await self._register(start)

    async def _register(self, start: int | None) -> None:
        self._joined = await self._registry.register(self)
        self._next = self._joined if start is None else start

    @property
    def position(self) -> int:
        """Where this reader began, or goes on with what is not in its buffer."""
        return self._next

    # What the hub calls.

    def offer(self, offset: int, said: Spoken, size: int) -> bool:
        """Take a record into the buffer; False if there is no room: then the reader has left."""
        if not self._is_mine(said):
            return True
        if size > self._room and self._buffer:
            self._left_at = offset
            return False
        self._room -= size
        self._buffer.append((offset, said))
        return True

    def wake(self) -> None:
        """Let `read` return: once for all that was offered."""
        waiting = self._waiting
        if waiting is not None:
            self._waiting = None
            if not waiting.done():
                waiting.set_result(None)

    def fail(self, error: KlatchError) -> None:
        """Let `read` raise `error`, after what is in the buffer."""
        self._error = error
        self.wake()

    # What the reading side calls.

    def nudge(self) -> None:
        """Let a `read` that waits return what it has, if only nothing."""
        self._nudged = True
        self.wake()

    def abandon(self) -> None:
        """Let whatever reads stop reading: nobody is interested any more."""
        self._abandoned = True
        self.nudge()

    async def read(self) -> Sequence[Heard]:
        """The next records; none when nudged, or when there was nothing on the way to catching up.

        Raises LogMoved, LogError, and what `fail` was given.
        """
        while True:
            heard, self._peeked = self._peeked or await self._read_on(), []
            if self._start is None:
                return heard
            kept = self._beginning.sift(heard)
            if not (self._beginning.missing and self.caught_up):
                return kept
            await self._begin_again(heard)

    async def begin_by(self, offset: int) -> None:
        """Begin further back if it was sent behind a record that its stream is known to have. Raises LogMoved."""
        if self._start is not None and self._start > offset:
            await self._begin_again(self._peeked)

    async def _begin_again(self, heard: Sequence[Heard]) -> None:
        # Who sent it here may have been mistaken: it looks at all that the log holds. Whoever folds has made nothing of
        # what came without an opening, and hears it again.
        if heard:
            self._joined = max(self._joined, heard[-1][0] + 1)
        first, _ = await self._registry.log.bounds(self.partition)
        if self._start is None or self._start <= first:
            raise LogMoved("the log no longer holds the beginning of this stream")
        await self._close_past()
        self._start = self._next = first
        self._peeked, self._beginning, self.conversation, self._first = [], Beginning[Spoken](), None, None

    async def find(self) -> Conversation | None:
        """The stream's conversation, or None if the stream has no record before the place where it joined.

        Only a record that names the tenant proves that the stream is there: deltas name none, and a cancel may be of
        an earlier day's. What was read on the way comes out of the next `read`, if there is a stream. Raises NotFound
        for embeddings: after their admission nothing more is said.
        """
        while self._next < self._joined and not (self._abandoned or self.conversation):
            try:
                heard = await self._read()
            except OffsetGone as gone:
                # Retention was faster: nothing stands there any more, and `Beginning` sees if it was of this stream.
                await self._close_past()
                self._start = self._next = gone.first
                continue
            self._peeked += heard
            for _, said in heard:
                if isinstance(said, EmbeddingAdmitted):
                    raise NotFound(f"{said.request} asked for embeddings, which have no stream to read or to cancel")
        if not self.conversation:
            self._start, self._peeked, self._first = self._next, [], None
        return self.conversation

    async def find_from(self, start: int) -> Conversation | None:
        """`find`, from further back: for who has found nothing, and read nothing yet."""
        self._start = self._next = min(start, self._next)
        return await self.find()

    async def speaks(self) -> bool:
        """Wait until the stream says something, which comes out of the next `read`. False: it was nudged before."""
        self._peeked += await self._read_on()
        return bool(self._peeked)

    async def close(self) -> None:
        """Read no more."""
        self._registry.closed(self)
        await self._close_past()

    async def _read_on(self) -> Sequence[Heard]:
        try:
            return await self._read()
        except OffsetGone as gone:
            raise LogMoved(
                f"the log has moved on: it begins at offset {gone.first} of this partition, and {gone.offset} was next"
            ) from gone

    async def _read(self) -> Sequence[Heard]:
        while not self._nudged:
            if self._error and not (self._buffer and self._next >= self._joined):
                raise self._error
            if self._next < self._joined:
                # Having caught up is news too: a reply that is complete so far is shown then.
                if (heard := await self._read_past()) or self._next >= self._joined:
                    return heard
            elif self._buffer:
                heard, self._buffer, self._room = self._buffer, [], self._buffer_bytes
                if not self.conversation:
                    for offset, said in heard:
                        self._note(offset, said, now_ms())
                return heard
            elif self._left_at is not None:
                # Registering comes first: whatever is written while the past is read is in the buffer then.
                start, self._left_at = self._left_at, None
                await self._register(start)
            else:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
        self._nudged = False
        return ()

    async def _read_past(self) -> list[Heard]:
        past = self._past
        if past is None:
            past = self._past = await self._registry.log.tail()
            past.follow(self.partition, self._next)
        heard: list[Heard] = []
        for record in await past.read(_PAST_WAIT_MS):
            if record.offset >= self._joined:
                break
            # Nearly all are other streams' records: decoding them would be most of what the past costs.
            if self._mark not in (record.value or b""):
                continue
            said = said_in(record)
            if said and said.request == self.stream.request and self._is_mine(said):
                heard.append((record.offset, said))
                self._note(record.offset, said, record.timestamp_ms)
        self._next = max(self._next, min(self._joined, past.position(self.partition) or 0))
        if self._next >= self._joined:
            await self._close_past()
        return heard

    def _note(self, offset: int, said: Spoken, timestamp_ms: int) -> None:
        if self.conversation:
            return
        # What is no proof that the stream is there is part of it all the same: a cancel may come before all else.
        self._first = self._first or (offset, timestamp_ms)
        if not isinstance(said, Delta | StreamCancel):
            self.conversation = said.conversation
            if self.on_found:
                self.on_found(*self._first, said.conversation)

    def _is_mine(self, said: Spoken) -> bool:
        # A delta names no tenant: it counts only under the opening of the right one, which the fold sees to.
        return isinstance(said, Delta) or said.tenant == self.stream.tenant

    async def _close_past(self) -> None:
        past, self._past = self._past, None
        if past is not None:
            await past.close()
