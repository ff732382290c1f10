"""Settings: the environment, read once, at the start of a process.

Every name begins with `KLATCH_`; one that is not a setting is an error that names the nearest, so that a misspelt
setting is found when the process starts and not when it matters. Command line options go over the environment.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from klatch_agents.gateway.continuing import Continues
from klatch_schemas.codec import explain
from klatch_workers.nearest import did_you_mean

PREFIX = "KLATCH_"
LEVELS = ("debug", "info", "warning", "error", "critical")


def host_port(listen: str) -> tuple[str, int]:
    """`"127.0.0.1:8080"` as a pair; raises ValueError with the form that is wanted."""
    host, colon, port = listen.rpartition(":")
    if "/" in host or not (colon and port.isascii() and port.isdigit() and int(port) < 65_536):
        raise ValueError(f"{listen!r} is not of the form HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def _listen(address: str) -> str:
    host_port(address)
    return address


def _door(address: str) -> str:
    # What is wrong is told without it: a password may stand in it.
    wanted = "a door is named by HOST:PORT or by a URL, such as https://klatch.example or http://127.0.0.1:8080/v1"
    try:
        if "://" not in address:
            host_port(address)
            return address
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise ValueError(wanted) from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(wanted)
    if "@" in parts.netloc:
        raise ValueError(f"{wanted}; its key is KLATCH_API_KEY")
    return address


def _level(said: str) -> str:
    if said.lower() not in LEVELS:
        raise ValueError(f"KLATCH_LOG_LEVEL is one of {', '.join(LEVELS)}")
    return said.lower()


Listen = Annotated[str, AfterValidator(_listen)]
"""HOST:PORT."""
Door = Annotated[str, AfterValidator(_door)]
"""HOST:PORT or a URL, with or without `/v1`."""


class UnknownSetting(ValueError):
    """A `KLATCH_` variable that no setting has."""


class Settings(BaseModel):
    """What a process of klatch can be told. `KLATCH_MODEL_URL` sets `model_url`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kafka: str = "127.0.0.1:9092"
    """Bootstrap servers of the Kafka cluster, `host:port[,host:port…]`."""
    namespace: str = ""
    """Prefix of all topics and groups: `test` makes `test.chat.requests`."""
    http: Listen = "127.0.0.1:8080"
    """Where the HTTP door listens."""
    data: Annotated[Path, AfterValidator(Path.expanduser)] = Path("~/.local/share/klatch").expanduser()
    """Klatch's data folder: the embedded Kafka's log, the vector index, generated keys."""
    cache: Path | None = None
    """Where downloaded jars are kept; None: the platform's cache folder."""
    maven_url: str | None = None
    """A mirror of Maven Central to download the jars from."""
    kafka_jars: Path | None = None
    """A folder of Kafka's jars to use instead of downloading them."""

    model_url: str | None = None
    """An OpenAI-compatible server, with its `/v1`; None: the local model, where there is one."""
    model: str | None = None
    """Asked of that server instead of each request's own model name; models with a route go by their route."""
    model_key: SecretStr | None = None
    model_continues: Continues = "none"
    """How the model server goes on with an answer that broke off: `vllm`, `prefill` (llama.cpp) or `none`."""
    keys_file: Path | None = None
    """A TOML file of the keys that routes of the `models` ledger name."""
    local_gguf: Path | None = None
    """A GGUF file for the local model instead of the one from the package."""

    trust_policy: Path | None = None
    """The trust policy; None: the one that comes with klatch."""
    embedder: str = "minilm"
    """`minilm` (ONNX, no torch), `sentence-transformers:NAME`, or the URL of an OpenAI-compatible server."""
    embedder_model: str | None = None
    """The model to ask an embeddings server for."""
    embedder_dimension: int | None = None
    """The length of its vectors."""
    embedder_key: SecretStr | None = None
    qdrant_url: str | None = None
    """A Qdrant server; None: Qdrant's engine inside the memory worker, with its data in `data`."""
    qdrant_key: SecretStr | None = None
    memory: Listen = "127.0.0.1:8081"
    """Where the memory worker listens, for the other workers of this machine."""
    memory_url: str | None = None
    """Where to ask the memory worker; None: no recall, and no embeddings at the door."""
    views: Listen = "127.0.0.1:8082"
    """Where the views worker listens."""
    views_url: str | None = None
    """Where `klatch top` asks."""
    internal_key: SecretStr | None = None
    """Shared by klatch's own processes; without it, the memory and views workers answer nobody."""

    instance: str | None = None
    """A name for this process that is its own and stays: a restart gets its partitions back at once, not after the
    group's session time-out (Kafka's static membership). Two processes of one name throw each other out."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 512
    """Requests that have their turn at once, per partition; of one tenant half of them, so that others find room."""
    verdict_patience_s: Annotated[float, Field(gt=0)] = 300.0
    """How long a request whose turn it is waits for trust's verdict before it ends `failed` (`unavailable`)."""
    drain_s: Annotated[float, Field(ge=0)] = 10.0
    """How long work in flight may go on after a stop or a rebalance."""
    idempotency_s: Annotated[float, Field(ge=60)] = 90_000.0
    """How far back a door looks at once for the stream of an `Idempotency-Key` that it does not remember: by default
    25 hours, for which admission may know a key. To look is to read the conversation's partition over this time, so on
    a busy cluster it should be what clients retry within: an older stream is found once its repeat stays silent."""
    log_level: Annotated[str, AfterValidator(_level)] = "info"

    tenant: str | None = None
    """Whom a client command such as `klatch publish` speaks for; None: the tenant of a running `klatch up`."""
    api_key: SecretStr | None = None
    """What a client command says at the HTTP door; None: the key of a running `klatch up`."""


class ClientSettings(Settings):
    """The same for a command that asks klatch: it may be behind a URL of its own."""

    http: Door = "127.0.0.1:8080"


def read_settings(
    environment: Mapping[str, str] = os.environ, *, of: type[Settings] = Settings, **options: Any
) -> Settings:
    """The settings of this process; options that are None are left to the environment.

    Raises UnknownSetting, and pydantic's ValidationError for a value of the wrong form.
    """
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    told: dict[str, Any] = {}
    for variable in sorted(environment):
        if variable.startswith(PREFIX):
            if variable not in known:
                hint = did_you_mean(variable, known)
                raise UnknownSetting(f"{variable} is not a setting of klatch{hint and f'; {hint}'}")
            told[known[variable]] = environment[variable]
    return of(**told | {name: value for name, value in options.items() if value is not None})


def what_is_wrong(error: ValueError) -> str:
    """What `read_settings` raised, as one line."""
    return explain(error) if isinstance(error, ValidationError) else str(error)


def environment_variable(name: str) -> str | None:
    """A variable that some file names, such as the keys file: the environment is read here and nowhere else."""
    return os.environ.get(name)
