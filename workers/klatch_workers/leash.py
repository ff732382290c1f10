"""Start a process that ends with us, even when we are killed with SIGKILL.

On Linux the kernel holds the leash (`PR_SET_PDEATHSIG`); elsewhere a watcher process does, reading a
pipe that closes when we are gone. Either way `Process.pid` is the program asked for. The leash holds
one program: what that program starts is its own affair. Linux and macOS only.
"""

import asyncio
import functools
import os
import shutil
import sys
import threading
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

_SHIM = Path(__file__).with_name("leash_exec.py")

Kind = Literal["kernel", "pipe"]
Stream = int | IO[bytes] | None


async def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: Stream = asyncio.subprocess.DEVNULL,
    stdout: Stream = None,
    stderr: Stream = None,
    cwd: Path | None = None,
) -> Process:
    """Start `argv` in a session of its own; it gets SIGKILL when this process ends, however it ends.

    Its own session keeps a terminal's Ctrl-C from it: whoever holds the leash stops it in order.
    Raises `FileNotFoundError` when there is no such program.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise FileNotFoundError(f"{argv[0]!r} is not a program that can be run")
    leash = _leash_here()
    holder = str(os.getpid()) if leash == "kernel" else str(_pipe())
    # -I -S: 15 ms instead of 60, and nothing of the user's environment runs in the shim.
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(_SHIM), leash, holder, program, *argv),
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        start_new_session=True,
        pass_fds=() if leash == "kernel" else (int(holder),),
    )


def _leash_here() -> Kind:
    """The kernel signals when the parent *thread* ends: only the main thread is as long-lived as we."""
    main = threading.current_thread() is threading.main_thread()
    return "kernel" if sys.platform == "linux" and main else "pipe"


@functools.cache
def _pipe() -> int:
    """The read end of a pipe whose write end only this process has, open until it is gone."""
    read, _write = os.pipe()
    return read
