"""Keys of model servers: known by name, had when a call needs them, shown to nobody.

    [keys]
    openai = "sk-…"
    azure-east = { file = "/run/secrets/azure-east" }
    azure-west = { env = "AZURE_WEST_KEY" }
    entra = { command = ["az", "account", "get-access-token", "--query", "accessToken", "-o", "tsv",
              "--resource", "https://cognitiveservices.azure.com"], every_s = 1800 }

The file is read again when it changes, and so is one that it names; a command is run again after `every_s`. So a key
or a token that is renewed needs no restart. Reading happens in the event loop: these are small local files.
"""

import asyncio
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from klatch_agents.gateway.errors import MisconfiguredError
from klatch_schemas.codec import explain
from klatch_schemas.ids import NameField
from klatch_workers.settings import environment_variable

_COMMAND_PATIENCE_S = 30.0


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


class ModelKeys:
    """The keys that a keys file names; `path` None: there are none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._read: tuple[float, _Keys] | None = None
        self._made: dict[_Command, tuple[float, str]] = {}
        self._making = asyncio.Lock()

    def named(self, name: str) -> Callable[[], Awaitable[str]]:
        """What gives the key of that name, whenever it is needed. Raises MisconfiguredError."""

        async def key() -> str:
            return await self._key(name)

        return key

    def check(self) -> None:
        """Read the file now. Raises MisconfiguredError for one that cannot be used."""
        if self._path is not None:
            self._file(self._path)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of some names that the file does not have. Raises MisconfiguredError."""
        there = self._file(self._path).keys if self._path is not None else {}
        return [name for name in names if name not in there]

    async def _key(self, name: str) -> str:
        if self._path is None:
            raise MisconfiguredError(f"the route names the key {name!r}: set KLATCH_KEYS_FILE to a file that has it")
        source = self._file(self._path).keys.get(name)
        match source:
            case None:
                raise MisconfiguredError(f"{self._path} has no key {name!r}: add it under [keys]")
            case SecretStr():
                return source.get_secret_value()
            case _File():
                return _content(source.file, name)
            case _Environment():
                return _variable(source.env, name)
            case _Command():
                return await self._output(source, name)

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

    async def _output(self, source: _Command, name: str) -> str:
        async with self._making:
            made = self._made.get(source)
            if made is None or time.monotonic() - made[0] >= source.every_s:
                made = self._made[source] = time.monotonic(), await _run(source.command, name)
            return made[1]


def _content(path: Path, name: str) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfiguredError(f"the key {name!r} cannot be read from {path}: {type(error).__name__}") from None


def _variable(variable: str, name: str) -> str:
    value = environment_variable(variable)
    if not value:
        raise MisconfiguredError(f"the key {name!r} is to be found in ${variable}, which is not set")
    return value.strip()


async def _run(command: tuple[str, ...], name: str) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        raise MisconfiguredError(f"the command that makes the key {name!r} cannot be run: {error.strerror}") from None
    try:
        async with asyncio.timeout(_COMMAND_PATIENCE_S):
            said, _ = await process.communicate()
    except TimeoutError:
        raise MisconfiguredError(
            f"the command that makes the key {name!r} took over {_COMMAND_PATIENCE_S:g} s"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode or not said.strip():
        raise MisconfiguredError(f"the command that makes the key {name!r} ended with {process.returncode}")
    return said.decode("utf-8", "replace").strip()
