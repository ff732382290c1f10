"""The SSE decoder: the rules of the standard, and its laws under any split of the bytes.

Numbers in brackets are the traps of `STREAMING.md` that a test guards.
"""

import json
from itertools import pairwise
from time import process_time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from klatch_agents.sse import Comment, Decoder, Event, TooLargeError


def decode(stream: bytes, *cuts: int) -> list[Event | Comment]:
    """The stream fed in pieces cut at these places, without what an end would add."""
    decoder = Decoder()
    places = [0, *sorted(cuts), len(stream)]
    return [item for a, b in pairwise(places) for item in decoder.feed(stream[a:b])]


def reference(stream: bytes) -> list[Event | Comment]:
    """The standard's algorithm as it is written there, byte by byte over the whole stream."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    out: list[Event | Comment] = []
    lines: list[bytes] = []
    line, at = b"", 0
    while at < len(stream):
        byte = stream[at : at + 1]
        if byte in (b"\r", b"\n"):
            at += 2 if stream[at : at + 2] == b"\r\n" else 1
            lines.append(line)
            line = b""
        else:
            line, at = line + byte, at + 1
    data, name, last_id = b"", b"", b""
    for line in lines:
        if line == b"":
            if data:
                out.append(Event(data[:-1], name, last_id))
            data, name = b"", b""
        elif line.startswith(b":"):
            out.append(Comment(line[2:] if line[1:2] == b" " else line[1:]))
        else:
            field, _, value = line.partition(b":")
            value = value[1:] if value.startswith(b" ") else value
            if field == b"data":
                data += value + b"\n"
            elif field == b"event":
                name = value
            elif field == b"id" and b"\0" not in value:
                last_id = value
    return out


FRAGMENTS = st.sampled_from(
    [
        *(b"data: a", b"data:b", b"data", b"data:", b"data:  two", b"datas: no", b"retry: 5"),
        *(b"event: error", b"id: 3-7", b"id: \0", b": keep-alive", b":"),
        *(b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b"\xef\xbb\xbf", b"\xff"),
        *("data: zoë\u2028 \U0001f600".encode(), b'data: {"a": "\xf0\x9f'),
    ]
)
STREAMS = st.lists(FRAGMENTS | st.binary(max_size=4), max_size=30).map(b"".join)


@given(STREAMS)
@example(b"\xef\xbb\xbfdata: a\n\n")
@example(b"\n\xef\xbb\xbfdata: a\n\n")
def test_it_reads_what_the_standard_reads(stream: bytes) -> None:
    assert decode(stream) == reference(stream)


@given(STREAMS, st.lists(st.integers(min_value=0, max_value=120), max_size=12))
@example(b"data: a\r\ndata: b\r\n\r\n", [8])
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2])
def test_any_split_of_the_bytes_gives_the_same_events(stream: bytes, cuts: list[int]) -> None:
    """[1, 2] One TCP read is neither one event nor whole characters."""
    cuts = [min(cut, len(stream)) for cut in cuts]
    assert decode(stream, *cuts) == decode(stream)


@given(STREAMS)
def test_a_stream_fed_byte_by_byte_gives_the_same_events(stream: bytes) -> None:
    assert decode(stream, *range(len(stream))) == decode(stream)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_every_line_ending_of_the_standard_ends_a_line(newline: bytes) -> None:
    """[1]"""
    stream = newline.join([b"data: 1", b"data:2", b"", b"event: x", b"data: 3", b"", b""])
    assert decode(stream) == [Event(b"1\n2"), Event(b"3", b"x")]


def test_an_event_is_given_out_at_its_blank_line_without_waiting_for_more() -> None:
    decoder = Decoder()
    assert decoder.feed(b"data: a\r\n\r") == [Event(b"a")]
    assert decoder.feed(b"\ndata: b\r\n\r\n") == [Event(b"b")]


def test_comments_are_seen_where_they_stand_and_are_no_events() -> None:
    """[3]"""
    stream = b": OPENROUTER PROCESSING\n\ndata: a\n:keep-alive\n\n"
    assert decode(stream) == [
        Comment(b"OPENROUTER PROCESSING"),
        Comment(b"keep-alive"),
        Event(b"a"),
    ]


def test_line_separators_of_unicode_do_not_end_a_line() -> None:
    """[2]"""
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix"
    data = json.dumps(text, ensure_ascii=False).encode()
    assert decode(b"data: " + data + b"\n\n") == [Event(data)]


def test_an_event_keeps_the_last_id_so_that_a_reader_can_resume() -> None:
    stream = b"id: 0-1\ndata: a\n\ndata: b\n\nid: 0-2\ndata: c\n\n"
    assert [e.id for e in decode(stream) if isinstance(e, Event)] == [b"0-1", b"0-1", b"0-2"]


def test_an_end_without_a_blank_line_still_gives_the_last_event() -> None:
    """[36] Some servers end with a bare `data: [DONE]`."""
    decoder = Decoder()
    assert decoder.feed(b"data: a\n\ndata: [DONE]") == [Event(b"a")]
    assert decoder.end() == [Event(b"[DONE]")]
    assert Decoder().end() == []


def test_an_event_of_300_kb_passes_whole() -> None:
    """[5]"""
    data = b"x" * 300_000
    stream = b"data: " + data + b"\n\n"
    assert decode(stream, *range(0, len(stream), 65_536)) == [Event(data)]


def test_a_peer_that_never_ends_its_event_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(TooLargeError, match="over 1000 bytes"):
        _feed_all(Decoder(limit=1000), [b"data: "] + [b"x" * 100] * 11)
    with pytest.raises(TooLargeError):
        _feed_all(Decoder(limit=1000), [b"data:\n"] * 1001)
    _feed_all(Decoder(limit=1000), [b"data: " + b"x" * 100 + b"\n\n"] * 100)


def test_a_long_event_in_small_reads_costs_time_in_proportion_to_its_length() -> None:
    """[6] A decoder that scans its tail again at every read takes 16 times as long, not 4."""
    short, long = (min(_seconds(size) for _ in range(3)) for size in (60_000, 240_000))
    assert long < 10 * short


def _seconds(size: int) -> float:
    pieces = [b"data: "] + [b"xy"] * (size // 2) + [b"\n\n"]
    started = process_time()
    _feed_all(Decoder(), pieces)
    return process_time() - started


def _feed_all(decoder: Decoder, reads: list[bytes]) -> None:
    for read in reads:
        decoder.feed(read)
