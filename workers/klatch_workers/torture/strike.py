"""Carries out a schedule of faults on a rig, and notes when each was really carried out.

A process that is stopped is left alone until it goes on; a fault that finds nobody to strike waits for no one and is
left out. Faults on the broker come one at a time.
"""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from klatch_workers.torture.evidence import Struck
from klatch_workers.torture.rig import Rig, Say
from klatch_workers.torture.schedule import Fault
from klatch_workers.up.children import Child

_AWAKE_S: Final = 4.0
"""How long a zombie and its successor work side by side before one of them is sent home."""


@dataclass(slots=True)
class Striker:
    """One schedule on one rig."""

    rig: Rig
    say: Say
    struck: list[Struck] = field(default_factory=list[Struck])
    _stopped: set[str] = field(default_factory=set[str])
    _wanted: dict[str, int] = field(default_factory=dict[str, int])
    _broker: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changing: dict[str, asyncio.Lock] = field(init=False)
    """Processes of a stage come and go one change at a time."""

    def __post_init__(self) -> None:
        self._changing = {stage: asyncio.Lock() for stage in self.rig.pools}

    async def run(self, faults: Sequence[Fault]) -> None:
        """Strike each at its time; returns when all are over. Raises ChildFailed, KafkaChildError."""
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as striking:
            for fault in faults:
                striking.create_task(self._at(began, fault))

    async def _at(self, began: float, fault: Fault) -> None:
        await asyncio.sleep(began + fault.at_s - asyncio.get_running_loop().time())
        what = " ".join(filter(None, (fault.kind, fault.target, str(fault.count or ""))))
        self.say(f"{fault.at_s:6.1f} s: {what}{f' for {fault.lasts_s:.1f} s' if fault.lasts_s else ''}")
        at_ms = time.time() * 1000
        if await self._strike(fault):
            self.struck.append(Struck(f"{fault.kind} {fault.target}".strip(), at_ms, time.time() * 1000))
        else:
            self.say(f"{fault.at_s:6.1f} s: nobody was left to {what}")

    async def _strike(self, fault: Fault) -> bool:
        match fault.kind:
            case "broker":
                return await self._kill_broker(fault)
            case "scale":
                async with self._changing[fault.target]:
                    self._wanted[fault.target] = fault.count
                    await self._resize(fault.target)
                return True
            case "kill" | "stop" | "roll":
                child = self._chosen(fault)
                if child is None:
                    return False
                await {"kill": self._kill, "stop": self._stop, "roll": self._roll}[fault.kind](fault, child)
                return True

    def _chosen(self, fault: Fault) -> Child | None:
        there = [child for child in self.rig.pools[fault.target] if child.pid and child.name not in self._stopped]
        return there[fault.which % len(there)] if there else None

    async def _kill(self, _: Fault, child: Child) -> None:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)

    async def _roll(self, fault: Fault, child: Child) -> None:
        async with self._changing[fault.target]:
            await self.rig.retire(fault.target, child)
            await self._resize(fault.target)

    async def _stop(self, fault: Fault, child: Child) -> None:
        zombie = child.pid
        self._stopped.add(child.name)
        os.kill(zombie, signal.SIGSTOP)
        try:
            # Somebody must be there to take over.
            successor, _ = await asyncio.gather(self._add(fault.target), asyncio.sleep(fault.lasts_s))
        finally:
            with suppress(ProcessLookupError):
                os.kill(zombie, signal.SIGCONT)
            self._stopped.discard(child.name)
        await asyncio.sleep(_AWAKE_S)
        async with self._changing[fault.target]:
            await self.rig.retire(fault.target, successor if fault.which % 2 else child)
            await self._resize(fault.target)

    async def _add(self, stage: str) -> Child:
        async with self._changing[stage]:
            return await self.rig.add(stage)

    async def _resize(self, stage: str) -> None:
        """As many workers as are wanted, not counting those that are stopped."""
        wanted = self._wanted.get(stage, 1)
        there = [child for child in self.rig.pools[stage] if child.name not in self._stopped]
        async with asyncio.TaskGroup() as changing:
            for _ in range(wanted - len(there)):
                changing.create_task(self.rig.add(stage))
            for child in there[wanted:]:
                changing.create_task(self.rig.retire(stage, child))

    async def _kill_broker(self, fault: Fault) -> bool:
        async with self._broker:
            node = self.rig.cluster.nodes[fault.which % len(self.rig.cluster.nodes)]
            await node.kill()
            await asyncio.sleep(fault.lasts_s)
            await node.start()
        return True
