"""Whether the next attempt goes on from the text that stands, or begins anew: a question to the log alone.

No model goes on inside a tool call, a text that follows a schema or a grammar, or log probabilities, and of several
choices no server continues each (trap 38). What is left is one choice of plain text; and an answer of any kind that
stands whole, of which only the end is missing, is not asked for again.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple, cast

from klatch_schemas import codec
from klatch_schemas.assembly import Assembly
from klatch_schemas.chunks import Json, Reply
from klatch_schemas.events import OnCrash
from klatch_streams.counting import tokens_in

_NOT_CONTINUED: Final = frozenset(
    {"logprobs", "top_logprobs", "functions", "echo", "grammar", "json_schema", "structured_outputs"}
    | {"guided_json", "guided_regex", "guided_choice", "guided_grammar"}
)
"""Members of a request under which an answer is more than its text; the last are vLLM's and llama.cpp's."""


class Begun(NamedTuple):
    """What stands of an answer that may be continued."""

    text: str
    deltas: int
    """How many chunks."""
    tokens: int
    """How many by klatch's own count (`counting.py`)."""
    first: Json
    """The first chunk that has an id (Azure's first event has none): later ones have its id, time and model."""
    whole: bool = False
    """Every choice has finished: only the end is missing."""
    finish_reason: str | None = None
    """The first choice's, of an answer that is whole."""


def begun(body: Mapping[str, object], on_crash: OnCrash, assembly: Assembly) -> Begun | None:
    """What the next attempt may continue; None if it has to restart."""
    if on_crash == "restart" or assembly.gap or not assembly.standing:
        return None
    raw = [bytes(said.chunk) for said in assembly.standing]
    chunks = [codec.loads(chunk) for chunk in raw]
    reply = Reply()
    for chunk in chunks:
        reply.add(chunk)
    first = next((chunk for chunk in chunks if chunk.get("id")), chunks[0])
    finishes = reply.finish_reasons
    if len(finishes) >= _choices(body) and all(finishes.values()):
        return Begun("", len(raw), tokens_in(raw), first, whole=True, finish_reason=finishes.get(0))
    text = _plain_text(reply)
    return Begun(text, len(raw), tokens_in(raw), first) if text and not _more_than_text(body) else None


def _choices(body: Mapping[str, object]) -> int:
    n = body.get("n")
    return n if isinstance(n, int) and n > 0 else 1


def _more_than_text(body: Mapping[str, object]) -> bool:
    asked = body.get("response_format")
    schema = isinstance(asked, dict) and cast("Json", asked).get("type") not in {None, "text"}
    return _choices(body) > 1 or schema or any(body.get(name) for name in _NOT_CONTINUED)


def _plain_text(reply: Reply) -> str:
    """The text of the only choice, if it said nothing else, such as reasoning, a refusal or a tool call."""
    messages = reply.messages()
    if len(messages) != 1 or any(value for name, value in messages[0].items() if name not in {"role", "content"}):
        return ""
    text = messages[0]["content"]
    if not isinstance(text, str):
        return ""
    try:
        text.encode()
    except UnicodeEncodeError:  # it breaks off inside a character
        return ""
    return text
