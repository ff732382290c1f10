"""Publishes many requests fast: each is appended on its own, a thousand may be on their way, and results come in the
order of the lines.

A line that cannot be published is reported and the rest goes on; a log that does not acknowledge ends it all, since
what was on its way may or may not stand.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final, NamedTuple, Protocol

from klatch_schemas import codec
from klatch_schemas.events import ChatRequested
from klatch_schemas.records import Partition
from klatch_schemas.topics import CHAT_REQUESTS, Namespace
from klatch_streams.log import Log, RecordTooLarge
from klatch_workers.cli.request_lines import BadLine, Defaults, request_of

MOST_IN_FLIGHT: Final = 1_000


class Line(NamedTuple):
    """A line of input, counted from 1."""

    number: int
    text: bytes


class Published(NamedTuple):
    """A request that stands in the log."""

    request: ChatRequested
    partition: Partition
    offset: int


class Listener(Protocol):
    """Hears what becomes of lines, in their order."""

    def publishing(self, request: ChatRequested) -> None:
        """A request is about to be appended."""
        ...

    def published(self, published: Published) -> None:
        """It stands."""
        ...

    def refused(self, number: int, reason: str, request: ChatRequested | None) -> None:
        """Line `number` is no request that can be published; `request` was announced by `publishing`."""
        ...


class Publishing:
    """One publication of many lines."""

    def __init__(self, log: Log, namespace: Namespace, defaults: Defaults, listener: Listener) -> None:
        self._log = log
        self._topic = namespace.of(CHAT_REQUESTS)
        self._defaults = defaults
        self._listener = listener
        self._outcomes = asyncio.Queue[_Sent | _Bad | None](MOST_IN_FLIGHT)
        self._sending = set[asyncio.Task[Published]]()
        self.published = 0
        self.refused = 0

    async def run(self, lines: AsyncIterator[Line]) -> None:
        """Publish every line. Raises AppendFailed, UnknownTopic, and what `lines` raises."""
        await self._log.partitions(self._topic)
        try:
            async with asyncio.TaskGroup() as group:
                # Beside the reading: whoever waits for a result gets it before the next line comes.
                group.create_task(self._report())
                async for line in lines:
                    if line.text.strip():
                        await self._outcomes.put(self._begin(line))
                await self._outcomes.put(None)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            for task in self._sending:
                task.cancel()

    def _begin(self, line: Line) -> "_Sent | _Bad":
        try:
            request = request_of(line.text, line.number, self._defaults)
        except BadLine as error:
            return _Bad(line.number, str(error))
        self._listener.publishing(request)
        # Appends that were called in order stand in order.
        self._sending.add(task := asyncio.create_task(self._append(request)))
        task.add_done_callback(self._done)
        return _Sent(line.number, request, task)

    async def _append(self, request: ChatRequested) -> Published:
        draft = codec.draft(self._topic, request.tenant, request, traceparent=request.context.traceparent)
        [(partition, offset)] = await self._log.append([draft])
        return Published(request, partition, offset)

    def _done(self, task: "asyncio.Task[Published]") -> None:
        self._sending.discard(task)
        if not task.cancelled():
            task.exception()  # the report raises the first; Python must not complain of the others

    async def _report(self) -> None:
        while (outcome := await self._outcomes.get()) is not None:
            match outcome:
                case _Bad(number, reason):
                    self._refuse(number, reason, None)
                case _Sent(number, request, task):
                    try:
                        self._listener.published(await task)
                        self.published += 1
                    except RecordTooLarge as error:
                        self._refuse(number, str(error), request)

    def _refuse(self, number: int, reason: str, request: ChatRequested | None) -> None:
        self._listener.refused(number, reason, request)
        self.refused += 1


class _Sent(NamedTuple):
    number: int
    request: ChatRequested
    task: "asyncio.Task[Published]"


class _Bad(NamedTuple):
    number: int
    reason: str
