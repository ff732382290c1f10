"""Keys of model servers: known by name, had when a call needs them, shown to nobody.

    [keys]
    openai = "sk-…"
    azure-east = { file = "/run/secrets/azure-east" }
    azure-west = { env = "AZURE_WEST_KEY" }
    entra = { command = ["az", "account", "get-access-token", "--query", "accessToken", "-o", "tsv",
              "--resource", "https://cognitiveservices.azure.com"], every_s = 120 }

The file is read again when it changes, and so is one that it names; a command is run again after `every_s`, or when its
token is refused, once for all who wait for it. So a key or a token that is renewed needs no restart. While its command
fails or hangs, a token is used for another `every_s`. Reading happens in the event loop: these are small local files.
"""

import asyncio
import os
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from klatch_agents.gateway.errors import MisconfiguredError
from klatch_agents.gateway.port import KeyOf
from klatch_schemas.codec import explain
from klatch_schemas.ids import NameField
from klatch_workers.settings import environment_variable

log = structlog.get_logger(__name__)

_COMMAND_PATIENCE_S = 30.0
_REST_S = 10.0
"""How long a command is left alone that failed, or whose new token is refused: each call would wait for it again."""
_RENEWAL_S = 1.0
"""How long a command may run before calls go on with the token that they have."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path


class _Environment(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Annotated[tuple[str, ...], Field(min_length=1)]
    every_s: Annotated[float, Field(gt=0)] = 600.0


_Source = SecretStr | _File | _Environment | _Command


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: dict[NameField, _Source]


class _Token:
    """What a command makes: kept while it is fresh, made by one run at a time, used on for a while if that fails."""

    def __init__(self, source: _Command, name: str, clock: Callable[[], float], renewal_s: float) -> None:
        self._source = source
        self._name = name
        self._clock = clock
        self._renewal_s = renewal_s
        self._made: tuple[float, str] | None = None
        self._failed: tuple[float, MisconfiguredError] | None = None
        self._running: asyncio.Task[str] | None = None
        self._begun = 0.0

    async def current(self, refused: str) -> str:
        """The token, if it can be had not the one that was refused. Raises MisconfiguredError."""
        now = self._clock()
        stale = self._made is not None and refused == self._made[1] and now - self._made[0] >= _REST_S
        if self._made and now - self._made[0] < self._source.every_s and not stale:
            return self._made[1]
        if self._failed and now - self._failed[0] < _REST_S:
            return self._instead(now, self._failed[1])
        if self._running is None:
            self._running, self._begun = asyncio.create_task(self._renew(), name="model-key"), now
            # Everybody may have left by the time it fails.
            self._running.add_done_callback(lambda run: run.cancelled() or run.exception())
        running, held = self._running, self._held(now)
        if held is not None and not stale:
            await asyncio.wait({running}, timeout=max(0.0, self._begun + self._renewal_s - now))
            if not running.done():
                return held
        # Who leaves takes nothing from the others who wait.
        return await asyncio.shield(running)

    async def _renew(self) -> str:
        try:
            made = _sendable(await _run(self._source.command, self._name), self._name)
        except MisconfiguredError as error:
            now = self._clock()
            self._failed = now, error
            log.warning("model_key.not_renewed", key=self._name, error=error.message, had_one=self._made is not None)
            return self._instead(now, error)
        else:
            self._made, self._failed = (self._clock(), made), None
            return made
        finally:
            self._running = None

    def _instead(self, now: float, error: MisconfiguredError) -> str:
        held = self._held(now)
        if held is None:
            raise MisconfiguredError(error.message)
        return held

    def _held(self, now: float) -> str | None:
        """The last token, if it may be used still."""
        return self._made[1] if self._made and now - self._made[0] < 2 * self._source.every_s else None


class ModelKeys:
    """The keys that a keys file names; `path` None: there are none.

    After `renewal_s` of a command, calls go on with its last token.
    """

    def __init__(
        self, path: Path | None, clock: Callable[[], float] = time.monotonic, *, renewal_s: float = _RENEWAL_S
    ) -> None:
        self._path = path
        self._clock = clock
        self._renewal_s = renewal_s
        self._read: tuple[float, _Keys] | None = None
        self._tokens: dict[_Command, _Token] = {}

    def named(self, name: str) -> KeyOf:
        """What gives the key of that name, whenever it is needed. Raises MisconfiguredError."""

        async def key(refused: str = "") -> str:
            return await self._key(name, refused)

        return key

    def check(self) -> None:
        """Read the file now. Raises MisconfiguredError for one that cannot be used."""
        if self._path is not None:
            self._file(self._path)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of some names that the file does not have. Raises MisconfiguredError."""
        there = self._file(self._path).keys if self._path is not None else {}
        return [name for name in names if name not in there]

    async def _key(self, name: str, refused: str) -> str:
        if self._path is None:
            raise MisconfiguredError(f"the route names the key {name!r}: set KLATCH_KEYS_FILE to a file that has it")
        source = self._file(self._path).keys.get(name)
        match source:
            case None:
                raise MisconfiguredError(f"{self._path} has no key {name!r}: add it under [keys]")
            case SecretStr():
                return _sendable(source.get_secret_value(), name)
            case _File():
                return _sendable(_content(source.file, name), name)
            case _Environment():
                return _sendable(_variable(source.env, name), name)
            case _Command():
                token = self._tokens.setdefault(source, _Token(source, name, self._clock, self._renewal_s))
                return await token.current(refused)

    def _file(self, path: Path) -> _Keys:
        try:
            changed = path.stat().st_mtime
            if self._read is None or self._read[0] != changed:
                self._read = changed, _Keys.model_validate(tomllib.loads(path.read_text()))
        except OSError as error:
            raise MisconfiguredError(f"the keys file {path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise MisconfiguredError(f"the keys file {path}: {explain(error)}") from None
        except ValueError:
            # What is wrong may be quoted, and would be part of a key.
            raise MisconfiguredError(f"the keys file {path} is not TOML") from None
        return self._read[1]


def _content(path: Path, name: str) -> str:
    try:
        content = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfiguredError(f"the key {name!r} cannot be read from {path}: {type(error).__name__}") from None
    if not content:
        raise MisconfiguredError(f"the key {name!r} is to be found in {path}, which is empty")
    return content


def _variable(variable: str, name: str) -> str:
    value = environment_variable(variable)
    if not value or not value.strip():
        raise MisconfiguredError(f"the key {name!r} is to be found in ${variable}, which is not set")
    return value.strip()


def _sendable(key: str, name: str) -> str:
    """The key as a header may hold it, without space around it. Raises MisconfiguredError."""
    key = key.strip()
    if not key.isprintable():
        raise MisconfiguredError(f"the key {name!r} has a line end or another control character in it: no header may")
    return key


async def _run(command: tuple[str, ...], name: str) -> str:
    try:
        process = _started(command)
    except OSError as error:
        raise MisconfiguredError(f"the command that makes the key {name!r} cannot be run: {error.strerror}") from None
    try:
        async with asyncio.timeout(_COMMAND_PATIENCE_S):
            said = await _output(process)
            status = await asyncio.to_thread(process.wait)
    except TimeoutError:
        raise MisconfiguredError(
            f"the command that makes the key {name!r} took over {_COMMAND_PATIENCE_S:g} s"
        ) from None
    finally:
        if process.returncode is None:
            # Not reaped yet, so the number is still its own, and its group's. Who has left that may live on, with
            # the output open: nobody waits for it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.to_thread(process.wait)
    if status or not said.strip():
        raise MisconfiguredError(f"the command that makes the key {name!r} ended with {status}")
    return said.decode("utf-8", "replace").strip()


def _started(command: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    """Not by asyncio: cancelled while it starts a process, it ends that one alone, not what was started by it."""
    return subprocess.Popen(  # noqa: S603 - the operator's own command
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


async def _output(process: "subprocess.Popen[bytes]") -> bytes:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stdout
    )
    with closing(transport):
        return await reader.read()
