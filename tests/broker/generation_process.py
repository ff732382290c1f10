"""Generation as operators run it: processes of their own, given requests as admission and screening hand them on."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from klatch_schemas import codec
from klatch_schemas.client import Stream
from klatch_schemas.events import ChatAdmitted, ChatRequested, Reservation, TrustVerdict
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.records import Cause, Partition, partition_of
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, TRUST_VERDICTS, Namespace
from klatch_streams.kafka_log import KafkaLog
from klatch_workers import leash

TENANT = "acme"
_numbers = count()
"""Of the records of `chat.requests` that these requests would be: what repeats a cause is dropped."""


async def ask(log: KafkaLog, namespace: Namespace, name: str, model: str, partitions: int) -> Stream:
    """A request that is admitted and allowed, in a conversation of its own; `name` is also what its user says."""
    body = {"model": model, "messages": [{"role": "user", "content": name}], "user": name}
    request = ChatRequested(request=name, tenant=TENANT, conversation=name, body=body)
    verdict = TrustVerdict(
        request=name, tenant=TENANT, conversation=name, stage="input", decision="allow", policy="test"
    )
    now_ms = int(time.time() * 1000)
    admitted = ChatAdmitted(
        request=request, requested_ms=now_ms, reservation=Reservation(tokens=100, expires_ms=now_ms)
    )
    cause = Cause(Partition(namespace.of(CHAT_REQUESTS), 0), next(_numbers), 0)
    await log.append(
        [
            codec.draft(namespace.of(TRUST_VERDICTS), name, verdict),
            codec.draft(namespace.of(CHAT_ADMITTED), name, admitted, cause=cause),
        ]
    )
    return Stream(Tenant(TENANT), RequestId(name), Conversation(name), partition_of(name.encode(), partitions), 0)


@dataclass(slots=True)
class Generation:
    """A process of `klatch worker generation` that serves."""

    process: Process
    facts: Path
    """Its log."""

    def told(self, fact: str) -> int:
        """How often it told this fact."""
        return self.facts.read_text().count(f'"{fact}"')

    async def stop(self) -> float:
        """SIGTERM; returns how many seconds it took to end, which it must do by itself and with 0."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await self.process.wait() == 0, self.facts.read_text()
        return time.monotonic() - began


@asynccontextmanager
async def generation(
    bootstrap: str, namespace: str, model_url: str, facts: Path, **settings: str
) -> AsyncGenerator[Generation]:
    """Start one, with klatch's defaults but for `settings`; it is killed at the end if it lives."""
    own = {"kafka": bootstrap, "namespace": namespace, "model_url": model_url, **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KLATCH_")}
    environment |= {f"KLATCH_{name.upper()}": value for name, value in own.items()}
    argv = [sys.executable, "-m", "klatch_workers", "worker", "generation", "--json"]
    with facts.open("ab") as said:
        process = await leash.spawn(argv, env=environment, stdout=PIPE, stderr=said)
    try:
        assert process.stdout
        async with asyncio.timeout(60):
            assert json.loads(await process.stdout.readline())["event"] == "ready"
        yield Generation(process, facts)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
