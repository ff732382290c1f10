"""The load: every conversation of the plan, each by a client that wants its answers whatever happens to klatch.

Requests of one conversation are asked in order: the next when the one before it is acknowledged, or when it has
ended. What is written over Kafka is written again, under the same id, until the log has it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from klatch_schemas import codec
from klatch_schemas.client import Client
from klatch_schemas.events import ChatRequested, MemoryPolicy, StreamCancel
from klatch_schemas.ids import RequestId, Tenant
from klatch_schemas.records import Draft
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, Namespace
from klatch_streams.log import Log, LogError
from klatch_workers.quotas import set_quota
from klatch_workers.torture.door import HttpReader, body_of
from klatch_workers.torture.evidence import Asked, Observation
from klatch_workers.torture.live import LiveLog
from klatch_workers.torture.load import ONCE_ENDED, ONCE_OPENED, Talk, Trouble
from klatch_workers.torture.python_client import ClientReader
from klatch_workers.torture.tenants import changes

PATIENCE_S: Final = 240.0
"""How long a client waits for the end of one reply before it gives up; then the reply counts as lost."""
_AGAIN_S: Final = 0.3
_HURRY_S: Final = 0.05
"""How long a client stays that goes away before its answer begins."""


@dataclass(slots=True)
class Load:
    """Clients, and what they saw."""

    log: Log
    live: LiveLog
    session: aiohttp.ClientSession
    namespace: Namespace
    door: str
    keys: Mapping[Tenant, str]
    clients: Mapping[Tenant, Client]
    patience_s: float = PATIENCE_S
    bare: bool = False
    """Whether requests are answered from their topic as they stand there, in the order of its keys."""
    asked: dict[RequestId, Asked] = field(default_factory=dict[RequestId, Asked])
    acknowledged: set[RequestId] = field(default_factory=set[RequestId])
    seen: list[Observation] = field(default_factory=list[Observation])
    """By readers over HTTP, and by the Python client."""
    troubles: Counter[str] = field(default_factory=Counter[str])
    """What made clients try again."""
    quotas_set: int = 0

    async def run(self, talks: Sequence[Talk]) -> None:
        """Hold all conversations, each at its time."""
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as holding:
            for talk in talks:
                holding.create_task(self._hold(talk, began))

    @property
    def accepted(self) -> list[RequestId]:
        """Requests that the log holds, or that a client was told are accepted."""
        return [one for one in self.asked if one in self.acknowledged or self.live.reader(one).published]

    @property
    def waiting(self) -> int:
        """Accepted requests that are not concluded."""
        return sum(not self.live.reader(request).concluded for request in self.accepted)

    async def _hold(self, talk: Talk, began: float) -> None:
        await asyncio.sleep(began + talk.at_s - asyncio.get_running_loop().time())
        async with asyncio.TaskGroup() as turns:
            for turn in talk.turns:
                asked = self.asked[turn.request] = Asked(talk.tenant, talk.conversation_of(turn), turn)
                acknowledged, over = asyncio.Event(), asyncio.Event()
                ask = self._over_http if talk.edge == "http" else self._over_kafka
                turns.create_task(self._patiently(ask(asked, acknowledged), acknowledged, over))
                if turn.by_client:
                    turns.create_task(self._by_client(asked, over))
                await (over if turn.waits else acknowledged).wait()

    async def _patiently(
        self, asking: Coroutine[None, None, None], acknowledged: asyncio.Event, over: asyncio.Event
    ) -> None:
        try:
            async with asyncio.timeout(self.patience_s):
                await asking
        except TimeoutError:
            self.troubles["gave up"] += 1
        finally:
            acknowledged.set()
            over.set()

    async def _by_client(self, asked: Asked, over: asyncio.Event) -> None:
        """Read it by the Python client too, as long as there is something to read."""
        request = asked.turn.request
        place = self.live.place(asked.tenant, request, asked.conversation)
        reader = ClientReader(self.clients[asked.tenant], place, list(asked.turn.leaves_after), self.troubles)
        reading, ending = asyncio.create_task(reader.read()), asyncio.create_task(over.wait())
        try:
            await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            if request in self.accepted:
                await asyncio.wait({reading}, timeout=self.patience_s)
                self.troubles["python: gave up"] += not reading.done()
                self.troubles["python: cancelled, and not by the kit"] += reading.done() and reading.cancelled()
        finally:
            reading.cancel()
            ending.cancel()
            await asyncio.wait({reading, ending})
            self.seen.append(reader.observation())

    async def set_quotas(self, minutes: float) -> None:
        """Change limits while the load goes on, as operators do."""
        began = asyncio.get_running_loop().time()
        for at_s, tenant, change in changes(minutes):
            await asyncio.sleep(began + at_s - asyncio.get_running_loop().time())
            while True:
                try:
                    await set_quota(self.log, self.namespace, tenant, change, "klatch torture")
                    break
                except (LogError, TimeoutError) as error:
                    self.troubles[f"quota set: {type(error).__name__}"] += 1
                    await asyncio.sleep(_AGAIN_S)
            self.quotas_set += 1

    # --- over Kafka

    async def _over_kafka(self, asked: Asked, acknowledged: asyncio.Event) -> None:
        turn, reader = asked.turn, self.live.reader(asked.turn.request)
        key = asked.conversation if self.bare else asked.tenant
        draft = codec.draft(self.namespace.of(CHAT_REQUESTS), key, _request(asked))
        await self._append(draft)
        self.acknowledged.add(turn.request)
        acknowledged.set()
        if turn.twice:
            await self._append(draft)
        if turn.trouble.cancel:
            await reader.until(lambda: reader.over or _is_time(turn.trouble, reader.chunks, opened=reader.opened))
            await self._append(self._cancel(asked))
        await reader.until(lambda: reader.over)

    def _cancel(self, asked: Asked) -> Draft:
        cancel = StreamCancel(
            request=asked.turn.request, tenant=asked.tenant, conversation=asked.conversation, by="torture"
        )
        return codec.draft(self.namespace.of(CHAT_STREAM), asked.conversation, cancel)

    async def _append(self, draft: Draft) -> None:
        while True:
            try:
                await self.log.append([draft])
            except LogError as error:
                self.troubles[type(error).__name__] += 1
                await asyncio.sleep(_AGAIN_S)
            else:
                return

    # --- over HTTP

    def reader(self, asked: Asked, name: str = "http", *, resumes_only: bool = False) -> HttpReader:
        """A reader of a reply over HTTP."""
        key = self.keys[asked.tenant]
        return HttpReader(self.session, self.door, key, asked, name, resumes_only=resumes_only, troubles=self.troubles)

    async def _over_http(self, asked: Asked, acknowledged: asyncio.Event) -> None:
        live, reader = self.live.reader(asked.turn.request), self.reader(asked)
        noting = asyncio.create_task(self._note(reader, acknowledged))
        try:
            async with asyncio.TaskGroup() as reading:
                reading.create_task(reader.read())
                reading.create_task(self._cancel_over_http(reader))
                if asked.turn.twice:
                    reading.create_task(self._read_again(asked, reader))
            if reader.acknowledged.is_set():
                # The conversation goes on only after the end, also where this client went away before it.
                await live.until(lambda: live.over)
        finally:
            noting.cancel()
            self.seen.append(reader.observation())

    async def _note(self, reader: HttpReader, acknowledged: asyncio.Event) -> None:
        await reader.acknowledged.wait()
        self.acknowledged.add(reader.asked.turn.request)
        acknowledged.set()

    async def _read_again(self, asked: Asked, first: HttpReader) -> None:
        await first.shown(1)
        again = self.reader(asked, "second http")
        await again.read()
        self.seen.append(again.observation())

    async def _cancel_over_http(self, reader: HttpReader) -> None:
        trouble = reader.asked.turn.trouble
        if trouble.cancel is None:
            return
        live = self.live.reader(reader.asked.turn.request)
        if trouble.cancel_after == ONCE_OPENED:
            await live.until(lambda: live.over or live.opened)
        elif trouble.cancel_after == ONCE_ENDED:
            await live.until(lambda: live.over)
        elif trouble.cancel == "disconnect" and not trouble.cancel_after:
            await asyncio.sleep(_HURRY_S)
        else:
            await reader.shown(trouble.cancel_after)
        match trouble.cancel:
            case "record":
                await self._append(self._cancel(reader.asked))
            case "delete":
                await reader.cancel()
            case "disconnect":
                reader.leave()


def _is_time(trouble: Trouble, chunks: int, *, opened: bool) -> bool:
    if trouble.cancel_after == ONCE_OPENED:
        return opened
    return trouble.cancel_after != ONCE_ENDED and chunks >= trouble.cancel_after


def _request(asked: Asked) -> ChatRequested:
    turn = asked.turn
    timeout_ms = turn.trouble.timeout_ms
    return ChatRequested(
        request=turn.request,
        tenant=asked.tenant,
        conversation=asked.conversation,
        body=body_of(asked),
        person=turn.person,
        memory=MemoryPolicy() if turn.alone else MemoryPolicy(recent=2),
        on_crash=turn.on_crash,
        if_busy=turn.if_busy,
        deadline_ms=None if timeout_ms is None else time.time_ns() // 1_000_000 + timeout_ms,
    )
