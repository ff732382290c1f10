"""Kafka's jars are fetched once, are what the lock says, and are never asked for again."""

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from klatch_workers.kafka import Fetched, JarsError, JavaNotFoundError, Places, ensure_jars
from klatch_workers.kafka.jars import KAFKA_VERSION, Jar, complete, read_lock
from klatch_workers.kafka.java import checked, parse_major, system_java

NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


@dataclass
class Maven:
    """A small Maven repository over HTTP: `files` by path.

    The first `broken_off` answers for each path stop half way.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    asked: Counter[str] = field(default_factory=Counter[str])
    broken_off: int = 0

    def add(self, artifact: str, content: bytes) -> Jar:
        self.files[f"/org/example/{artifact}/1.0/{artifact}-1.0.jar"] = content
        return Jar("org.example", artifact, "1.0", hashlib.sha256(content).hexdigest())

    @property
    def jars_served(self) -> int:
        return sum(count for path, count in self.asked.items() if path.endswith(".jar"))


@pytest.fixture
def maven() -> Iterator[Maven]:
    repository = Maven()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository.asked[self.path] += 1
            content = repository.files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if content is not None and repository.asked[self.path] <= repository.broken_off:
                content = content[: len(content) // 2]
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        repository.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield repository
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def lock(maven: Maven) -> list[Jar]:
    return [maven.add("one", b"1" * 100_000), maven.add("two", b"2" * 50_000)]


def test_the_lock_names_each_jar_once_with_its_sum() -> None:
    lock = read_lock()
    assert len(lock) == 45
    assert len({jar.name for jar in lock}) == 45
    assert all(re.fullmatch("[0-9a-f]{64}", jar.sha256) for jar in lock)
    kafka = {jar.version for jar in lock if jar.group == "org.apache.kafka"}
    assert kafka == {KAFKA_VERSION}


def test_jars_are_fetched_once_and_not_again_offline(tmp_path: Path, maven: Maven, lock: list[Jar]) -> None:
    seen: list[Fetched] = []
    complete(tmp_path / "jars", lock, maven.url, seen.append)
    assert (tmp_path / "jars" / "one-1.0.jar").read_bytes() == b"1" * 100_000
    assert seen[-1] == Fetched(jars=2, total=2, bytes=150_000)
    complete(tmp_path / "jars", lock, NOWHERE)
    assert maven.jars_served == 2


def test_a_cache_that_was_copied_is_verified_and_used_offline(tmp_path: Path, maven: Maven, lock: list[Jar]) -> None:
    complete(tmp_path / "jars", lock, maven.url)
    os.utime(tmp_path / "jars" / "one-1.0.jar", (0, 0))
    complete(tmp_path / "jars", lock, NOWHERE)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_jar_is_fetched_again_alone(damage: str, tmp_path: Path, maven: Maven, lock: list[Jar]) -> None:
    complete(tmp_path / "jars", lock, maven.url)
    jar = tmp_path / "jars" / "two-1.0.jar"
    if damage == "changed":
        jar.write_bytes(b"3" * 50_000)
    else:
        jar.unlink()
    complete(tmp_path / "jars", lock, maven.url)
    assert jar.read_bytes() == b"2" * 50_000
    assert maven.jars_served == 3


def test_a_jar_with_another_sum_is_named_and_not_kept(tmp_path: Path, maven: Maven, lock: list[Jar]) -> None:
    maven.add("two", b"evil")
    with pytest.raises(JarsError, match=r"org\.example:two:1\.0 .*the lock says .*KLATCH_KAFKA_JARS"):
        complete(tmp_path / "jars", lock, maven.url)
    assert not (tmp_path / "jars" / "two-1.0.jar").exists()
    maven.add("two", b"2" * 50_000)
    complete(tmp_path / "jars", lock, maven.url)


def test_a_download_that_breaks_off_is_tried_again(tmp_path: Path, maven: Maven, lock: list[Jar]) -> None:
    maven.broken_off = 1
    complete(tmp_path / "jars", lock, maven.url)
    assert (tmp_path / "jars" / "one-1.0.jar").read_bytes() == b"1" * 100_000


def test_without_a_network_the_error_says_what_else_would_do(tmp_path: Path, lock: list[Jar]) -> None:
    with pytest.raises(JarsError, match=r"KLATCH_MAVEN_URL.*KLATCH_KAFKA_JARS"):
        complete(tmp_path / "jars", lock, NOWHERE)


def test_many_who_ask_at_once_fetch_each_jar_once(tmp_path: Path, maven: Maven, lock: list[Jar]) -> None:
    def ask(_number: int) -> None:
        complete(tmp_path / "jars", lock, maven.url)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert maven.jars_served == 2


async def test_a_folder_of_jars_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka-server-4.4.0.jar").touch()
    assert await ensure_jars(Places(tmp_path, jars=tmp_path)) == tmp_path / "libs"
    with pytest.raises(JarsError, match="unset it"):
        await ensure_jars(Places(tmp_path, jars=tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("said", "major"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_402"', 8),
        ('openjdk version "25" 2025-09-16', 25),
        ("command not found", None),
    ],
)
def test_the_version_of_a_java_is_read(said: str, major: int | None) -> None:
    assert parse_major(said) == major


def test_a_java_that_is_too_old_is_refused_with_what_to_install(tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("""#!/bin/sh\necho 'java version "1.8.0_402"' >&2\n""")
    java.chmod(0o755)
    with pytest.raises(JavaNotFoundError, match=r"is Java 8.*pip install 'klatch\[kafka\]'"):
        checked(java)


async def test_without_a_java_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaNotFoundError, match=r"pip install 'klatch\[kafka\]'"):
        await system_java()


async def test_a_java_in_path_serves_when_it_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("""#!/bin/sh\necho 'openjdk version "17.0.15" 2025-04-15' >&2\n""")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = await system_java()
    assert (found.path, found.major) == (java, 17)
