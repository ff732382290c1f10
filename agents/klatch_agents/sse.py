"""Server-sent events out of bytes, as they arrive, in time linear in the bytes.

Any split of a stream gives the same events, a read may hold many of them or a third of one, and
lines may be of any length up to `limit`. Bytes stay bytes: a read can end inside a UTF-8 sequence,
and JSON may hold U+2028, so nothing here decodes text. `retry:` is read and ignored.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import msgspec

_BOM = b"\xef\xbb\xbf"


class Event(msgspec.Struct, frozen=True, gc=False):
    """One dispatched event: its `data:` lines joined by newlines, its `event:` name (or empty),
    and the last `id:` seen up to it, which a client sends back to resume."""

    data: bytes
    name: bytes = b""
    id: bytes = b""


class Comment(msgspec.Struct, frozen=True, gc=False):
    """A line that begins with a colon: no event, yet a sign of life."""

    text: bytes


class TooLargeError(ValueError):
    """One line or event grew past the decoder's limit. The stream cannot be read further."""


class Decoder:
    """Feed it reads; it answers with the events and comments that these completed.

    `limit` bounds the bytes held for one unfinished event. It guards memory against a peer that
    never ends a line, and is far above any real event (300 kB tool calls are seen).
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_data_size",
        "_id",
        "_limit",
        "_line",
        "_line_size",
        "_name",
        "_started",
    )

    def __init__(self, limit: int = 64 * 2**20) -> None:
        self._limit = limit
        self._line: list[bytes] = []  # pieces of the line that has not ended yet
        self._line_size = 0
        self._data: list[bytes] = []  # values of the `data:` lines of the unfinished event
        self._data_size = 0
        self._name = b""
        self._id = b""
        self._after_cr = False
        self._started = False

    def feed(self, read: bytes) -> list[Event | Comment]:
        """What this read completed, in order. Raises TooLargeError past the limit."""
        if b"\r" in read or self._after_cr:
            read = self._newlines(read)
        lines = read.split(b"\n")
        rest = lines.pop()
        out: list[Event | Comment] = []
        if lines:
            if self._line or not self._started:
                lines[0] = self._complete(lines[0])
            data = self._data
            for line in lines:
                if not line:
                    if data:
                        joined = data[0] if len(data) == 1 else b"\n".join(data)
                        out.append(Event(joined, self._name, self._id))
                        data.clear()
                        self._data_size = 0
                    self._name = b""
                elif line[:6] == b"data: ":
                    data.append(line[6:])
                    self._data_size += len(line)
                else:
                    self._field(line, out)
        if rest:
            self._line.append(rest)
            self._line_size += len(rest)
        if self._line_size + self._data_size > self._limit:
            raise TooLargeError(
                f"an event of this stream is over {self._limit} bytes and has no end; "
                "raise the decoder's limit if the peer means it"
            )
        return out

    def end(self) -> list[Event | Comment]:
        """What a peer left without its closing blank line when it ended the stream cleanly.

        The standard drops it. Servers exist that end with a bare `data: [DONE]`, and OpenAI's own
        client accepts that; whether the data is whole is for the caller to judge.
        """
        return self.feed(b"\n\n")

    def _newlines(self, read: bytes) -> bytes:
        if self._after_cr and read[:1] == b"\n":  # the rest of a CRLF whose line has ended already
            read = read[1:]
            self._after_cr = False
        if read:
            self._after_cr = read[-1:] == b"\r"
        return read.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _complete(self, last_piece: bytes) -> bytes:
        self._line.append(last_piece)
        line = b"".join(self._line)
        self._line.clear()
        self._line_size = 0
        if not self._started:
            self._started = True
            line = line.removeprefix(_BOM)
        return line

    def _field(self, line: bytes, out: list[Event | Comment]) -> None:
        name, colon, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if colon and not name:
            out.append(Comment(value))
        elif name == b"data":
            self._data.append(value)
            self._data_size += len(line)
        elif name == b"event":
            self._name = value
        elif name == b"id" and b"\0" not in value:
            self._id = value
