"""The contract as documents: one JSON Schema a kind, one AsyncAPI 3.0 document, and the tables in `docs/contract.md`.

All of it follows from the models, the topic table and the error tree, and is committed: `python -m
klatch_schemas.documents --write` after a change, `--check` says what is not current. Needs a source checkout.
"""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import click
from pydantic.json_schema import GenerateJsonSchema

from klatch_schemas import events
from klatch_schemas.errors import ERRORS
from klatch_schemas.events import EVENTS, Event
from klatch_schemas.records import partition_of
from klatch_schemas.topics import DAY_MS, DEAD_LETTERS, HOUR_MS, TOPICS, Topic

Json = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
JSON_SCHEMAS: Final = Path("schemas/documents/json")
ASYNCAPI: Final = Path("schemas/documents/asyncapi.json")
CONTRACT: Final = Path("docs/contract.md")

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
WRITTEN_OUTSIDE: Final[tuple[type[Event], ...]] = (
    events.ChatRequested,
    events.StreamCancel,
    events.SkillReturned,
    events.QuotaLimitSet,
    events.PromptPublished,
    events.SkillRegistered,
    events.ModelRouted,
    events.ExperimentSet,
    events.TenantConfigured,
)
"""Kinds that others than klatch write. Their schemas are closed, so that validating finds a misspelt field."""

DEAD_HEADERS: Final = {
    "dead-topic": "The topic it was read from.",
    "dead-partition": "The partition it was read from.",
    "dead-offset": "The offset it was read at.",
    "dead-stage": "The stage that could not use it.",
    "dead-reason": "A short constant to count by.",
    "dead-error": "What was wrong with it, without quoting it.",
    "dead-first-seen": "Milliseconds since the epoch: the record's own time stamp when it first came here.",
    "dead-redriven": "How often it was put back.",
    "dead-attempts": "How often it was tried, before and after it was put back.",
    "dead-origin": "`topic/partition/offset` of the record that died first: of this one, unless it was put back.",
    "dead-cut": "Only if it was too large to be kept whole: its value's size; of value and key a beginning is kept.",
}
RECEIPT_HEADERS: Final = {
    "dead-receipt": "The offset, in this partition, of the letter that was put back.",
    "dead-origin": "The letter's own.",
    "dead-redriven": "How often the letter's record was put back, this time included.",
}
"""Of a record that is no letter: `klatch redrive` writes it beside each letter whose record it puts back."""

