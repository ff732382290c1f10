"""Keys that `klatch up` makes for itself, kept in the data folder for the next time, readable by its owner alone."""

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Keys:
    """Three secrets of one data folder."""

    api: str
    """The local tenant's API key."""
    internal: str
    """By which klatch's own processes know each other."""
    model: str
    """The local model server's."""

    def __repr__(self) -> str:
        return "Keys(…)"


def load_keys(data: Path) -> Keys:
    """The keys of a data folder, made when it has none."""
    path = data / "keys.json"
    if path.exists():
        return Keys(**json.loads(path.read_text()))
    keys = Keys(api=f"klatch-{_secret()}", internal=_secret(), model=_secret())
    write_private(path, json.dumps(asdict(keys)))
    return keys


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, all of it or nothing."""
    fresh = path.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.chmod(0o600)
    fresh.write_text(text)
    fresh.replace(path)


def _secret() -> str:
    return secrets.token_urlsafe(24)
