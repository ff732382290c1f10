"""How a baseline's worker says that it serves."""

import json


def say_ready() -> None:
    """The line that its supervisor waits for."""
    print(json.dumps({"event": "ready"}), flush=True)  # noqa: T201 - that is its output
