"""What checks are given and what they find."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from klatch_schemas.topics import Namespace
from klatch_workers.settings import Settings

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    level: Level
    says: str
    """One sentence."""
    fix: str = ""
    """What to do; empty if there is nothing to do."""


Findings = AsyncIterator[Finding]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server to ask, if anybody said where it is."""

    url: str | None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """The set-up that is examined."""

    settings: Settings
    environment: Mapping[str, str]
    data: Path
    pids: Mapping[str, int]
    """Processes that a `klatch up` wrote down."""
    bootstrap: str
    own_kafka: bool
    """Whether `klatch up` starts Kafka itself here."""
    namespace: Namespace
    door: Endpoint
    model: Endpoint
    memory: Endpoint
    views: Endpoint
