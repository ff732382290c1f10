"""Child processes that are kept running: started on a leash, awaited until they serve, started anew when they die.

A child says that it serves by a JSON line on stdout, `{"event": "ready", …}`. What it writes to stderr goes to a file
of its own, whose last lines are shown when it dies. Stopping is SIGTERM, patience, SIGKILL.
"""

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from klatch_workers import leash

log = structlog.get_logger(__name__)

_LONGEST_WAIT_S = 15.0


class ChildFailed(Exception):
    """A child did not come up; the message holds its last words and where to read more."""


@dataclass(slots=True)
class Child:
    """One process that is kept running."""

    name: str
    module: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log_file: Path
    begin: Callable[[], Awaitable[Mapping[str, Any]]] | None = None
    """What it waits for before it begins, and is then told on stdin: while it waits it imports what it needs."""
    patience_s: float = 60.0
    """How long it may take until it serves."""
    said: Callable[[str, Mapping[str, Any]], None] = lambda _event, _facts: None
    """Told of `restarted` and `died`."""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """What it said when it began to serve."""
    _process: Process | None = None
    _keeping: asyncio.Task[None] | None = None
    _stopping: bool = False

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Start it and wait until it serves; from then on it is kept running. Raises ChildFailed."""
        await self._spawn()
        self._keeping = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def stop(self, patience_s: float) -> None:
        """SIGTERM; SIGKILL after `patience_s`."""
        self._stopping = True
        process = self._process
        if process and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            if process.stdin:
                # One that still waits to be told that it may begin never will be.
                process.stdin.close()
            try:
                async with asyncio.timeout(patience_s):
                    await process.wait()
            except TimeoutError:
                log.warning("child.killed", child=self.name, pid=process.pid)
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._keeping:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})

    async def _spawn(self) -> None:
        with self.log_file.open("ab") as stderr:
            self._process = await leash.spawn(
                [sys.executable, "-m", self.module, *self.arguments],
                env=self.environment,
                stdin=PIPE if self.begin else DEVNULL,
                stdout=PIPE,
                stderr=stderr,
            )
        if self.begin:
            await _tell(self._process, await self.begin())
        try:
            async with asyncio.timeout(self.patience_s):
                await self._until_ready(self._process)
        except TimeoutError as error:
            self._process.kill()
            raise ChildFailed(
                f"{self.name} was not ready within {self.patience_s:.0f} s{self._last_words()}"
            ) from error

    async def _until_ready(self, process: Process) -> None:
        assert process.stdout  # noqa: S101 - it was started with a pipe
        async for line in process.stdout:
            with suppress(ValueError):
                facts: Any = json.loads(line)
                if facts.get("event") == "ready":
                    self.facts = facts
                    return
        raise ChildFailed(f"{self.name} ended with {await process.wait()} before it was ready{self._last_words()}")

    async def _keep(self) -> None:
        failures = 0
        while True:
            assert self._process  # noqa: S101 - started before it is kept
            assert self._process.stdout  # noqa: S101
            async for _ in self._process.stdout:
                pass
            code = await self._process.wait()
            if self._stopping:
                return
            self.said("died", {"process": self.name, "code": code, "log": str(self.log_file)})
            failures = await self._again(failures)

    async def _again(self, failures: int) -> int:
        while True:
            await asyncio.sleep(min(_LONGEST_WAIT_S, 0.1 * 2**failures) if failures else 0)
            try:
                await self._spawn()
            except ChildFailed as error:
                failures += 1
                log.warning("child.failed", child=self.name, reason=str(error).splitlines()[0], failures=failures)
            else:
                self.said("restarted", {"process": self.name, "pid": self.pid})
                return 0

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self.log_file.read_text(errors="replace").splitlines()[-15:]
            return "\n".join(["; its last lines:", *(f"    {line}" for line in lines), f"    ({self.log_file})"])
        return ""


async def _tell(process: Process, facts: Mapping[str, Any]) -> None:
    assert process.stdin  # noqa: S101 - it was started with a pipe
    # A child that has died meanwhile is found when it is not ready.
    with suppress(ConnectionError):
        process.stdin.write(json.dumps(facts).encode() + b"\n")
        await process.stdin.drain()
        process.stdin.close()
