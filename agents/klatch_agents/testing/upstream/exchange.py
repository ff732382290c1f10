"""One call to the scripted server and its answer: the record of it, and the paced stream."""

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from klatch_agents.testing.upstream.answer import Frame, Json
from klatch_agents.testing.upstream.http import Connection
from klatch_agents.testing.upstream.pace import Wheel
from klatch_agents.testing.upstream.script import Script


class Call(msgspec.Struct):
    """One POST as it was received. Times are seconds since 1970; `ended` is 0 while it is open.

    `outcome` is `left` when the client hung up first, `fault` when the script broke it off.
    `authorization` and `api-key` are not among the headers.
    """

    id: str
    path: str
    headers: dict[str, str]
    body: Json
    started: float
    ended: float = 0.0
    outcome: Literal["open", "finished", "refused", "fault", "left"] = "open"
    frames_sent: int = 0


class Exchange:
    """One call and its answer on one connection."""

    def __init__(self, call: Call, connection: Connection, notify: Callable[[], None]) -> None:
        self.call = call
        self._connection = connection
        self._notify = notify
        self._stream: _Stream | None = None
        self._ids = {"x-request-id": f"req_{call.id}"}
        connection.on_lost = lambda: self._close("left")

    def respond(self, body: bytes) -> None:
        if self.call.outcome == "open":
            self._connection.respond(200, body, self._ids)
            self._close("finished")

    def refuse(self, status: int, message: str, retry_after: str) -> None:
        headers = {**self._ids, **({"retry-after": retry_after} if retry_after else {})}
        refuse(self._connection, status, message, f"status_{status}", headers)
        self._close("refused")

    def filter_prompt(self) -> None:
        """Refuse as Azure's content filter does."""
        error = {
            "message": "The response was filtered due to the prompt triggering our content management policy.",
            "type": None,
            "param": "prompt",
            "code": "content_filter",
            "status": 400,
            "innererror": {
                "code": "ResponsibleAIPolicyViolation",
                "content_filter_result": {"violence": {"filtered": True, "severity": "medium"}},
            },
        }
        self._connection.respond(400, json.dumps({"error": error}).encode(), self._ids)
        self._close("refused")

    def stream(self, wheel: Wheel, frames: Iterable[Frame], script: Script) -> None:
        self._connection.begin_events(self._ids)
        streamed = self._stream = _Stream(self, self._connection, wheel, frames, script)
        self._connection.on_writable = streamed.step
        streamed.step()

    def release(self) -> None:
        """Write what is held, once all before it was due."""
        if self._stream:
            self._stream.release()

    def finish_stream(self, fault: str) -> None:
        """Ends the body as the script says; a stall just never does."""
        self._connection.on_writable = None
        if fault.startswith("stall"):
            return
        self._close("fault" if fault else "finished")
        if fault.startswith("drop"):
            self._connection.drop()
        elif fault == "reset":
            self._connection.reset()
        else:
            self._connection.end()

    def _close(self, outcome: Literal["finished", "refused", "fault", "left"]) -> None:
        if self.call.outcome == "open":
            self.call.outcome = outcome
            self.call.ended = time.time()
        self._connection.on_lost = self._connection.on_writable = None
        self._notify()


class _Stream:
    """The frames of one reply, each written when it is due and the reader takes it."""

    def __init__(
        self,
        exchange: Exchange,
        connection: Connection,
        wheel: Wheel,
        frames: Iterable[Frame],
        script: Script,
    ) -> None:
        self._exchange = exchange
        self._connection = connection
        self._wheel = wheel
        self._frames = iter(frames)
        self._script = script
        self._next = next(self._frames, None)
        self._began = asyncio.get_running_loop().time()
        self._armed = False
        self._released = False

    def release(self) -> None:
        """Hold nothing from now on."""
        self._released = True
        self.step()

    def step(self) -> None:
        """Writes all that is due, then waits for the next, or for a slow reader."""
        elapsed = asyncio.get_running_loop().time() - self._began
        while self._exchange.call.outcome == "open" and self._connection.writable:
            if self._next is None:
                self._exchange.finish_stream(self._script.fault)
                return
            if self._next.due == math.inf:
                if not self._released:
                    return
            elif self._next.due > elapsed:
                self._arm(self._began + self._next.due)
                return
            self._write(self._next.data)
            self._exchange.call.frames_sent += 1
            self._next = next(self._frames, None)

    def _arm(self, when: float) -> None:
        if not self._armed:  # a reader that became ready again must not make a second timer
            self._armed = True
            self._wheel.at(when, self._on_time)

    def _on_time(self) -> None:
        self._armed = False
        self.step()

    def _write(self, data: bytes) -> None:
        size = self._script.split or len(data) or 1
        for at in range(0, len(data), size):
            self._connection.write(data[at : at + size])


def refuse(
    connection: Connection,
    status: int,
    message: str,
    code: str,
    headers: dict[str, str] | None = None,
) -> None:
    error = {"message": message, "type": "upstream_error", "param": None, "code": code}
    connection.respond(status, json.dumps({"error": error}).encode(), headers)
