"""What is read from a chunk beside its bytes. Numbers in brackets are traps of `STREAMING.md`."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klatch_agents.gateway.errors import ErrorBody, RefusedError, StreamError, told_in_a_good_answer
from klatch_agents.gateway.facts import read_chunk, read_error
from klatch_agents.gateway.port import Chunk
from klatch_schemas import codec
from klatch_schemas.codec import Delta

USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def chunk(**members: object) -> Chunk:
    read = read_chunk(json.dumps(members).encode())
    assert isinstance(read, Chunk)
    return read


def delta(**members: object) -> Chunk:
    return chunk(choices=[{"index": 0, "delta": members, "finish_reason": None}])


@pytest.mark.parametrize(
    "members",
    [
        {"content": "a"},
        {"refusal": "I cannot"},
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"function_call": {"name": "f", "arguments": ""}},
        {"audio": {"data": "AAAA"}},
        {"content": [{"type": "text", "text": "a"}]},
        {"annotations": [{"type": "url_citation"}]},
        {"reasoning_details": [{"text": "hm"}]},
        {"thinking": "hm"},
        {"nobody_knows": {"a": 1}},
    ],
)
def test_every_kind_of_answer_speaks(members: dict[str, object]) -> None:
    """[17, 19]"""
    assert delta(**members).speaks
    assert delta(role="assistant", **members).speaks


@pytest.mark.parametrize(
    "members",
    [
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        {},
        {"content": "", "tool_calls": [], "reasoning_content": None},
        {"annotations": []},
        {"role": "assistant", "thinking": "", "vendor": {}, "more": None, "partial": False},
        {"role": "assistant", "content": "", "name": "MM", "type": "text", "id": "m1", "index": 3},
    ],
)
def test_a_role_or_an_empty_delta_does_not_speak(members: dict[str, object]) -> None:
    """[13]"""
    assert not delta(**members).speaks


def test_a_finish_may_come_with_content_and_names_its_choice() -> None:
    """[14, 16]"""
    both = chunk(choices=[{"index": 1, "delta": {"content": "end"}, "finish_reason": "length"}])
    assert both.speaks
    assert both.finishes == ((1, "length"),)
    assert both.choices == (1,)


def test_the_usage_chunk_has_no_choices_and_keeps_its_details() -> None:
    """[24, 28]"""
    details = {"prompt_tokens_details": {"cached_tokens": 5}, "completion_tokens_details": {"reasoning_tokens": 3}}
    read = chunk(choices=[], usage={**USAGE, **details, "vendor": 1})
    assert read.usage_only
    assert not read.speaks
    assert read.usage is not None
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.total_tokens) == (9, 4, 13)
    assert (read.usage.cached_tokens, read.usage.reasoning_tokens) == (5, 3)
    assert json.loads(read.usage.raw)["vendor"] == 1


def test_a_running_total_beside_content_is_no_usage_chunk() -> None:
    """[27]"""
    read = chunk(choices=[{"index": 0, "delta": {"content": "a"}}], usage=USAGE)
    assert read.usage is not None
    assert not read.usage_only


def test_the_first_event_of_azure_is_neither_usage_nor_speech() -> None:
    """[30]"""
    read = chunk(choices=[], created=0, id="", model="", object="", prompt_filter_results=[{"prompt_index": 0}])
    assert (read.usage_only, read.speaks, read.choices, read.finishes) == (False, False, (), ())


@pytest.mark.parametrize("said", [True, False, 12_345_678, "a text", [1, 2]])
@pytest.mark.parametrize("beside", ["x", "id"], ids=["unknown", "known"])
def test_what_is_no_object_is_no_usage_and_stays(said: object, beside: str) -> None:
    """[24]"""
    members: dict[str, object] = {"choices": [], "usage": said, beside: "a"}
    read = chunk(**members)
    assert (read.usage, read.usage_only, json.loads(read.raw)) == (None, False, members)


def test_an_annotation_without_a_delta_is_read() -> None:
    """[31]"""
    read = chunk(choices=[{"index": 0, "finish_reason": None, "content_filter_offsets": {"end_offset": 9}}])
    assert (read.speaks, read.choices) == (False, (0,))


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\ude00"])
def test_a_lone_surrogate_does_not_stop_a_reply(half: bytes) -> None:
    """[17] msgspec refuses what JSON allows; the bytes go on as they are."""
    raw = b'{"choices":[{"index":2,"delta":{"content":"' + half + b'"},"finish_reason":"stop"}]}'
    assert read_chunk(raw) == Chunk(raw, speaks=True, choices=(2,), finishes=((2, "stop"),))


@pytest.mark.parametrize(
    ("raw", "event", "expected"),
    [
        (
            b'{"error":{"message":"m","type":"t","param":"p","code":"c","x":1}}',
            b"",
            ErrorBody("m", "t", "p", "c", {"x": 1}),
        ),
        (b'{"error":{"message":"m","code":500}}', b"", ErrorBody("m", code=500, extra={})),
        (b'{"error":"overloaded"}', b"", ErrorBody("overloaded", extra={})),
        (b'{"object":"error","message":"m","code":400}', b"", ErrorBody("m", code=400, extra={"object": "error"})),
        (b'{"message":"m"}', b"error", ErrorBody("m", extra={})),
        (b"over\xffloaded", b"error", ErrorBody("over\ufffdloaded")),
        (b'{"error":{"message":"m\xff","x":[NaN,1e999,1]}}', b"", ErrorBody("m\ufffd", extra={"x": [None, None, 1]})),
        (
            b'{"error":{"message":"\\ud83d"},"choices":[{"delta":{"content":"\\ud83d"}}]}',
            b"",
            ErrorBody("\ud83d", extra={}),
        ),
    ],
)
def test_an_error_in_the_stream_is_told_from_a_chunk(raw: bytes, event: bytes, expected: ErrorBody) -> None:
    """[34]"""
    assert read_chunk(raw, event) == expected


@pytest.mark.parametrize(("code", "transient"), [("503", True), ("400", False), ("²", False), ("9" * 5_000, False)])
def test_an_error_that_an_event_tells_is_an_error_whatever_its_code(code: str, transient: bool) -> None:
    """[34] What is no status is a name."""
    assert StreamError(ErrorBody("m", code=code)).transient is transient


@pytest.mark.parametrize(
    ("code", "status"), [(400, 400), ("404", 404), (599, 599), (200, None), (600, None), (True, None)]
)
def test_a_status_as_code_is_one_before_a_word_was_said(code: str | int, status: int | None) -> None:
    """[9, 34]"""
    body = ErrorBody("m", code=code)
    told = told_in_a_good_answer(body, upstream_request_id="u")
    assert (told.body, told.upstream_request_id, told.retry_after) == (body, "u", None)
    assert told.status == (status or 502)
    assert isinstance(told, RefusedError if status else StreamError)
    assert isinstance(told_in_a_good_answer(body, spoke=True), StreamError)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"error":{"message":"m","type":"invalid_request_error","code":"context_length_exceeded"}}',
        b'{"error":{"message":"m"},"code":400}',
        b'{"error":"m","code":"400"}',
    ],
)
def test_a_request_at_fault_is_told_as_one_before_a_word_was_said(raw: bytes) -> None:
    """[9, 34] By its type, or by a status beside the error."""
    body = read_chunk(raw)
    assert isinstance(body, ErrorBody)
    told = told_in_a_good_answer(body)
    assert (type(told), told.status, told.retriable) == (RefusedError, 400, False)
    assert isinstance(told_in_a_good_answer(body, spoke=True), StreamError)


@pytest.mark.parametrize(
    ("code", "status"), [("invalid_api_key", 401), ("model_not_found", 404), ("insufficient_quota", 429)]
)
def test_a_server_at_fault_is_told_as_one_whatever_the_type_of_its_error(code: str, status: int) -> None:
    """[9, 34] OpenAI says `invalid_request_error` of its own keys, too: another deployment may have a better one."""
    told = told_in_a_good_answer(ErrorBody("m", type="invalid_request_error", code=code))
    assert (type(told), told.status) == (RefusedError, status)


@pytest.mark.parametrize("code", ["rate_limit_exceeded", "server_error"])
def test_a_server_in_trouble_is_asked_again_whatever_the_type_of_its_error(code: str) -> None:
    """[34]"""
    told = told_in_a_good_answer(ErrorBody("m", type="invalid_request_error", code=code))
    assert (type(told), told.retriable) == (StreamError, True)


@pytest.mark.parametrize("code", [b"0", b"200", b"null"])
def test_a_number_beside_an_error_that_is_no_status_says_nothing(code: bytes) -> None:
    """[34]"""
    body = read_chunk(b'{"error":{"message":"m"},"code":%b}' % code)
    assert isinstance(body, ErrorBody)
    assert body.code is None


@pytest.mark.parametrize(("beside", "dropped"), [("", True), (',"citations":["x"]', False), (',"id":"c"', True)])
def test_a_usage_that_counts_nothing_takes_nothing_else_with_it(beside: str, dropped: bool) -> None:
    """[24]"""
    read = read_chunk(b'{"choices":[],"usage":{"total_tokens":9}%b}' % beside.encode())
    assert isinstance(read, Chunk)
    assert (read.usage, read.usage_only) == (None, dropped)


def test_a_null_error_is_no_error() -> None:
    assert isinstance(chunk(choices=[], error=None), Chunk)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"1", b"null", b"\xff", b'{"choices"'])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json, unicode and our own are all ValueErrors
        read_chunk(raw)


MEMBERS = st.sampled_from(
    ["choices", "delta", "index", "usage", "error", "content", "finish_reason", "tool_calls", "prompt_tokens", "x"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBERS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(MEMBERS, JSON, min_size=1))
def test_any_json_object_is_a_chunk_or_an_error_and_its_bytes_are_kept(members: dict[str, object]) -> None:
    """[19, 22] Unknown and misshapen members pass. Only what is no object is refused, and a usage that is none null."""
    raw = json.dumps(members).encode()
    read = read_chunk(raw)
    counted = members.get("usage")
    if isinstance(read, Chunk) and read.usage is None and counted and isinstance(counted, dict):
        assert json.loads(read.raw) == {**members, "usage": None}
    else:
        assert isinstance(read, ErrorBody) or read.raw == raw


def logged(raw: bytes) -> object:
    """What a reader of the log finds of a chunk that was passed on."""
    delta = codec.decode(codec.encode_delta(codec.delta_prefix("r", 1, "a"), 0, raw))
    assert isinstance(delta, Delta)
    assert (delta.request, delta.attempt, delta.writer, delta.seq) == ("r", 1, "a", 0)
    return codec.loads(bytes(delta.chunk))


ARGUMENTS = b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"a%bb"}}]}}],"x":1}'
NUMBER = b'{"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"logprob":%b}]}}]}'


@pytest.mark.parametrize("odd", [b"\xf0\x9f", b"\xff", b"\xc0\xaf"], ids=["half", "no-byte-of-utf-8", "overlong"])
def test_what_is_no_utf_8_is_put_right_before_it_is_logged(odd: bytes) -> None:
    """[2, 17] In members that are passed on unread, too."""
    for raw in (ARGUMENTS % odd, b'{"nobody knows":"a%bb","choices":[]}' % odd, b'{"%b":1,"choices":[]}' % odd):
        read = read_chunk(raw)
        assert isinstance(read, Chunk)
        assert logged(read.raw) == json.loads(raw.decode(errors="replace"))
    assert isinstance(read := read_chunk(ARGUMENTS % odd), Chunk)
    assert (read.speaks, read.calls, read.choices) == (True, (0,), (0,))


def test_a_character_in_two_halves_is_one() -> None:
    """[2] As those write it who take UTF-16 for text; half of it stays half."""
    assert isinstance(read := read_chunk(b'{"x":"\xed\xa0\xbd\xed\xb8\x80","y":"\xed\xa0\xbd"}'), Chunk)
    assert read.raw.isascii()
    assert logged(read.raw) == {"x": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "y": "\ud83d"}


@pytest.mark.parametrize("beside", ["", ',"nobody_knows":1', ',"x":"\\ud83d"'], ids=["known", "unknown", "half"])
def test_a_running_total_is_told_in_its_own_bytes(beside: str) -> None:
    """[27] They are what clients are not shown."""
    raw = b'{"choices":[{"delta":{"content":"a"}}],"usage": {"prompt_tokens" : 9}%b}' % beside.encode()
    assert isinstance(read := read_chunk(raw), Chunk)
    assert read.usage is not None
    half = "ud83d" in beside
    assert (read.raw, read.usage.raw) == (raw, b'{"prompt_tokens": 9}' if half else b'{"prompt_tokens" : 9}')


@pytest.mark.parametrize(
    "number",
    [b"NaN", b"-Infinity", b"1e999", b"-1e999", b"9" * 400 + b".5", b"9" * 5_000, b"1E+0000400"],
    ids=["nan", "infinity", "1e999", "-1e999", "long-float", "long-integer", "zeros"],
)
def test_a_number_that_is_none_is_null(number: bytes) -> None:
    """[20]"""
    read = read_chunk(NUMBER % number)
    assert isinstance(read, Chunk)
    assert read.speaks
    assert logged(read.raw) == json.loads(NUMBER % b"null")
    for raw in (b'{"choices":[],"x":%b}', b'{"choices":[],"usage":{"prompt_tokens":1,"x":%b}}', b'{"created":%b}'):
        assert isinstance(read := read_chunk(raw % number), Chunk)
        assert logged(read.raw) == json.loads(raw % b"null")


@pytest.mark.parametrize("number", [b"9" * 400, b"1e308", b"0e999", b"1e-999", b"0." + b"0" * 5_000 + b"1"])
def test_a_number_of_whatever_size_is_one(number: bytes) -> None:
    """[20]"""
    read = read_chunk(NUMBER % number)
    assert isinstance(read, Chunk)
    assert read.raw == NUMBER % number
    assert logged(read.raw) == json.loads(read.raw)


@pytest.mark.parametrize(
    "raw",
    ['{"x":1}'.encode("utf-16"), '{"x":1}'.encode("utf-16-le"), b'{"x":1},{"x":2}', b'{"x":1},"chunk":{"y":1}'],
    ids=["utf-16", "utf-16-le", "two", "two-members"],
)
def test_what_json_would_read_but_not_in_a_record_is_no_chunk(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_chunk(raw)


def test_a_byte_order_mark_does_not_go_into_the_log() -> None:
    """[2]"""
    assert isinstance(read := read_chunk(b'\xef\xbb\xbf{"x":1}'), Chunk)
    assert logged(read.raw) == {"x": 1}


WHOLE = json.dumps(
    {
        "id": "c",
        "created": 1_790_000_000.5,
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": "a\U0001f600"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 1},
        "x": [1e30, -0.5, "\\"],
    },
    ensure_ascii=False,
).encode()
PIECES = st.binary(max_size=3) | st.sampled_from(
    [b"NaN", b"-Infinity", b"e999", b"\xf0", b"\\ud83d", b"9" * 5_000, b"}"]
)


@given(st.integers(0, len(WHOLE)), st.integers(0, 3), PIECES)
def test_whatever_is_passed_on_can_be_read_in_the_log(at: int, instead: int, piece: bytes) -> None:
    """[2, 17, 20]"""
    try:
        read = read_chunk(WHOLE[:at] + piece + WHOLE[at + instead :])
    except ValueError:
        return
    assert isinstance(read, ErrorBody) or isinstance(logged(read.raw), dict)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"detail":"Not Found"}', "Not Found"),
        (b"<html>502 Bad Gateway</html>", "<html>502 Bad Gateway</html>"),
        (b"", "no explanation was given"),
        (b'{"error":{"message":"half a \xf0\x9f","x":NaN}}', "half a \ufffd"),
        (b'{"detail":[{"loc":["body"]}]}', '[{"loc": ["body"]}]'),
    ],
)
def test_an_error_body_of_any_server_has_a_message(raw: bytes, message: str) -> None:
    assert read_error(raw).message == message


def test_a_chunk_that_is_nested_past_all_bounds_is_no_chunk() -> None:
    with pytest.raises(ValueError, match="nested"):
        read_chunk(b'{"choices":' + b"[" * 100_000)
