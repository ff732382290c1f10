"""structlog without rich, which it would import for tracebacks that klatch never shows.

Importing rich costs each process 0.2 s of CPU, a third of what a stage's imports take, wherever something else has
installed it (tokenizers does, by way of typer). Only the import of structlog is kept from it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import cast


def import_structlog() -> None:
    """Import structlog; to it, rich is not installed. What has imported either before keeps it."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    if "rich" in modules:
        return
    modules["rich"] = None
    try:
        import_module("structlog")
    finally:
        del modules["rich"]
