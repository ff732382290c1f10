"""What client commands share: where klatch is, whose requests these are, and how an outcome becomes an exit code.

A running `klatch up` says where it is in `<data>/run.json`, so that commands beside it need no options; options, then
the environment, win over it. Who names another Kafka means another klatch, of which `run.json` says nothing; who names
another namespace, one behind another door. Its keys are for its own servers and are sent to no other. Nothing here
imports more than the bare install has.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import click
from pydantic import SecretStr

from klatch_schemas.ids import Tenant
from klatch_schemas.topics import Namespace
from klatch_streams.log import Log, LogError
from klatch_workers.logs import configure_logs
from klatch_workers.settings import ClientSettings, Settings, read_settings, what_is_wrong

FAILED: Final = 1
MISUSED: Final = 2
UNREACHABLE: Final = 3

Command = TypeVar("Command", bound=Callable[..., Any])


class CommandFailed(Exception):
    """The command ends here; the message tells the user what to do."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server of klatch's is, and what to say there."""

    url: str
    key: str


@dataclass(frozen=True)
class Context:
    """Settings, completed by what a running `klatch up` wrote.

    That is read when something is missing; what asks for it raises CommandFailed if it cannot be read.
    """

    settings: Settings

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, /, **options: Any) -> "Context":
        """From options and the environment. Raises CommandFailed."""
        try:
            settings = read_settings(environment, of=ClientSettings, **options)
        except ValueError as error:
            raise CommandFailed(what_is_wrong(error), MISUSED) from error
        configure_logs(settings.log_level if "log_level" in settings.model_fields_set else "warning")
        # It logs every attempt to connect; that none succeeded is said once, in our words.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
        return cls(settings)

    @cached_property
    def run(self) -> Mapping[str, Any]:
        """What a running `klatch up` wrote; empty if another Kafka than its own is named."""
        said = read_run_file(self.settings.data)
        if "kafka" not in self.settings.model_fields_set:
            return said
        return said if _servers(self.settings.kafka) & _servers(str(said.get("bootstrap") or "")) else {}

    def _chosen(self, name: str, written: str) -> Any:
        """An explicit setting, else what `klatch up` wrote, else the setting's default."""
        value = getattr(self.settings, name)
        return value if name in self.settings.model_fields_set else self.run.get(written, value)

    @property
    def bootstrap(self) -> str:
        """Kafka's bootstrap servers."""
        return str(self._chosen("kafka", "bootstrap"))

    @property
    def namespace(self) -> Namespace:
        """The prefix of topics and groups."""
        return Namespace.named(str(self._chosen("namespace", "namespace")))

    @property
    def tenant(self) -> Tenant | None:
        """Whom the command speaks for, if anybody said."""
        named = self._chosen("tenant", "tenant")
        return Tenant(str(named)) if named else None

    @cached_property
    def _beside(self) -> Mapping[str, Any]:
        """What a running `klatch up` wrote, of its servers: they know no namespace but its own."""
        named = "namespace" in self.settings.model_fields_set
        own = Namespace.named(str(self.run.get("namespace") or ""))
        return {} if named and Namespace.named(self.settings.namespace) != own else self.run

    @property
    def door_known(self) -> bool:
        """Whether anybody said where the door is."""
        return "http" in self.settings.model_fields_set or "http" in self._beside

    @property
    def door_url(self) -> str:
        """The base URL of the HTTP door, without `/v1`."""
        named = "http" in self.settings.model_fields_set
        return base_url(self.settings.http if named else str(self._beside.get("http", self.settings.http)))

    @property
    def api_key(self) -> str | None:
        """What to say at the door, if anybody said."""
        return _key_of(self.settings.api_key, self.door_url, self._beside, "http", "api_key")

    @property
    def model_settings(self) -> Settings:
        """The settings, with the model server and the keys file of a running `klatch up` where none is set."""
        url, keys = self._chosen("model_url", "model_url"), self._chosen("keys_file", "keys_file")
        # A model server knows no namespace.
        key = _key_of(self.settings.model_key, str(url or ""), self.run, "model_url", "model_key")
        said = {
            "model_url": url,
            "model_key": SecretStr(key) if key else None,
            "keys_file": Path(keys) if keys else None,
        }
        return self.settings.model_copy(update=said)

    def door(self) -> ServerAddress:
        """The door with its key. Raises CommandFailed when there is no key."""
        return self._with_key(self.door_url, self.api_key, "API key", "KLATCH_API_KEY")

    def views(self) -> ServerAddress:
        """The views worker with its key. Raises CommandFailed when there is no key."""
        url = base_url(str(self.settings.views_url or self._beside.get("views_url") or self.settings.views))
        key = _key_of(self.settings.internal_key, url, self._beside, "views_url", "internal_key")
        return self._with_key(url, key, "internal key", "KLATCH_INTERNAL_KEY")

    def _with_key(self, url: str, key: str | None, what: str, variable: str) -> ServerAddress:
        if key is None:
            named = "kafka" in self.settings.model_fields_set
            of = f", with the Kafka {self.settings.kafka}" if named else ""
            raise CommandFailed(
                f"no {what} for {url}: set {variable}, or name with --data the folder of a running `klatch up`{of} "
                f"that this is a server of ({self.settings.data} has none such)",
                MISUSED,
            )
        return ServerAddress(url, key)


