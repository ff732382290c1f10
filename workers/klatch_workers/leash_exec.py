"""The few lines that run between `leash.spawn` and the program: fasten the leash, then become it.

Run as a script by a bare interpreter (`python -I -S`), so it imports the standard library alone.
Usage: leash_exec.py kernel PARENT_PID PROGRAM ARGV... | leash_exec.py pipe FD PROGRAM ARGV...
"""

import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_LOOK_EVERY = 1.0  # seconds between looks whether the program has ended by itself


def leash_by_kernel(parent: int) -> None:
    import ctypes  # noqa: PLC0415  costs 10 ms that the pipe leash need not pay

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # A parent that died before the call above sends no signal any more.
    if os.getppid() != parent:
        os._exit(1)


def leash_by_pipe(pipe: int) -> None:
    """Leave a watcher behind that kills this process when `pipe` closes at its other end."""
    program = os.getpid()
    os.set_inheritable(pipe, False)
    if os.fork() == 0:
        _watch(program, pipe)


def _watch(program: int, pipe: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a reader of the program's output must not wait for the watcher
        os.dup2(nowhere, stream)
    while os.getppid() == program:
        holder_gone, _, _ = select.select([pipe], [], [], _LOOK_EVERY)
        if holder_gone and os.getppid() == program:  # nobody but a parent can have our program's pid
            os.kill(program, signal.SIGKILL)
    os._exit(0)


def main(kind: str, holder: str, program: str, *argv: str) -> None:
    if kind == "kernel":
        leash_by_kernel(int(holder))
    else:
        leash_by_pipe(int(holder))
    # Python ignores these, and what is ignored stays so over exec: give the program a clean slate.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execv(program, argv)  # noqa: S606  the program is the caller's choice


if __name__ == "__main__":
    main(*sys.argv[1:])
