"""The small endpoints: models, as the port answers, and whether this door is alive and ready."""

import asyncio

from klatch_schemas import codec
from klatch_schemas.errors import Unavailable
from klatch_schemas.records import Partition
from klatch_workers.http.auth import tenant_of
from klatch_workers.http.call import Call
from klatch_workers.http.runtime import Runtime

_READY_WITHIN_S = 2.0


async def models(runtime: Runtime, call: Call) -> None:
    """`GET /v1/models`."""
    call.tenant = tenant_of(call.header(b"authorization"), runtime.door.keys)
    names = await runtime.door.models.models() if runtime.door.models else []
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "klatch"} for name in names]
    await call.answer(200, codec.dumps({"object": "list", "data": listed}))


async def healthy(_: Runtime, call: Call) -> None:
    """`GET /healthz`: the process answers."""
    await call.answer(200, b'{"status":"ok"}')


async def ready(runtime: Runtime, call: Call) -> None:
    """`GET /readyz`: the ledgers are complete and the log answers."""
    if not runtime.door.ready():
        raise Unavailable("the ledgers are still being read", retry_after_ms=1000)
    async with asyncio.timeout(_READY_WITHIN_S):
        # How many partitions there are may be remembered; where one ends must be asked.
        await runtime.door.log.bounds(Partition(runtime.request_topic, 0))
    await call.answer(200, b'{"status":"ready"}')
