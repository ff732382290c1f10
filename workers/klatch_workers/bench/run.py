"""One run of `klatch bench`: every measurement once, sides in turns, and the figures put beside the budgets.

Sides that are compared take turns within the run, request by request or a few seconds each, so that whatever else the
machine does falls on all of them. Nothing is asserted here: a run on a busy machine is still a run.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klatch_workers import leash
from klatch_workers.bench import fairness, machine
from klatch_workers.bench.budgets import budgets
from klatch_workers.bench.client import Target
from klatch_workers.bench.load import Paced, Seen, crowd, one, paced
from klatch_workers.bench.path import path
from klatch_workers.bench.peer import SAID
from klatch_workers.bench.recovery import recovery
from klatch_workers.bench.relay import ThreeHops
from klatch_workers.bench.report import (
    BROKER,
    DIRECT,
    KLATCH,
    PEER,
    FirstToken,
    Quantiles,
    Recovery,
    Report,
    Side,
    Start,
    Throughput,
    Whole,
    difference,
    quantiles,
    ratio,
    total,
)
from klatch_workers.bench.rig import MODEL, Rig, Say, model_server, rig
from klatch_workers.bench.starts import starts
from klatch_workers.processes import cpu_s, rss_mb, spent

RATE = 50.0
"""Tokens a second of a paced reply: about what people are served."""
_REST_S = 1.0
_IDLE_REST_S = 0.15


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    name: str
    warm_up_requests: int
    starts: int
    idle_requests: int
    turns: int
    """How often the sides take turns under load."""
    crowd_s: float
    concurrent: tuple[int, ...]
    streams: int
    watch_s: float
    throughput_s: float
    throughput_streams: int
    idle_s: float
    admission_requests: int
    recovery_streams: int
    """0: none."""
    fairness_s: float
    """In simulated time."""


FULL = Plan("full", 4000, 2, 60, 3, 2.5, (16, 64), 64, 4.0, 2.5, 16, 5.0, 40_000, 16, 1000.0)
QUICK = Plan("quick", 3000, 1, 20, 2, 2.0, (16,), 64, 3.0, 2.0, 16, 2.0, 10_000, 8, 300.0)
TINY = Plan("tiny", 8, 0, 2, 1, 0.3, (2,), 2, 0.5, 0.3, 1, 0.2, 200, 0, 20.0)


async def measure(folder: Path, plan: Plan, say: Say, peer_cache: Path | None = None) -> Report:
    """Everything in `plan`; with `peer_cache`, beside LiteLLM's proxy, installed there.

    Raises what a part that does not start raises, and ReplyFailed.
    """
    began, load_before = time.monotonic(), machine.load()
    started = await _starts(folder, plan, say)
    say("deciding admissions")
    admission = await _admission(plan.admission_requests)
    say("sharing places at a model")
    flooded = await asyncio.to_thread(fairness.worst, plan.fairness_s)
    async with rig(folder, say, peer_cache=peer_cache) as running:
        await _warm_up(running, plan, say)
        rss_start = rss_mb(running.pids())
        idle = await _idle(running, plan)
        hops, first = await _first_tokens_idle(running, plan, say)
        say("where the time to first token goes")
        steps = await path(running, plan.idle_requests)
        replies, firsts = await _crowds(running, plan, say)
        streams = await _streams(running, plan, say)
        throughput = await _throughput(running, plan, say)
        rss_end = rss_mb(running.pids())
        recovered = await _recovery(running, plan, say)
    report = Report(
        machine=machine.describe(load_before),
        mode=plan.name,
        seconds=time.monotonic() - began,
        hops_ms=hops,
        path_ms=steps,
        first_token=[first, *firsts],
        streams=streams,
        replies=replies,
        throughput=throughput,
        idle_cpu_percent=idle,
        rss_mb_start=rss_start,
        rss_mb_end=rss_end,
        admission_per_s=admission["per_s"],
        admission_scoped_per_s=admission["scoped_per_s"],
        starts=started,
        recovery=recovered,
        budgets=[],
        flooded_ratio=flooded,
        peer=SAID if peer_cache else "",
    )
    return budgets(report)


# --- before anything runs


async def _starts(folder: Path, plan: Plan, say: Say) -> list[Start]:
    if not plan.starts:
        return []
    say("starting `klatch up`, and stopping it")
    async with model_server(folder) as upstream:
        return await starts(folder, str(upstream.facts["url"]), plan.starts)


async def _admission(requests: int) -> dict[str, float]:
    command = [sys.executable, "-m", "klatch_workers.bench.admission", str(requests)]
    process = await leash.spawn(command, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    return {name: float(value) for name, value in json.loads(said).items()}


# --- on the rig


async def _warm_up(running: Rig, plan: Plan, say: Say) -> None:
    """Every side a little; klatch until the broker's JIT has settled, as that of a broker that runs for weeks has.

    Until then its compiler takes more of the processors than klatch does (docs/performance.md).
    """
    say("warming up the broker")
    for target in running.targets.values():
        await asyncio.gather(*(one(target, f"{MODEL}?tokens=20&rate={RATE:g}") for _ in range(16)))
    requests = iter(range(plan.warm_up_requests))

    async def ask() -> None:
        for _ in requests:
            await one(running.targets[KLATCH], f"{MODEL}?tokens=2")

    await asyncio.gather(*(ask() for _ in range(8)))
    await asyncio.sleep(_REST_S)


async def _idle(running: Rig, plan: Plan) -> dict[str, float]:
    before = cpu_s(running.pids())
    await asyncio.sleep(plan.idle_s)
    return {name: used / plan.idle_s * 100 for name, used in spent(before, cpu_s(running.pids())).items()}


async def _first_tokens_idle(running: Rig, plan: Plan, say: Say) -> tuple[Quantiles, FirstToken]:
    say("time to first token, one request at a time")
    targets, model = running.targets, f"{MODEL}?tokens=2"
    hops, took = list[float](), {name: list[float]() for name in targets}
    async with ThreeHops(running.cluster.bootstrap) as three:
        await three.send()
        for _ in range(plan.idle_requests):
            for name, target in targets.items():
                took[name].append(await one(target, model))
                # The conclusion of one reply must not be in the way of the next.
                await asyncio.sleep(_IDLE_REST_S)
            hops.append(await three.send())
    sides = {name: quantiles(values) for name, values in took.items()}
    added = {
        name: quantiles([ours - direct for ours, direct in zip(values, took[DIRECT], strict=True)])
        for name, values in took.items()
        if name != DIRECT
    }
    return quantiles(hops), FirstToken(1, sides, added)


async def _crowds(running: Rig, plan: Plan, say: Say) -> tuple[dict[str, Whole], list[FirstToken]]:
    firsts, seen = list[FirstToken](), dict[str, Seen]()
    for concurrent in plan.concurrent:
        say(f"whole replies, {concurrent} at once")
        seen = {name: Seen() for name in running.targets}
        tokens = 100 if plan.crowd_s > 1 else 5
        for _ in range(plan.turns):
            for name, target in running.targets.items():
                model = f"{MODEL}?tokens={tokens}&rate={RATE:g}"
                await crowd(target, model, concurrent, plan.crowd_s, running.pids, seen[name])
                await asyncio.sleep(_REST_S)
        sides = {name: quantiles(one_side.first_token_ms) for name, one_side in seen.items()}
        added = {name: difference(sides[name], sides[DIRECT]) for name in sides if name != DIRECT}
        firsts.append(FirstToken(concurrent, sides, added))
    return {name: _whole(running, name, plan.concurrent[-1], seen[name]) for name in seen}, firsts


def _whole(running: Rig, name: str, concurrent: int, seen: Seen) -> Whole:
    names = running.processes(name)
    cpu = _each(seen.cpu, _with_broker(names), seen.replies / 1e3)
    return Whole(
        concurrent=concurrent,
        replies_per_s=ratio(seen.replies, seen.seconds),
        chunks_per_reply=ratio(seen.chunks, seen.replies),
        cpu_ms=cpu,
        total_cpu_ms=total(cpu, names),
    )


async def _streams(running: Rig, plan: Plan, say: Say) -> dict[str, Side]:
    say(f"{plan.streams} streams at {RATE:g} tokens a second")
    load = Paced(plan.streams, RATE, plan.watch_s)
    seen = {name: Seen() for name in running.targets}
    for _ in range(plan.turns):
        for name, target in running.targets.items():
            await paced(target, load, MODEL, running.pids, seen[name])
            await asyncio.sleep(_REST_S)
    return {name: _side(running, name, load, seen[name]) for name in seen}


def _side(running: Rig, name: str, load: Paced, seen: Seen) -> Side:
    names = running.processes(name)
    cpu = _each(seen.cpu, _with_broker(names), seen.chunks / 1e6)
    return Side(
        streams=load.streams,
        asked_per_s=load.streams * load.rate,
        got_per_s=ratio(seen.chunks, seen.seconds),
        gaps_ms=quantiles([gap * 1000 for gap in seen.gaps]),
        cpu_us=cpu,
        total_cpu_us=total(cpu, names),
    )


async def _throughput(running: Rig, plan: Plan, say: Say) -> dict[str, Throughput]:
    say("as many tokens as there can be")
    targets: Mapping[str, Target] = running.targets
    seen = {name: Seen() for name in targets}
    for _ in range(plan.turns):
        for name, target in targets.items():
            model = f"{MODEL}?tokens=1000"
            await crowd(target, model, plan.throughput_streams, plan.throughput_s, running.pids, seen[name])
            await asyncio.sleep(_REST_S)
    return {name: _most(running, name, plan.throughput_streams, seen[name]) for name in targets}


def _most(running: Rig, name: str, streams: int, seen: Seen) -> Throughput:
    names = running.processes(name)
    cpu = _each(seen.cpu, _with_broker(names), seen.chunks / 1e6)
    busiest = max(seen.cpu, key=lambda process: seen.cpu[process], default="")
    return Throughput(
        streams=streams,
        per_s=ratio(seen.chunks, seen.seconds),
        cpu_us=cpu,
        total_cpu_us=total(cpu, names),
        busiest=busiest,
        busiest_cores=ratio(seen.cpu.get(busiest, 0.0), seen.seconds),
    )


async def _recovery(running: Rig, plan: Plan, say: Say) -> Recovery | None:
    if not plan.recovery_streams:
        return None
    say("killing generation in the middle of streams")
    return await recovery(running, plan.recovery_streams, tokens=200)


def _with_broker(names: Sequence[str]) -> Sequence[str]:
    """Those whose CPU time is a side's; the peer has no broker."""
    return (*names, BROKER) if names and PEER not in names else names


def _each(cpu: Mapping[str, float], names: Sequence[str], count: float) -> dict[str, float]:
    return {name: ratio(cpu[name], count) for name in names if name in cpu}
