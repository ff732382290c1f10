"""Runs admission on Kafka until killed or told to stop: `python admission_child.py BOOTSTRAP NAMESPACE COMMIT_S`.

It says `owning` when it begins to restore a partition, and `ready` when all are restored.
"""

import asyncio
import signal
import sys

from klatch_schemas.records import Partition
from klatch_schemas.topics import Namespace
from klatch_streams.admission import Admission
from klatch_streams.decider_owner import DeciderOwner, DeciderStage
from klatch_streams.kafka_log import KafkaLog, KafkaOptions
from klatch_streams.runner import Runner, RunnerSettings


def say(what: str) -> None:
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


class Telling(DeciderStage[object]):
    """Says when it is asked to own."""

    async def own(self, partition: Partition, committed: int) -> DeciderOwner[object]:
        say("owning")
        return await super().own(partition, committed)


async def main(bootstrap: str, prefix: str, commit_s: str) -> None:
    namespace = Namespace(prefix)
    # The same member again, so that the group need not wait for the session of the one that was killed.
    log = await KafkaLog.open(KafkaOptions(bootstrap, instance_id="admission-0", session_ms=6_000, heartbeat_ms=1_000))
    stage = Telling(Admission(), log, namespace)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    runner = Runner(log, stage, namespace.group("admission"), RunnerSettings(commit_s=float(commit_s)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runner.stop)
    running = asyncio.create_task(runner.run())
    await asyncio.wait([running, asyncio.create_task(runner.ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    say("ready")
    await running
    await log.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
