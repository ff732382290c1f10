"""Waits for the replies to requests that this process publishes, with one reader for all of them.

Its place in the log is taken before the first request is published, so that no record is missed. Texts are put
together by the contract's assembly rule; a silence that lasts too long is an error.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.chunks import Reply
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import ChatRequested, Status, StreamAttempt, StreamCancel, StreamEnd, StreamRetract
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_STREAM, Namespace
from klatch_streams.log import Log, Tail
from klatch_workers.cli.context import CommandFailed

_READ_MS = 1_000
StreamEvent = StreamAttempt | StreamEnd | StreamCancel | StreamRetract


class Finished(NamedTuple):
    """A reply that has ended."""

    request: ChatRequested
    status: Status
    text: str
    end: StreamEnd | None
    broken: bool
    """The log lacks a part of the text."""


class Replies:
    """The replies that are waited for; `run` ends when all have come."""

    def __init__(self, tail: Tail, finished: Callable[[Finished], None], patience_s: float) -> None:
        self._tail = tail
        self._finished = finished
        self._patience_s = patience_s
        self._waiting = dict[str, tuple[ChatRequested, Assembly]]()
        self._complete = False
        self._heard_at = 0.0

    @classmethod
    async def open(
        cls, log: Log, namespace: Namespace, finished: Callable[[Finished], None], patience_s: float
    ) -> "Replies":
        """Take a place at the end of every partition. Raises LogError."""
        topic = namespace.of(CHAT_STREAM)
        places = [Partition(topic, number) for number in range(await log.partitions(topic))]
        ends = await asyncio.gather(*(log.bounds(place) for place in places))
        tail = await log.tail()
        for place, (_, end) in zip(places, ends, strict=True):
            tail.follow(place, end)
        return cls(tail, finished, patience_s)

    def expect(self, request: ChatRequested) -> None:
        """Wait for the reply to this request, too."""
        self._waiting[request.request] = (request, Assembly())

    def forget(self, request: ChatRequested) -> None:
        """It was not published after all."""
        self._waiting.pop(request.request, None)

    def complete(self) -> None:
        """No more requests will be expected."""
        self._complete = True

    async def run(self) -> None:
        """Read until every expected reply has ended. Raises CommandFailed after a silence, LogError."""
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while self._waiting or not self._complete:
            for record in await self._tail.read(_READ_MS):
                if self._take(record):
                    self._heard_at = loop.time()
            if not self._complete:
                self._heard_at = loop.time()
            elif self._waiting and loop.time() - self._heard_at > self._patience_s:
                raise CommandFailed(
                    f"{len(self._waiting)} replies have not ended, and nothing was heard of them for "
                    f"{self._patience_s:g} s: are the stages running? `klatch doctor` says. A request whose id was "
                    "used before is not answered again."
                )

    async def close(self) -> None:
        """Give back connections."""
        await self._tail.close()

    def _take(self, record: Record) -> bool:
        try:
            said = codec.decode(record.value)
        except Unreadable:
            return False
        if not isinstance(said, Delta | StreamEvent) or said.request not in self._waiting:
            return False
        request, assembly = self._waiting[said.request]
        if not isinstance(said, Delta) and said.tenant != request.tenant:
            return False
        assembly.hear(record.offset, said)
        if status := assembly.state.status:
            del self._waiting[request.request]
            self._finished(Finished(request, status, text_of(assembly), assembly.end, assembly.gap is not None))
        return True


def text_of(assembly: Assembly) -> str:
    """What choice 0 says in the text that stands."""
    reply = Reply()
    for said in assembly.standing:
        reply.add(codec.loads(bytes(said.chunk)))
    messages = reply.messages()
    return str(messages[0].get("content") or "") if messages else ""
