"""Three shapes of load on a target: one request at a time, many whole replies at once, and many long streams.

Each returns what the client saw and what the watched processes spent meanwhile; none judges.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from klatch_workers.bench.client import Gaps, Reply, Target
from klatch_workers.processes import cpu_s, spent

Pids = Callable[[], Mapping[str, int]]
"""The processes to watch, as they are now."""


@dataclass(slots=True)
class Seen:
    """What was seen of one side, over all its turns."""

    seconds: float = 0.0
    chunks: int = 0
    replies: int = 0
    first_token_ms: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])
    cpu: dict[str, float] = field(default_factory=dict[str, float])

    def add_cpu(self, used: Mapping[str, float]) -> None:
        """One more turn's CPU seconds."""
        for name, seconds in used.items():
            self.cpu[name] = self.cpu.get(name, 0.0) + seconds


async def one(target: Target, model: str) -> float:
    """The time to first token of one request, in milliseconds; its reply is read to the end."""
    return (await (await target.ask(model)).whole()).first_token_ms


async def crowd(target: Target, model: str, concurrent: int, seconds: float, pids: Pids, seen: Seen) -> None:
    """Keep `concurrent` replies under way for `seconds`, each followed by the next; until the last has ended.

    Each asks once at least, so that there is something to tell of, however late it begins.
    """
    loop = asyncio.get_running_loop()
    began, before = loop.time(), cpu_s(pids())

    async def ask_again_and_again(place: int) -> None:
        # Not all at once: people do not press Enter together.
        await asyncio.sleep(seconds / 2 * place / concurrent)
        asking = True
        while asking:
            reply = await (await target.ask(model)).whole()
            seen.first_token_ms.append(reply.first_token_ms)
            seen.chunks += reply.chunks
            seen.replies += 1
            asking = loop.time() - began < seconds

    async with asyncio.TaskGroup() as group:
        for place in range(concurrent):
            group.create_task(ask_again_and_again(place))
    seen.seconds += loop.time() - began
    seen.add_cpu(spent(before, cpu_s(pids())))


@dataclass(frozen=True, slots=True)
class Paced:
    """So many streams, so many tokens a second each, watched for so long once all of them speak."""

    streams: int
    rate: float
    seconds: float
    lead_s: float = 1.5
    """What starting all of them is given."""

    def model(self, name: str) -> str:
        """Long enough that none ends while it is watched."""
        return f"{name}?tokens={int(self.rate * (self.lead_s * 2 + self.seconds + 1))}&rate={self.rate:g}"


async def paced(target: Target, load: Paced, name: str, pids: Pids, seen: Seen) -> None:
    """Start the streams, watch them, and let them end."""
    loop = asyncio.get_running_loop()
    gaps, model = Gaps(seen.gaps), load.model(name)

    async def begin(place: int) -> Reply:
        await asyncio.sleep(load.lead_s * place / load.streams)
        reply = await target.ask(model, gaps)
        await reply.spoke()
        return reply

    replies = await asyncio.gather(*(begin(place) for place in range(load.streams)))
    began, before, chunks = loop.time(), cpu_s(pids()), _chunks(replies)
    gaps.open = True
    await asyncio.sleep(load.seconds)
    gaps.open = False
    seen.add_cpu(spent(before, cpu_s(pids())))
    seen.seconds += loop.time() - began
    seen.chunks += _chunks(replies) - chunks
    for reply in replies:
        seen.replies += 1
        await reply.whole()


def _chunks(replies: Sequence[Reply]) -> int:
    return sum(reply.chunks for reply in replies)
