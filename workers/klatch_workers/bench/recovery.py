"""How long a stream stands still when generation is killed with SIGKILL while it speaks, as readers of the log see it.

The killed process is started again at once, as `klatch up` does; the group has to notice that the old member is gone.
What every stream says in the end is folded by the contract's rule: whole means all tokens, of one attempt.
"""

import asyncio
import json
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from uuid import uuid4

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import ChatRequested, StreamAttempt
from klatch_schemas.ids import Conversation, RequestId
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.log import Log, Tail
from klatch_workers.bench.report import Recovery
from klatch_workers.bench.rig import MODEL, Rig
from klatch_workers.up.everything import LOCAL_TENANT

_SPEAKS = re.compile(rb'"content": ?"[^"]')
_PATIENCE_S = 60.0


@dataclass(slots=True)
class Watched:
    """The streams under test, as far as they were read."""

    assemblies: dict[str, Assembly]
    first_attempts: set[str] = field(default_factory=set[str])
    """Writers of first attempts."""
    spoke: set[str] = field(default_factory=set[str])
    opened_at: float | None = None
    first_token_at: float | None = None

    def hear(self, record: Record) -> None:
        """Take a record of `chat.stream`."""
        try:
            said = codec.decode(record.value)
        except Unreadable:
            return
        request = str(getattr(said, "request", ""))
        if request not in self.assemblies:
            return
        self.assemblies[request].hear(record.offset, said)
        if isinstance(said, StreamAttempt):
            if said.attempt == 1:
                self.first_attempts.add(said.writer)
            elif self.opened_at is None:
                self.opened_at = time.time()
        elif isinstance(said, Delta):
            self.spoke.add(request)
            if said.writer not in self.first_attempts and self.first_token_at is None and _SPEAKS.search(said.chunk):
                self.first_token_at = time.time()

    @property
    def over(self) -> bool:
        """Whether every stream has ended."""
        return all(assembly.state.status for assembly in self.assemblies.values())

    def whole(self, tokens: int) -> int:
        """How many stand complete: an opening chunk, all tokens, a closing chunk, from one attempt."""
        return sum(
            assembly.state.status == "completed"
            and assembly.gap is None
            and len(assembly.standing) == tokens + 2
            and len({said.attempt for said in assembly.standing}) == 1
            for assembly in self.assemblies.values()
        )


async def recovery(rig: Rig, streams: int, tokens: int) -> Recovery:
    """Kill generation once all of `streams` speak. Raises TimeoutError where a stream does not come back."""
    log = await KafkaLog.open(KafkaOptions(rig.cluster.bootstrap))
    namespace = Namespace.named(rig.klatch.settings.namespace)
    try:
        tail = await _at_the_end(log, namespace)
        requests = [_request(tokens) for _ in range(streams)]
        watched = Watched({request.request: Assembly() for request in requests})
        topic = namespace.of(CHAT_REQUESTS)
        await log.append([codec.draft(topic, LOCAL_TENANT, request) for request in requests])
        async with asyncio.timeout(_PATIENCE_S):
            while len(watched.spoke) < streams:
                await _hear(tail, watched)
            killed_at = time.time()
            os.kill(rig.klatch.children["generation"].pid, signal.SIGKILL)
            while not watched.over:
                await _hear(tail, watched)
        await tail.close()
    finally:
        await log.close()
    noticed_at = _noticed_at(rig, killed_at)
    opened_at, first_token_at = watched.opened_at or killed_at, watched.first_token_at or killed_at
    return Recovery(
        streams=streams,
        noticed_s=noticed_at - killed_at,
        opened_s=opened_at - killed_at,
        first_token_s=first_token_at - killed_at,
        after_notice_s=first_token_at - noticed_at,
        whole=watched.whole(tokens),
    )


async def _at_the_end(log: Log, namespace: Namespace) -> Tail:
    tail, name = await log.tail(), namespace.of(CHAT_STREAM)
    for number in range(await log.partitions(name)):
        partition = Partition(name, number)
        tail.follow(partition, (await log.bounds(partition))[1])
    return tail


async def _hear(tail: Tail, watched: Watched) -> None:
    for record in await tail.read(1000):
        watched.hear(record)


def _request(tokens: int) -> ChatRequested:
    request = RequestId(str(uuid4()))
    return ChatRequested(
        request=request,
        tenant=LOCAL_TENANT,
        conversation=Conversation(request),
        body={"model": f"{MODEL}?tokens={tokens}&rate=50", "messages": [{"role": "user", "content": "Count."}]},
    )


def _noticed_at(rig: Rig, killed_at: float) -> float:
    """When the next process was given partitions, by its own log."""
    for line in rig.klatch.children["generation"].log_file.read_text().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            fact = json.loads(line)
            at = datetime.fromisoformat(fact["timestamp"]).timestamp()
            if fact["event"] == "runner.assigned" and fact["partitions"] and at > killed_at:
                return at
    return killed_at
