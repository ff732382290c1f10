"""A broker's process, whether we started it or found it by the pid that somebody wrote down.

A recorded pid counts only while that process's command line names the node's own configuration file:
pids are given out again. POSIX only.
"""

import asyncio
import os
import signal
import subprocess
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_LOOK_EVERY = 0.05  # seconds


class Running(Protocol):
    @property
    def pid(self) -> int: ...

    def ended(self) -> bool: ...
    def signal(self, number: signal.Signals) -> None: ...
    async def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Leashed:
    process: Process

    @property
    def pid(self) -> int:
        return self.process.pid

    def ended(self) -> bool:
        return self.process.returncode is not None

    def signal(self, number: signal.Signals) -> None:
        if not self.ended():
            self.process.send_signal(number)

    async def wait(self) -> None:
        await self.process.wait()


@dataclass(frozen=True, slots=True)
class Recorded:
    pid: int
    config: Path
    child: bool = False

    def ended(self) -> bool:
        # A command line is empty for a moment while a program starts: of a child, its exit tells more.
        if self.child:
            return _reaped(self.pid)
        return not _command_line(self.pid).rstrip().endswith(str(self.config))

    def signal(self, number: signal.Signals) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    async def wait(self) -> None:
        while not self.ended():  # noqa: ASYNC110  it is not our child: nothing reports its end
            await asyncio.sleep(_LOOK_EVERY)


def detached(argv: Sequence[str], config: Path, output: Path) -> Recorded:
    """Start a process that outlives us, in a session of its own."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        dict(os.environ),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
    )
    return Recorded(pid, config, child=True)


def recorded(pid_file: Path, config: Path) -> Recorded | None:
    """The process that `pid_file` names, if it is still that one."""
    try:
        found = Recorded(int(pid_file.read_text()), config)
    except (FileNotFoundError, ValueError):
        return None
    return None if found.ended() else found


def _reaped(pid: int) -> bool:
    """Whether that child has ended; takes its exit status, without which it stays a zombie."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _command_line(pid: int) -> str:
    """Empty when there is no such process, or it is a zombie."""
    if Path("/proc/self").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            return ""
    asked = subprocess.run(  # noqa: S603
        ["/bin/ps", "-ww", "-o", "args=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout
