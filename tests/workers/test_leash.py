"""What we start ends with us, whatever ends us, and is otherwise left alone."""

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import psutil
import pytest

from klatch_workers import leash, leash_exec

SLEEPER = "import sys, time; print('up', flush=True); time.sleep(600)"

# Starts a sleeper on the leash, from the main thread or another one, and says its pid.
HOLDER = """
import asyncio, sys, threading, time
from asyncio.subprocess import PIPE
from klatch_workers import leash

async def hold():
    process = await leash.spawn([sys.executable, "-c", sys.argv[2]], stdout=PIPE)
    await process.stdout.readline()
    print(process.pid, flush=True)
    await asyncio.sleep(600)

if sys.argv[1] == "main":
    asyncio.run(hold())
else:
    threading.Thread(target=lambda: asyncio.run(hold())).start()
"""


async def holder(thread: str) -> tuple[Process, psutil.Process]:
    process = await asyncio.create_subprocess_exec(*(sys.executable, "-c", HOLDER, thread, SLEEPER), stdout=PIPE)
    assert process.stdout is not None
    return process, psutil.Process(int(await process.stdout.readline()))


async def gone(process: psutil.Process) -> None:
    """It is not our child, so its end can only be looked for. A zombie that nobody reaps is gone."""
    while _runs(process):  # noqa: ASYNC110
        # Only the process's own parent is told of its end.
        await asyncio.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "thread",
    [
        pytest.param("main", id="held by the kernel on Linux"),
        pytest.param("another", id="held by a pipe"),
    ],
)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
async def test_the_program_ends_with_its_holder(thread: str, end: signal.Signals) -> None:
    process, sleeper = await holder(thread)
    assert sleeper.is_running()
    process.send_signal(end)
    await process.wait()
    async with asyncio.timeout(30):
        await gone(sleeper)


async def test_the_pid_is_the_program_and_not_the_shim() -> None:
    process = await leash.spawn([sys.executable, "-c", SLEEPER], stdout=PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    assert psutil.Process(process.pid).cmdline() == [sys.executable, "-c", SLEEPER]
    process.kill()
    assert await process.wait() == -signal.SIGKILL


async def test_output_exit_code_and_environment_are_the_programs_own() -> None:
    code = "import os, sys; print(os.environ['GREETING']); sys.exit(7)"
    process = await leash.spawn([sys.executable, "-c", code], env={"GREETING": "hi"}, stdout=PIPE)
    out, _ = await process.communicate()
    assert (out, process.returncode) == (b"hi\n", 7)


async def test_a_program_held_by_a_pipe_takes_its_watcher_with_it() -> None:
    watcher, said = await asyncio.to_thread(asyncio.run, _run_with_watcher("print('up', flush=True); print(input())"))
    assert said == (b"bye\n", 0)
    async with asyncio.timeout(30):
        await gone(watcher)


async def _run_with_watcher(code: str) -> tuple[psutil.Process, tuple[bytes, int | None]]:
    """The watcher is looked for before the program is told to end: it may be gone as soon as the program is."""
    process = await leash.spawn([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    [watcher] = psutil.Process(process.pid).children()
    out, _ = await process.communicate(b"bye\n")
    return watcher, (out, process.returncode)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_signals_that_python_ignores_are_not_ignored_by_the_program() -> None:
    process = await leash.spawn(["grep", "SigIgn", "/proc/self/status"], stdout=PIPE)
    out, _ = await process.communicate()
    ignored = int(out.split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))


async def test_a_missing_program_is_an_error_of_the_caller() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        await leash.spawn(["no-such-program"])


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
async def test_a_parent_that_died_before_the_leash_was_fastened_is_noticed(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", leash_exec.__file__, "kernel", "1"),
        *("/bin/sh", "sh", "-c", f"touch {touched}"),
    )
    assert await process.wait() != 0
    assert not touched.exists()
