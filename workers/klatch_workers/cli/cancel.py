"""`klatch cancel REQUEST`: asks for a request to end where it is.

Over HTTP where the door is known, else over Kafka, where the request's conversation must be named. Either way the log
decides: the first of cancel and end counts, so a request that has ended stays as it ended.
"""

from typing import Any
from urllib.parse import quote, urlencode

import click
from pydantic import ValidationError

from klatch_schemas import codec
from klatch_schemas.events import StreamCancel
from klatch_schemas.ids import Conversation, RequestId, Tenant
from klatch_schemas.topics import CHAT_STREAM, Namespace
from klatch_streams.log import Log
from klatch_workers.ask import Unreached, ask
from klatch_workers.cli.context import (
    MISUSED,
    UNREACHABLE,
    CommandFailed,
    Context,
    ServerAddress,
    door_options,
    kafka_options,
    opened_log,
    perform,
    say_json,
    shared_options,
)


@click.command()
@click.argument("request_id", metavar="REQUEST")
@click.option("--conversation", help="The request's conversation: needed over Kafka, quicker over HTTP.")
@click.option("--tenant", help="Over Kafka: whose request it is.  [KLATCH_TENANT]")
@click.option("--reason", default="", help="Stands in the log.")
@door_options
@kafka_options
@shared_options
def cancel(request_id: str, conversation: str | None, reason: str, as_json: bool, **options: Any) -> None:
    """Cancel a request by its id, while it waits or while it streams.

    A request that is a conversation of its own has its id for a conversation.
    """

    async def work() -> int:
        context = Context.read(**options)
        if not options.get("kafka") and context.door_known:
            _over_http(context.door(), request_id, conversation, reason)
            how = "http"
        else:
            cancelled = _event(context, request_id, conversation, reason)
            async with opened_log(context) as log:
                await over_kafka(log, context.namespace, cancelled)
            how = "kafka"
        if as_json:
            say_json({"request": request_id, "cancel": "asked", "over": how})
        else:
            click.echo(f"asked request {request_id} to end; `klatch tail --request {request_id}` shows how it ended")
        return 0

    perform(work, as_json=as_json)


def _over_http(door: ServerAddress, request: str, conversation: str | None, reason: str) -> None:
    """Raises CommandFailed."""
    said = {"conversation": conversation, "reason": reason}
    query = urlencode({name: value for name, value in said.items() if value})
    try:
        url = f"{door.url}/v1/streams/{quote(request, safe='')}{f'?{query}' if query else ''}"
        answer = ask("DELETE", url, key=door.key, timeout_s=60.0)
    except Unreached as error:
        raise CommandFailed(
            f"{error}; start `klatch up`, say where the door is with --http, or cancel over Kafka with --kafka and "
            "--conversation",
            UNREACHABLE,
        ) from error
    if answer.status == 404:
        raise CommandFailed(f"{answer.reason}: it is over for a day, was never made, or belongs to another tenant")
    if answer.status != 202:
        raise CommandFailed(f"the door at {door.url} refused: {answer.reason}")


def _event(context: Context, request: str, conversation: str | None, reason: str) -> StreamCancel:
    """Raises CommandFailed."""
    tenant = context.tenant
    if conversation is None:
        raise CommandFailed(
            "over Kafka the request's conversation is needed: add --conversation, or say with --http (or KLATCH_HTTP) "
            "where klatch's door is",
            MISUSED,
        )
    if tenant is None:
        raise CommandFailed("whose request is it? Add --tenant, or set KLATCH_TENANT", MISUSED)
    try:
        return StreamCancel(
            request=RequestId(request),
            tenant=Tenant(tenant),
            conversation=Conversation(conversation),
            by="klatch cancel",
            reason=reason,
        )
    except ValidationError as error:
        raise CommandFailed(f"no request can be called so: {codec.explain(error)}", MISUSED) from error


async def over_kafka(log: Log, namespace: Namespace, cancelled: StreamCancel) -> None:
    """Append the cancel to the stream's partition. Raises LogError."""
    await log.append([codec.draft(namespace.of(CHAT_STREAM), cancelled.conversation, cancelled)])
