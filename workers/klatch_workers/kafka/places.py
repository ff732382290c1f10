"""Where jars come from and where they are kept: the environment, read in one place.

`KLATCH_CACHE` moves the cache, `KLATCH_KAFKA_JARS` names a folder of jars to use as it is, and
`KLATCH_MAVEN_URL` a mirror of Maven Central.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MAVEN_CENTRAL = "https://repo.maven.apache.org/maven2"


@dataclass(frozen=True, slots=True)
class Places:
    cache: Path
    jars: Path | None = None  # used as they are: not fetched, not checked
    maven: str = MAVEN_CENTRAL

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self:
        cache = environ.get("KLATCH_CACHE")
        jars = environ.get("KLATCH_KAFKA_JARS")
        return cls(
            cache=Path(cache) if cache else user_cache(environ),
            jars=Path(jars) if jars else None,
            maven=environ.get("KLATCH_MAVEN_URL") or MAVEN_CENTRAL,
        )


def user_cache(environ: Mapping[str, str], platform: str = sys.platform) -> Path:
    """The platform's folder for what can be fetched again."""
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "klatch"
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klatch"
