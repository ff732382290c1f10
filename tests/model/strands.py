"""One request's stream, as far as it stands in the log, and what every possible reader has been shown of it.

Streams with the same records are the same object, so each is checked once, in whatever states of the world it
stands. A token names the one that stood before it when its model call said it, so a text is of one lineage of
attempts, whole and in order, exactly if each of its tokens names the one that is shown before it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from tests.model.parts import Broken, Parts, Reader

from klatch_schemas.assembly import Assembly, Ended, Heard, Opened, Said, Settled, Spoke, Standing, StreamState
from klatch_schemas.codec import Delta
from klatch_schemas.errors import StreamBroken, Superseded
from klatch_schemas.events import StreamAttempt, StreamCancel, StreamEnd, StreamError

Text = tuple[int, ...]
"""A text, by the offsets of its deltas."""


class Token:
    """What a delta says: a token of `call`, which knew `before` to be the token before it."""

    def __init__(self, call: str, before: "Token | None") -> None:
        self.call, self.before = call, before
        self.count: int = before.count + 1 if before else 1
        """How long the text is that it ends."""


class Reading(NamedTuple):
    """A reader that had read `had` when it resumed (nothing: it is new), and came up to the log's end at `live_at`."""

    had: Text
    live_at: int


class Strand:
    """The records of a request's stream up to one of them."""

    def __init__(self, before: "Strand | None", said: Said | None, token: Token | None, parts: Parts) -> None:
        self.parts = parts
        self.records: tuple[Said, ...] = (*before.records, said) if before and said else ()
        self.tokens: dict[int, Token] = dict(before.tokens) if before else {}
        if token:
            self.tokens[len(self.records) - 1] = token
        self.state: StreamState = StreamState()
        self.heard: Heard = None
        if before and said:
            self.state, self.heard = parts.fold(before.state, said)
        self.standing = _standing(before, self.heard, len(self.records) - 1)
        self.end: StreamEnd | None = (
            self.heard.end if isinstance(self.heard, Ended | Settled) else before.end if before else None
        )
        self.readings: tuple[Reading, ...] = ()
        self.shown: frozenset[Text] = before.shown if before else frozenset({()})
        self.readers_checked = 0
        self._next: dict[object, Strand] = {}
        self._check(before)

    def then(self, key: object, said: Said, token: Token | None = None) -> "Strand":
        """The stream with one record more; `key` names it."""
        found = self._next.get(key)
        if found is None:
            found = self._next[key] = Strand(self, said, token, self.parts)
        return found

    def last(self) -> Token | None:
        """The last token that stands."""
        return self.tokens[self.standing[-1]] if self.standing else None

    def assembly(self) -> Assembly:
        """It as production's deciders are given it."""
        standing = list[Standing]()
        for at in self.standing:
            said = self.records[at]
            assert isinstance(said, Delta)
            standing.append(Standing(at, said.attempt, said.seq, said.chunk))
        return Assembly(self.state, standing, end=self.end)

    # --- what is promised

    def _check(self, before: "Strand | None") -> None:
        told = _as_the_contract_says(self.records)
        if (told.status, told.settled, told.standing) != (self.state.status, self.state.settled, self.standing):
            raise Broken(f"the contract reads {told}, the fold {self.state}, {self.standing}")
        readings = (*(before.readings if before else ()), *(Reading(had, len(self.records)) for had in self.shown))
        alive: dict[object, Reading] = {}
        for reading in readings:
            self.readers_checked += 1
            reader = self.parts.reader(reading.had[-1] if reading.had else None)
            text, ended = self._read(reader, reading, told)
            if text is not None:
                self.shown |= {text}
                if not ended:
                    alive.setdefault((text, reading.had), reading)
        self.readings = tuple(alive.values())

    def _read(self, reader: Reader, reading: Reading, told: "_Told") -> tuple[Text | None, bool]:
        """All that the reader was shown, and whether its end; no text: it was told to begin anew."""
        text, ends = reading.had, list[Ended]()
        try:
            for shown in _hear(reader, self.records, reading.live_at):
                if isinstance(shown, Ended):
                    ends.append(shown)
                else:
                    text = (*text, shown.offset)
        except Superseded:
            if set(reading.had + text) <= set(told.standing):
                raise Broken(f"{reading}: told that its text was superseded, which stands") from None
            return None, False
        except StreamBroken as error:
            raise Broken(f"{reading}: {error}") from error
        self._check_reader(reading, text, ends, told)
        return text, bool(ends)

    def _check_reader(self, reading: Reading, text: Text, ends: list[Ended], told: "_Told") -> None:
        if text != told.standing:
            raise Broken(f"{reading}: was shown {text}, where {told.standing} stands")
        tokens = [self.tokens[at] for at in text]
        if [token.before for token in tokens] != [None, *tokens][: len(tokens)]:
            raise Broken(f"{reading}: was shown a spliced text: {[token.call for token in tokens]}")
        if [(end.status, end.error) for end in ends] != ([(told.status, told.error)] if told.status else []):
            raise Broken(f"{reading}: was told the ends {ends}, where the stream is {told.status or 'open'}")


def _standing(before: Strand | None, heard: Heard, offset: int) -> Text:
    match heard:
        case Opened(mode="restart"):
            return ()
        case Spoke():
            return (*(before.standing if before else ()), offset)
        case _:
            return before.standing if before else ()


def _hear(reader: Reader, records: tuple[Said, ...], live_at: int) -> Iterator[Standing | Ended]:
    for offset, said in enumerate(records):
        if offset == live_at:
            yield from reader.go_live()
        if shown := reader.hear(offset, said):
            yield shown
    if live_at == len(records):
        yield from reader.go_live()


# --- docs/contract.md again, in other words than the fold's ----------------------------------------------------------


class _Told(msgspec.Struct, frozen=True):
    status: str | None
    settled: bool
    standing: Text
    error: StreamError | None = None


def _as_the_contract_says(records: tuple[Said, ...]) -> _Told:
    """What a stream comes to, by positions: openings, then the first of cancel and end, then the text."""
    cancelled = next((at for at, said in enumerate(records) if isinstance(said, StreamCancel)), len(records))
    ended = next((at for at in range(len(records)) if _closes(records, at, cancelled)), len(records))
    closed = min(cancelled, ended)
    status = None if closed == len(records) else "cancelled" if closed == cancelled else _status(records[ended])
    text: list[int] = []
    for at, said in enumerate(records[:closed]):
        opening = _in_force(records, at)
        if isinstance(said, StreamAttempt) and opening is not _in_force(records, at + 1) and said.mode == "restart":
            text = []
        elif isinstance(said, Delta) and opening and (said.attempt, said.writer) == (opening.attempt, opening.writer):
            text.append(at)
    error = _error(records[ended]) if ended < cancelled else None
    return _Told(status, ended < len(records), tuple(text), error)


def _in_force(records: tuple[Said, ...], before: int) -> StreamAttempt | None:
    """The opening that counts at a position: the highest so far, the first of equals."""
    openings = [said for said in records[:before] if isinstance(said, StreamAttempt)]
    return max(openings, key=lambda said: said.attempt, default=None)


def _closes(records: tuple[Said, ...], at: int, cancelled: int) -> bool:
    said = records[at]
    opening = _in_force(records, min(at, cancelled))
    if not isinstance(said, StreamEnd):
        return False
    return said.attempt == 0 if opening is None else (said.attempt, said.writer) == (opening.attempt, opening.writer)


def _status(said: Said) -> str | None:
    return said.status if isinstance(said, StreamEnd) else None


def _error(said: Said) -> StreamError | None:
    return said.error if isinstance(said, StreamEnd) else None
