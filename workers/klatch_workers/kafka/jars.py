"""Kafka's jars in a cache folder: fetched once, each checked against the lock, never again offline.

A jar appears under its name only after its sha256 agreed, and the marker only after all of them did.
Any number of processes may ask at once: one fetches, the others wait. `ensure_jars` is the door.
"""

import asyncio
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from klatch_workers.kafka.errors import JarsError
from klatch_workers.kafka.filelock import locked
from klatch_workers.kafka.places import Places

KAFKA_VERSION = "4.4.0"
_THREADS = 8
_TRIES = 3
_TIMEOUT = 30  # seconds without a byte
_MARKER = "verified.json"
_ELSEWHERE = (
    "Connect to the network once, or name a mirror in KLATCH_MAVEN_URL, "
    "or a folder that holds Kafka's jars in KLATCH_KAFKA_JARS."
)


@dataclass(frozen=True, slots=True)
class Jar:
    """One line of the lock."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.artifact}-{self.version}.jar"

    def __str__(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"


@dataclass(frozen=True, slots=True)
class Fetched:
    """How far a download is. `bytes` counts what has come in this run."""

    jars: int
    total: int
    bytes: int


Progress = Callable[[Fetched], None]


def read_lock(text: str | None = None) -> tuple[Jar, ...]:
    """The jars of the lock that is shipped beside this module, or of `text`."""
    if text is None:
        text = Path(__file__).with_name(f"kafka-{KAFKA_VERSION}.lock").read_text()
    return tuple(_jar(line) for line in text.splitlines() if line and not line.startswith("#"))


def _jar(line: str) -> Jar:
    coordinates, sha256 = line.split()
    group, artifact, version = coordinates.split(":")
    return Jar(group, artifact, version, sha256)


async def ensure_jars(places: Places, progress: Progress | None = None) -> Path:
    """The folder of Kafka's jars, fetched if it is not complete. Raises `JarsError`.

    `progress` is called from the threads that fetch, never twice at once.
    """
    if places.jars is not None:
        return _given(places.jars)
    folder = places.cache / f"kafka-{KAFKA_VERSION}"
    await asyncio.to_thread(complete, folder, read_lock(), places.maven, progress)
    return folder


def _given(folder: Path) -> Path:
    """A folder of jars, or an unpacked Kafka, which has them in `libs`."""
    for candidate in (folder, folder / "libs"):
        if any(candidate.glob("kafka-server-[0-9]*.jar")):
            return candidate
    raise JarsError(
        f"KLATCH_KAFKA_JARS names {folder}, where no kafka-server-*.jar is. Name the folder of an "
        "unpacked Kafka 4 or its libs folder, or unset it: klatch then fetches the jars itself."
    )


def complete(folder: Path, lock: Sequence[Jar], maven: str, progress: Progress | None = None) -> None:
    """Make `folder` hold exactly what `lock` says. Blocking."""
    if _marked(folder, lock):
        return
    with locked(folder.with_name(f"{folder.name}.lock")):
        if _marked(folder, lock):  # somebody else was quicker
            return
        folder.mkdir(parents=True, exist_ok=True)
        missing = [jar for jar in lock if not _right(folder / jar.name, jar)]
        if missing:
            _fetch(missing, folder, maven, _Counter(len(lock) - len(missing), len(lock), progress))
        _mark(folder, lock)


def _marked(folder: Path, lock: Sequence[Jar]) -> bool:
    """Whether these very files were verified before: sums need not be taken at every start."""
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        return bool(marker == _fingerprint(folder, lock))
    except (OSError, ValueError):
        return False


def _mark(folder: Path, lock: Sequence[Jar]) -> None:
    fresh = folder / f"{_MARKER}.new"
    fresh.write_text(json.dumps(_fingerprint(folder, lock), indent=1))
    fresh.replace(folder / _MARKER)


def _fingerprint(folder: Path, lock: Sequence[Jar]) -> dict[str, list[object]]:
    stats = {jar: (folder / jar.name).stat() for jar in lock}
    return {jar.name: [jar.sha256, s.st_size, s.st_mtime_ns] for jar, s in stats.items()}


def _right(path: Path, jar: Jar) -> bool:
    return path.is_file() and _sha256(path) == jar.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Counter:
    """Adds up what the threads report."""

    def __init__(self, jars: int, total: int, progress: Progress | None) -> None:
        self._jars, self._total, self._bytes = jars, total, 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, *, jars: int = 0, count: int = 0) -> None:
        with self._lock:
            self._jars += jars
            self._bytes += count
            if self._progress is not None:
                self._progress(Fetched(self._jars, self._total, self._bytes))

    @contextmanager
    def file(self, _name: str, _size: int) -> Generator[Callable[[int], None]]:
        """The shape that jgo calls for each file."""
        yield lambda count: self.add(count=count)


def _fetch(jars: Sequence[Jar], folder: Path, maven: str, counter: _Counter) -> None:
    for left_over in folder.glob("tmp-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix="tmp-", dir=folder) as temporary,
        ThreadPoolExecutor(_THREADS, "kafka-jars") as pool,
    ):
        one = _fetcher(Path(temporary), folder, maven, counter)
        futures = [pool.submit(one, jar) for jar in jars]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetcher(temporary: Path, folder: Path, maven: str, counter: _Counter) -> Callable[[Jar], None]:
    """What fetches one jar through jgo, which is imported only when something is to be fetched."""
    try:
        from jgo.maven import MavenContext, PythonResolver  # noqa: PLC0415
        from requests import RequestException  # noqa: PLC0415
    except ImportError as missing:
        raise JarsError(
            f"Kafka {KAFKA_VERSION} is not in {folder} and jgo, which fetches it, is not installed: "
            f"pip install 'klatch[kafka]'. {_ELSEWHERE}"
        ) from missing
    resolver = PythonResolver(progress_callback=counter.file)

    def attempt(jar: Jar, cache: Path) -> Path:
        context = MavenContext(
            resolver=resolver,
            repo_cache=cache,
            local_repos=[],
            remote_repos={"maven": maven.rstrip("/")},
            timeout=_TIMEOUT,
        )
        component = context.project(jar.group, jar.artifact).at_version(jar.version)
        return component.artifact().resolve()

    def tried(jar: Jar) -> Path:
        failure: Exception | None = None
        for number in range(1, _TRIES + 1):
            # A try that broke off leaves half a jar, which jgo would take for a whole one.
            cache = temporary / f"{jar.name}-{number}"
            try:
                return attempt(jar, cache)
            except (RequestException, RuntimeError) as error:
                failure = error
        raise JarsError(f"{jar} could not be fetched from {maven}: {failure}. {_ELSEWHERE}") from failure

    def one(jar: Jar) -> None:
        _place(tried(jar), jar, folder, maven)
        counter.add(jars=1)

    return one


def _place(path: Path, jar: Jar, folder: Path, maven: str) -> None:
    found = _sha256(path)
    if found != jar.sha256:
        raise JarsError(
            f"{jar} as fetched from {maven} has sha256 {found}, the lock says {jar.sha256}. It was "
            "not used. Something between here and Maven Central changed it: look at the mirror or "
            "proxy, then run this again; or name a folder of trusted jars in KLATCH_KAFKA_JARS."
        )
    path.replace(folder / jar.name)
