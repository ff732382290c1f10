"""Lines of a file or of stdin, as they come, without holding up the event loop.

A thread reads; it is a daemon, since one that waits for input would otherwise keep the process from ending.
"""

import asyncio
import io
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from typing import Final

from klatch_workers.cli.publishing import Line

_READ_BYTES: Final = 1 << 16
_READS_AHEAD: Final = 16


async def lines_of(path: str) -> AsyncIterator[Line]:
    """The lines of a file, or of stdin for `-`. Raises OSError."""
    chunks = asyncio.Queue[bytes | OSError](_READS_AHEAD)
    loop = asyncio.get_running_loop()

    def put(chunk: bytes | OSError) -> None:
        asyncio.run_coroutine_threadsafe(chunks.put(chunk), loop).result()

    def read() -> None:
        try:
            with _opened(path) as file:
                # As much as there is: a producer at the other end of a pipe must not wait for a full buffer.
                while chunk := file.read(_READ_BYTES):
                    put(chunk)
            put(b"")
        except OSError as error:
            put(error)
        except (CancelledError, RuntimeError):
            return  # nobody reads any more

    threading.Thread(target=read, name="input", daemon=True).start()
    number, rest = 0, b""
    while chunk := await chunks.get():
        if isinstance(chunk, OSError):
            raise chunk
        *lines, rest = (rest + chunk).split(b"\n")
        for text in lines:
            number += 1
            yield Line(number, text)
    if rest:
        yield Line(number + 1, rest)


def _opened(path: str) -> io.FileIO:
    return io.FileIO(sys.stdin.fileno(), closefd=False) if path == "-" else io.FileIO(path)