_EXAMPLE: Final = re.compile(r"^```\w+ (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_END: Final = "<!-- end -->"

# Keys of different lengths modulo 4, and one that is not ASCII: what implementations of murmur2 get wrong.
_SAMPLE_KEYS: Final = ("acme", "tenant", "conversation-1", "9b2f7c1e-1111-4222-8333-444455556666", "Grüße", "会話")


# --- JSON Schemas ------------------------------------------------------------------------------------------------


class _Schema(GenerateJsonSchema):
    """Without a title on every field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        del schema
        return False


def json_schema(kind: type[Event]) -> Json:
    """The JSON Schema of an event's value. A reader's tolerates fields it does not know, as versioning asks."""
    schema = kind.model_json_schema(schema_generator=_Schema)
    for name, model in ((kind.__name__, schema), *schema.get("$defs", {}).items()):
        _finish(name, model, closed=kind in WRITTEN_OUTSIDE)
    schema["required"] = ["kind", *schema.get("required", ())]
    return {"$schema": DIALECT, "$id": f"urn:klatch:{kind.KIND}", **schema}


def _finish(name: str, model: Json, *, closed: bool) -> None:
    if not closed and model.get("additionalProperties") is False:
        del model["additionalProperties"]
    for field, description in _FIELD_DOCS.get(name, {}).items():
        # The models speak Python, the documents JSON.
        model["properties"][field]["description"] = re.sub(r"\bNone\b", "null", description)


def _field_docs() -> dict[str, dict[str, str]]:
    """The docstring under each field, by model and field; read here rather than at every import of the models."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(events)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in pairwise(node.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found.setdefault(node.name, {})[name] = inspect.cleandoc(text)
                case _:
                    pass
    return found


_FIELD_DOCS: Final = _field_docs()


# --- AsyncAPI ----------------------------------------------------------------------------------------------------


def asyncapi() -> Json:
    """Topics as channels, kinds as their messages, and who sends and receives them as operations."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "klatch",
            "version": "1",
            "description": "A chat event in, streamed tokens out, over Kafka. How to use it: docs/contract.md.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {topic.name: _channel(topic) for topic in TOPICS},
        "operations": dict(_operations()),
    }


def _channel(topic: Topic) -> Json:
    kafka: Json = {"topic": topic.name, "topicConfiguration": _configuration(topic), "bindingVersion": "0.5.0"}
    if topic.partitioning == "ledger":
        kafka["partitions"] = 1
    return {
        "address": topic.name,
        "description": topic.purpose,
        "messages": dict(_messages(topic)),
        "bindings": {"kafka": kafka},
        "x-partitioning": topic.partitioning,
    }


def _configuration(topic: Topic) -> Json:
    config = topic.config
    cleanup = config.pop("cleanup.policy")
    numbers: Json = {name: int(config.pop(name)) for name in ("retention.ms", "max.message.bytes")}
    return {"cleanup.policy": [cleanup], **numbers, **config}


def _messages(topic: Topic) -> Iterator[tuple[str, Json]]:
    key = {"kafka": {"key": {"type": "string", "description": topic.key}, "bindingVersion": "0.5.0"}}
    for kind in topic.holds:
        yield (
            kind.KIND,
            {
                "name": kind.KIND,
                "summary": _first_sentence(kind),
                "payload": {"$ref": f"./json/{kind.KIND}.json"},
                "bindings": key,
            },
        )
    if topic is DEAD_LETTERS:
        letter = _headers(DEAD_HEADERS, optional="dead-cut")
        yield (
            "dead.letter",
            {
                "name": "dead.letter",
                "summary": "The original record; its own headers come first.",
                "contentType": "application/octet-stream",
                "headers": letter,
                "bindings": key,
            },
        )
        yield (
            "dead.receipt",
            {
                "name": "dead.receipt",
                "summary": "No letter: it notes that the letter at an offset of this partition was put back.",
                "headers": _headers(RECEIPT_HEADERS),
                "payload": {"type": "null"},
                "bindings": key,
            },
        )


def _headers(meanings: Mapping[str, str], optional: str = "") -> Json:
    described = {name: {"type": "string", "description": text} for name, text in meanings.items()}
    return {"type": "object", "properties": described, "required": [name for name in meanings if name != optional]}


def _operations() -> Iterator[tuple[str, Json]]:
    for topic in TOPICS:
        for action, stages in (("send", topic.written_by), ("receive", topic.read_by)):
            for stage in stages:
                yield f"{stage.replace(' ', '-')}.{action}.{topic.name}", _operation(topic, action, stage)


def _operation(topic: Topic, action: str, stage: str) -> Json:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{topic.name}"},
        "tags": [{"name": stage}],
    }


def _first_sentence(model: type) -> str:
    text = inspect.cleandoc(model.__doc__ or "").split("\n\n", maxsplit=1)[0].replace("\n", " ")
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0]


# --- the docs' tables --------------------------------------------------------------------------------------------


def topic_table() -> str:
    """Topics, with what a client in another language has to know of each."""
    return _table(
        ("topic", "key", "holds", "partitioned by", "kept", "written by", "read by"),
        (
            (
                f"`{topic.name}`",
                topic.key,
                "<br>".join(_link(kind) for kind in topic.holds) or "any record",
                topic.partitioning if topic.partitioning != "ledger" else "one partition",
                _kept(topic),
                ", ".join(topic.written_by),
                ", ".join(topic.read_by),
            )
            for topic in TOPICS
        ),
    )


def error_table() -> str:
    """Codes of `stream.end.error`, and what each means to a caller."""
    return _table(
        ("code", "HTTP", "may the same be sent again?", "means"),
        (
            (f"`{code}`", str(error.status), "yes" if error.retriable else "no", _meaning(error))
            for code, error in ERRORS.items()
        ),
    )


def partition_table() -> str:
    """Keys and their partitions, for whoever has to check a partitioner."""
    return _table(
        ("key (UTF-8)", "of 8", "of 256"),
        ((f"`{key}`", *(str(partition_of(key.encode(), count)) for count in (8, 256))) for key in _SAMPLE_KEYS),
    )


def header_table(meanings: Mapping[str, str]) -> str:
    """What a dead letter carries beside the record itself, or what a receipt does."""
    return _table(("header", "holds"), ((f"`{name}`", text) for name, text in meanings.items()))


def _link(kind: type[Event]) -> str:
    return f"[`{kind.KIND}`](../{JSON_SCHEMAS}/{kind.KIND}.json)"


def _meaning(error: type[Exception]) -> str:
    if error is ERRORS["internal"]:
        return "A fault of klatch's own, or a code that a newer klatch has: treat an unknown code as this one."
    return _first_sentence(error)


def _kept(topic: Topic) -> str:
    if topic.cleanup == "compact":
        return "last of each key"
    if topic.retention_ms is None:
        return "for ever"
    hours, days = topic.retention_ms // HOUR_MS, topic.retention_ms // DAY_MS
    return f"{days} days" if days > 1 else f"{hours} hours"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def examples(root: Path = ROOT) -> dict[str, str]:
    """The named examples in the contract (```` ```sh publish ````), which tests run."""
    return dict(_EXAMPLE.findall((root / CONTRACT).read_text(encoding="utf-8")))


# --- check and write ---------------------------------------------------------------------------------------------


def documents(root: Path = ROOT) -> dict[Path, str]:
    """Every generated document as it should be, by its path below `root`."""
    wanted = {JSON_SCHEMAS / f"{kind.KIND}.json": _dump(json_schema(kind)) for kind in EVENTS}
    wanted[ASYNCAPI] = _dump(asyncapi())
    wanted[CONTRACT] = _with_tables((root / CONTRACT).read_text(encoding="utf-8"))
    return wanted


def _dump(document: Json) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _with_tables(text: str) -> str:
    tables: dict[str, Callable[[], str]] = {
        "topics": topic_table,
        "errors": error_table,
        "partitions": partition_table,
        "dead headers": lambda: header_table(DEAD_HEADERS),
        "receipt headers": lambda: header_table(RECEIPT_HEADERS),
    }
    for name, table in tables.items():
        begin = f"<!-- generated: {name} -->\n"
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(_END)
        if not begun or not ended:
            raise click.ClickException(f"{CONTRACT} has lost its lines `{begin.strip()}` and `{_END}`")
        text = f"{before}{begin}{table()}\n{_END}{after}"
    return text


def outdated(root: Path = ROOT) -> list[Path]:
    """Documents that are missing, not current, or of kinds that are no more."""
    wanted = documents(root)
    stale = [path for path, text in wanted.items() if _read(root / path) != text]
    return stale + [path for path in _present(root) if path not in wanted]


def write(root: Path = ROOT) -> list[Path]:
    """Bring the documents up to date; returns what had to change."""
    wanted, changed = documents(root), outdated(root)
    for path in changed:
        if path in wanted:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(wanted[path], encoding="utf-8")
        else:
            (root / path).unlink()
    return changed


def _present(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in (root / JSON_SCHEMAS).glob("*.json"))


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


@click.command()
@click.option("--write", "mode", flag_value="write", help="Bring the documents up to date.")
@click.option("--check", "mode", flag_value="check", default=True, help="Say which are not; exit code 1 if any.")
@click.option("--root", type=click.Path(path_type=Path, exists=True), default=ROOT, help="Another checkout than this.")
def main(mode: Literal["write", "check"], root: Path) -> None:
    """Generate the contract's documents from its source."""
    if mode == "write":
        for path in write(root):
            click.echo(f"wrote {path}")
    elif stale := outdated(root):
        raise click.ClickException(f"not current: {', '.join(map(str, stale))}; run `make docs`")


if __name__ == "__main__":
    main()
