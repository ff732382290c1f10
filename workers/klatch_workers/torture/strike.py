"""Carries out a schedule of faults on a rig, and notes when each was really carried out.

A process that is stopped is left alone until it goes on; a fault that finds nobody to strike is left out, a boundary
whose record does not come within half a minute too. Faults on the broker come one at a time.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, assert_never

from klatch_schemas.records import Record
from klatch_streams.log import Log, LogError
from klatch_workers.torture.boundaries import BOUNDARIES, TAKEN_OVER, Boundary, appears
from klatch_workers.torture.evidence import Struck
from klatch_workers.torture.owners import Owners
from klatch_workers.torture.rig import START_S, Rig, Say
from klatch_workers.torture.schedule import ZOMBIES, Fault
from klatch_workers.up.children import Child

_SUPERVISED_S: Final = 3 * START_S
"""How long it is tried to start a worker beside other faults, before the run is given up."""
_AWAKE_S: Final = 4.0
"""How long a zombie and its successor work side by side before one of them is sent home."""
_PATIENCE_S: Final = 30.0
"""How long the record of a boundary is waited for."""
_AGAIN_S: Final = 0.3
_ON_ITS_WAY_S: Final = 1.0
"""How long records of a process that was stopped may still come: it had sent them. No group gives it up so soon."""


@dataclass(slots=True)
class Striker:
    """One schedule on one rig."""

    rig: Rig
    log: Log
    say: Say
    struck: list[Struck] = field(default_factory=list[Struck])
    _stopped: set[str] = field(default_factory=set[str])
    _wanted: dict[str, int] = field(default_factory=dict[str, int])
    _broker: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changing: dict[str, asyncio.Lock] = field(init=False)
    """Processes of a stage come and go one change at a time."""
    _owners: Owners = field(default_factory=Owners)

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
        began_ms = _now_ms()
        since_ms = await self._strike(fault)
        if since_ms is None:
            self.say(f"{fault.at_s:6.1f} s: nobody was left to {what}")
        else:
            # Of zombies the stage is told: how deaf one was does not hang on where it was stopped.
            target = BOUNDARIES[fault.target].stage if fault.kind in ZOMBIES else fault.target
            self.struck.append(Struck(f"{fault.kind} {target}".strip(), since_ms, _now_ms(), began_ms))

    async def _strike(self, fault: Fault) -> float | None:
        """Returns, when it is over, from when on there was something to recover from; None: nobody was struck."""
        since_ms = _now_ms()
        match fault.kind:
            case "broker":
                return await self._kill_nodes(fault, 1)
            case "cluster":
                return await self._kill_nodes(fault, len(self.rig.cluster.nodes))
            case "leaderless":
                # Two replicas must take a record where there are three.
                return await self._kill_nodes(fault, (len(self.rig.cluster.nodes) + 1) // 2)
            case "boundary":
                return await self._kill_at(fault)
            case "zombie" | "outlive":
                return await self._zombie(fault)
            case "scale":
                async with self._changing[fault.target]:
                    self._wanted[fault.target] = fault.count
                    await self._resize(fault.target)
            case "kill" | "stop" | "twin" | "roll":
                child = self._chosen(fault)
                if child is None:
                    return None
                done = {"kill": self._kill, "stop": self._stop, "twin": self._twin, "roll": self._roll}
                await done[fault.kind](fault, child)
            case _:
                assert_never(fault.kind)
        return since_ms

    async def _kill_at(self, fault: Fault) -> float | None:
        owners = await self._met_at(BOUNDARIES[fault.target])
        for child in owners:
            _kill_process(child)
        return _now_ms() if owners else None

    async def _zombie(self, fault: Fault) -> float | None:
        boundary = BOUNDARIES[fault.target]
        met = await self._met_at(boundary)
        if not met:
            return None
        zombie, stage, outlives = met[fault.which % len(met)], boundary.stage, fault.kind == "outlive"
        since_ms = _now_ms()

        async def taken_over(adding: asyncio.Task[Child]) -> None:
            begins = BOUNDARIES[f"commit/{stage}" if outlives else TAKEN_OVER[stage]]
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await self._succeeded(begins, self._owners.of(zombie.log_file))
                    await asyncio.sleep(fault.lasts_s)
                    if outlives:
                        await asyncio.wait({adding})
                        _kill_process(adding.result())

        await self._freeze(fault, stage, zombie, taken_over, twin=outlives)
        return since_ms

    async def _succeeded(self, begins: Boundary, numbers: Collection[int]) -> None:
        """Until such a record of one of these partitions is written, by another than who has just been stopped."""
        await asyncio.sleep(_ON_ITS_WAY_S)

        def appeared(record: Record) -> bool:
            return begins.appeared(record) and (not numbers or begins.partition(record) in numbers)

        await self._appears(begins._replace(appeared=appeared))

    async def _met_at(self, boundary: Boundary) -> list[Child]:
        """Waits for the boundary's next record; returns the processes that it may come from, or go to."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                record = await self._appears(boundary)
        except TimeoutError:
            return []
        there = self._there(boundary.stage)
        number = boundary.partition(record)
        # A stage without partitions has one worker; where nobody is known to own it, it is one of all.
        return [child for child in there if number in self._owners.of(child.log_file)] or there

    async def _appears(self, boundary: Boundary) -> Record:
        while True:
            try:
                return await appears(self.log, self.rig.namespace, boundary)
            except LogError:
                # A broker is away: what it takes when it is back will do as well.
                await asyncio.sleep(_AGAIN_S)

    def _there(self, stage: str) -> list[Child]:
        return [child for child in self.rig.pools.get(stage, ()) if child.pid and child.name not in self._stopped]

    def _chosen(self, fault: Fault) -> Child | None:
        there = self._there(fault.target)
        return there[fault.which % len(there)] if there else None

    async def _kill(self, _: Fault, child: Child) -> None:
        _kill_process(child)

    async def _twin(self, fault: Fault, child: Child) -> None:
        async with self._changing[fault.target]:
            async with asyncio.TaskGroup() as starting:
                for _ in range(max(1, fault.count)):
                    starting.create_task(self.rig.add(fault.target, again_for_s=_SUPERVISED_S, twin_of=child))
            await asyncio.sleep(fault.lasts_s)
            await self.rig.retire(fault.target, child)
            await self._resize(fault.target)

    async def _roll(self, fault: Fault, child: Child) -> None:
        async with self._changing[fault.target]:
            await self.rig.retire(fault.target, child)
            await self._resize(fault.target)

    async def _stop(self, fault: Fault, child: Child) -> None:
        # Somebody must be there to take over.
        await self._freeze(
            fault, fault.target, child, lambda adding: asyncio.gather(adding, asyncio.sleep(fault.lasts_s))
        )

    async def _freeze(
        self,
        fault: Fault,
        stage: str,
        child: Child,
        until: Callable[[asyncio.Task[Child]], Awaitable[object]],
        *,
        twin: bool = False,
    ) -> None:
        """Stop a process, start another beside it, and let it go on after `until`, which is given the start."""
        zombie = child.pid
        try:
            os.kill(zombie, signal.SIGSTOP)
        except ProcessLookupError:
            return  # It has just died of something else.
        self._stopped.add(child.name)
        async with asyncio.TaskGroup() as beside:
            adding = beside.create_task(self._add(stage, child if twin else None))
            try:
                await until(adding)
            finally:
                with suppress(ProcessLookupError):
                    os.kill(zombie, signal.SIGCONT)
                self._stopped.discard(child.name)
        await asyncio.sleep(_AWAKE_S)
        async with self._changing[stage]:
            await self.rig.retire(stage, adding.result() if fault.which % 2 else child)
            await self._resize(stage)

    async def _add(self, stage: str, twin_of: Child | None) -> Child:
        async with self._changing[stage]:
            return await self.rig.add(stage, again_for_s=_SUPERVISED_S, twin_of=twin_of)

    async def _resize(self, stage: str) -> None:
        """As many workers as are wanted, not counting those that are stopped."""
        wanted = self._wanted.get(stage, 1)
        there = [child for child in self.rig.pools[stage] if child.name not in self._stopped]
        async with asyncio.TaskGroup() as changing:
            for _ in range(wanted - len(there)):
                changing.create_task(self.rig.add(stage, again_for_s=_SUPERVISED_S))
            for child in there[wanted:]:
                changing.create_task(self.rig.retire(stage, child))

    async def _kill_nodes(self, fault: Fault, count: int) -> float:
        async with self._broker:
            nodes = self.rig.cluster.nodes
            struck = [nodes[(fault.which + number) % len(nodes)] for number in range(count)]
            await asyncio.gather(*(node.kill() for node in struck))
            await asyncio.sleep(fault.lasts_s)
            since_ms = _now_ms()
            # Together: where most are away, none of them answers alone.
            async with asyncio.TaskGroup() as starting:
                for node in struck:
                    starting.create_task(node.start(members=len(nodes)))
        return since_ms


def _kill_process(child: Child) -> None:
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)


def _now_ms() -> float:
    return time.time() * 1000
