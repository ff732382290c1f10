"""One broker: formatted when new, started, awaited until it answers, stopped, killed, started again.

A node is ready when it answers a metadata request as a member in good standing of its cluster; that
is asked of the broker itself, not read from its log.
"""

import asyncio
import re
import signal
from asyncio.subprocess import STDOUT
from pathlib import Path

from klatch_workers import leash
from klatch_workers.kafka.asking import live_members
from klatch_workers.kafka.errors import BrokerFailedError
from klatch_workers.kafka.folder import is_formatted
from klatch_workers.kafka.process import Leashed, Recorded, Running, detached, recorded
from klatch_workers.kafka.properties import HOST, Ports, Program, server_properties

_LOOK_EVERY = 0.02  # seconds between trials to connect: a closed port can only be tried
_LAST_LINES = 12


class Node:
    """Node `id` (from 1) of a cluster whose data folder is `data`."""

    def __init__(self, node_id: int, data: Path, cluster_id: str, ports: tuple[Ports, ...]) -> None:
        self.id = node_id
        self.folder = data / f"node-{node_id}"
        self.log = self.folder / "kafka.log"
        self._config = self.folder / "server.properties"
        self._console = self.folder / "console.log"
        self._pid_file = self.folder / "kafka.pid"
        self._cluster_id = cluster_id
        self._ports = ports
        self._program: Program | None = None
        self._running: Running | None = recorded(self._pid_file, self._config)

    @property
    def port(self) -> int:
        return self._ports[self.id - 1].client

    @property
    def bootstrap(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the broker's process; None when it is not running."""
        return None if self._running is None or self._running.ended() else self._running.pid

    def equip(self, program: Program) -> None:
        """Say which program `start` runs. A node that was only found cannot be started."""
        self._program = program

    async def start(self, *, members: int = 1) -> None:
        """Return when the node answers and sees `members` live nodes. Raises `BrokerFailedError`."""
        if self.pid is not None:
            return
        if self._program is None:
            raise BrokerFailedError(f"node {self.id} was found, not made: start its cluster instead")
        await self._format(self._program)
        self._running = await self._launch(self._program)
        self._pid_file.write_text(str(self._running.pid))
        try:
            async with asyncio.timeout(self._program.options.start_timeout):
                await self._answers(members, self._running)
        except TimeoutError:
            await self.kill()
            waited = self._program.options.start_timeout
            raise self.failure(f"did not answer within {waited:.0f} s") from None

    async def stop(self, grace: float = 10.0) -> None:
        """Ask it to end; after `grace` seconds make it. Acknowledged records survive both."""
        if self.pid is None or self._running is None:
            return
        self._running.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self._gone()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, and return when it is gone."""
        if self._running is not None:
            self._running.signal(signal.SIGKILL)
            await self._gone()

    async def wait(self) -> None:
        """Return when the process has ended, whoever ended it."""
        if self._running is not None:
            await self._running.wait()

    def signal(self, number: signal.Signals) -> None:
        """For the fault kit: SIGSTOP, SIGCONT."""
        if self._running is not None:
            self._running.signal(number)

    async def _gone(self) -> None:
        await self.wait()
        self._pid_file.unlink(missing_ok=True)

    async def _format(self, program: Program) -> None:
        log_dir = self.folder / "data"
        formatted = is_formatted(log_dir, self.id, self._cluster_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = server_properties(self.id, self._ports, log_dir, program.options.properties)
        self._config.write_text(text)
        if formatted:
            return
        argv = program.formatter(self._config, self.log, self._cluster_id)
        with self._console.open("wb") as console:
            tool = await leash.spawn(argv, stdout=console, stderr=STDOUT)
        if await tool.wait() != 0:
            raise self.failure("could not be formatted")

    async def _launch(self, program: Program) -> Leashed | Recorded:
        argv = program.broker(self._config, self.log)
        self._console.write_bytes(b"")
        if not program.options.leash:
            return detached(argv, self._config, self._console)
        with self._console.open("ab") as console:
            return Leashed(await leash.spawn(argv, stdout=console, stderr=STDOUT))

    async def _answers(self, members: int, running: Running) -> None:
        while not await self._listens():
            if running.ended():
                raise self.failure("ended while it started")
            await asyncio.sleep(_LOOK_EVERY)
        # It accepts connections now, and answers them when it has joined its cluster.
        while not await self._sees(members):
            if running.ended():
                raise self.failure("ended while it started")
            await asyncio.sleep(_LOOK_EVERY)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(HOST, self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def _sees(self, members: int) -> bool:
        seen = await live_members(self.bootstrap)
        return self.id in seen and len(seen) >= members

    def failure(self, what: str) -> BrokerFailedError:
        """An error that shows what this node said last, and what to do about it."""
        self._pid_file.unlink(missing_ok=True)
        said = _last_lines(self._console) + _last_lines(self.log)
        hint = next((do for sign, do in _HINTS if re.search(sign, said)), _NO_HINT)
        return BrokerFailedError(
            f"Kafka node {self.id} on port {self.port} {what}. {hint}\nThe last lines of {self.log}:\n{said}"
        )


_NO_HINT = "Its log says why."
_HINTS = (
    (
        r"Address already in use|Socket server failed to bind",
        "Another program has its port: choose another one (--port), or stop that program.",
    ),
    (
        r"Failed to acquire lock",
        "Another broker works on this data folder: stop it, or name another folder.",
    ),
    (r"No space left on device", "The disk is full: make room and start again."),
    (
        r"Could not reserve enough space|OutOfMemoryError|insufficient memory",
        "The memory does not suffice: free some, or change the heap.",
    ),
    (
        r"ZipException|Error opening zip file|ClassNotFoundException|NoClassDefFoundError|Could not find or load",
        "A jar is damaged or missing: remove klatch's cache folder, and it is fetched anew.",
    ),
    (
        r"Invalid cluster\.id|INCONSISTENT_CLUSTER_ID",
        "The data belongs to another cluster: name another data folder.",
    ),
    (r"ConfigException|InvalidConfigurationException", "A property is wrong: correct or remove it."),
)


def _last_lines(path: Path) -> str:
    """The last lines that say something: stack frames are left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    telling = [line for line in lines if not line.startswith(("\tat ", "\t... ")) and line.strip()]
    return "".join(f"  {line}\n" for line in telling[-_LAST_LINES:])
