"""Where the time to a first token goes: when each record of a request was made, by the timestamps in the log.

Timestamps have milliseconds, and the client's clock is the machine's own, so that single steps are rough and their
medians are not. A record's time is when its writer sent it; that of a request is when the broker took it.
"""

import asyncio
import time
from collections.abc import Mapping

from klatch_schemas import codec
from klatch_schemas.codec import Delta, Unreadable
from klatch_schemas.events import ChatAdmitted, ChatRequested, StreamAttempt, TrustVerdict
from klatch_schemas.records import Partition, Record
from klatch_schemas.topics import CHAT_ADMITTED, CHAT_REQUESTS, CHAT_STREAM, TRUST_VERDICTS, Namespace
from klatch_streams.kafka.options import KafkaOptions
from klatch_streams.kafka_log import KafkaLog
from klatch_streams.log import Log
from klatch_workers.bench.report import KLATCH, Quantiles, quantiles
from klatch_workers.bench.rig import MODEL, Rig

_REST_S = 0.05

STEPS = ("requested", "admitted", "verdict", "opened", "first delta", "client")


async def path(rig: Rig, requests: int) -> dict[str, Quantiles]:
    """Milliseconds from the client's sending to each of `STEPS`, one request at a time."""
    log = await KafkaLog.open(KafkaOptions(rig.cluster.bootstrap))
    namespace = Namespace.named(rig.klatch.settings.namespace)
    took = {step: list[float]() for step in STEPS}
    try:
        for _ in range(requests):
            starts = await _ends(log, namespace)
            sent_ms = time.time() * 1000
            reply = await (await rig.targets[KLATCH].ask(f"{MODEL}?tokens=2")).whole()
            took["client"].append(reply.first_token_ms)
            await asyncio.sleep(_REST_S)
            for step, at in (await _steps(log, starts, await _ends(log, namespace))).items():
                took[step].append(at - sent_ms)
    finally:
        await log.close()
    return {step: quantiles(values) for step, values in took.items()}


async def _ends(log: Log, namespace: Namespace) -> dict[Partition, int]:
    ends = dict[Partition, int]()
    for topic in (CHAT_REQUESTS, CHAT_ADMITTED, TRUST_VERDICTS, CHAT_STREAM):
        name = namespace.of(topic)
        for number in range(await log.partitions(name)):
            partition = Partition(name, number)
            ends[partition] = (await log.bounds(partition))[1]
    return ends


async def _steps(log: Log, starts: Mapping[Partition, int], ends: Mapping[Partition, int]) -> dict[str, int]:
    tail = await log.tail()
    left = {partition: ends[partition] - start for partition, start in starts.items()}
    for partition, start in starts.items():
        tail.follow(partition, start)
    found = dict[str, int]()
    while any(count > 0 for count in left.values()):
        for record in await tail.read(1_000):
            left[record.partition] = ends[record.partition] - record.offset - 1
            if step := _step(record):
                found[step] = min(found.get(step, record.timestamp_ms), record.timestamp_ms)
    await tail.close()
    return found


def _step(record: Record) -> str | None:
    try:
        said = codec.decode(record.value)
    except Unreadable:
        return None
    match said:
        case ChatRequested():
            return "requested"
        case ChatAdmitted():
            return "admitted"
        case TrustVerdict():
            return "verdict"
        case StreamAttempt():
            return "opened"
        case Delta():
            return "first delta"
        case _:
            return None