def base_url(said: str) -> str:
    """A URL from what a user, `KLATCH_HTTP` or `run.json` may say: `host:port`, or a URL with or without `/v1`."""
    url = said if "://" in said else f"http://{said}"
    # A door that listens on every address is asked at this machine's own.
    parts = urlsplit(url)
    if parts.hostname == "0.0.0.0":  # noqa: S104 - read, not bound
        url = url.replace("0.0.0.0", "127.0.0.1", 1)  # noqa: S104
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _key_of(given: SecretStr | None, url: str, run: Mapping[str, Any], server: str, key: str) -> str | None:
    """The key for a server: the one that is set, else what `klatch up` wrote, if it wrote of this server."""
    if given:
        return given.get_secret_value()
    own = run.get(server)
    return run.get(key) if own and _same(url, str(own)) else None


def _same(url: str, other: str) -> bool:
    """Whether two URLs name one server."""
    first, second = (urlsplit(base_url(one).replace("://localhost", "://127.0.0.1", 1)) for one in (url, other))
    return (first.scheme, first.netloc) == (second.scheme, second.netloc)


def _servers(bootstrap: str) -> set[str]:
    """Bootstrap servers, so that two lists of one cluster have some in common."""
    return {server.strip().replace("localhost:", "127.0.0.1:") for server in bootstrap.split(",")} - {""}


def read_run_file(data: Path) -> dict[str, Any]:
    """What a running `klatch up` wrote; empty if there is none. Raises CommandFailed."""
    path = data / "run.json"
    try:
        said = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CommandFailed(
            f"cannot read {path}: {error}; start `klatch up` again, remove the file, or name with options (such as "
            "--kafka and --namespace) what it would tell",
            MISUSED,
        ) from error
    return cast("dict[str, Any]", said) if isinstance(said, dict) else {}


@asynccontextmanager
async def opened_log(context: Context, *, patience_s: float = 5.0) -> AsyncGenerator[Log]:
    """The log that the command works on. Raises Unreachable."""
    from klatch_streams.kafka.options import KafkaOptions
    from klatch_streams.kafka_log import KafkaLog

    log = await KafkaLog.open(KafkaOptions(context.bootstrap, client_id="klatch-cli", startup_s=patience_s))
    try:
        yield log
    finally:
        await log.close()


def perform(work: Callable[[], Coroutine[Any, Any, int]], *, as_json: bool, interrupted: int = FAILED) -> None:
    """Run a command's work and end the process with its exit code; `interrupted` is that of Ctrl-C."""
    with outcomes(as_json=as_json, interrupted=interrupted):
        sys.exit(asyncio.run(work()))


@contextmanager
def outcomes(*, as_json: bool, interrupted: int = FAILED) -> Generator[None]:
    """Turn what a command raises into one plain sentence and an exit code."""
    try:
        yield
    except CommandFailed as error:
        _end(str(error), error.exit_code, as_json)
    except LogError as error:
        _end(str(error), UNREACHABLE if _unreachable(error) else FAILED, as_json)
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except BrokenPipeError:
        # Whoever read our output has had enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _unreachable(error: LogError) -> bool:
    from klatch_streams.kafka.wire import Unreachable

    return isinstance(error, Unreachable)


def _end(message: str, exit_code: int, as_json: bool) -> None:
    if as_json:
        say_json({"error": message})
    else:
        click.echo(f"{click.style('Error:', fg='red')} {message}", err=True)
    sys.exit(exit_code)


def say_json(fields: Mapping[str, Any]) -> None:
    """One object on a line of its own, at once."""
    click.echo(json.dumps(fields, ensure_ascii=False))


def shared_options(command: Command) -> Command:
    """`--data` and `--json`."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object a line."),
        click.option(
            "--data",
            type=click.Path(file_okay=False, path_type=Path),
            help="Data folder of a running `klatch up`.  [KLATCH_DATA]",
        ),
    ):
        command = option(command)
    return command


def kafka_options(command: Command) -> Command:
    """`--kafka` and `--namespace`."""
    for option in (
        click.option("--namespace", metavar="NAME", help="Prefix of all topics.  [KLATCH_NAMESPACE]"),
        click.option("--kafka", metavar="HOST:PORT", help="Bootstrap servers.  [KLATCH_KAFKA]"),
    ):
        command = option(command)
    return command


def log_options(command: Command) -> Command:
    """All options of a command that works on the log alone: `kafka_options` and `shared_options`."""
    return kafka_options(shared_options(command))


def door_options(command: Command) -> Command:
    """`--http` and `--api-key`."""
    for option in (
        click.option("--api-key", metavar="KEY", help="Better set KLATCH_API_KEY: others see options."),
        click.option("--http", metavar="URL", help="The HTTP door.  [KLATCH_HTTP]"),
    ):
        command = option(command)
    return command
