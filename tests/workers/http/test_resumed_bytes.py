"""Who resumes over HTTP reads the bytes that a live reader was sent, also those that klatch itself adds at the end."""

import re
from typing import TYPE_CHECKING, Any

import pytest
from tests.workers.http.conftest import Sse, chunk, sse

from klatch_schemas.events import StreamAttempt, StreamEnd, StreamError

if TYPE_CHECKING:
    from tests.workers.http.conftest import Kit, Teller

FAILED = StreamError(code="model_error", message="it failed")


@pytest.mark.parametrize("ending", ["counted by klatch", "counted by the server", "cancelled", "failed"])
async def test_who_resumes_reads_the_very_bytes_that_a_live_reader_was_sent(kit: "Kit", ending: str) -> None:
    async def script(teller: "Teller") -> None:
        await teller.open()
        await teller.say("Hel", "lo")
        if ending == "cancelled":
            await teller.cancelled.wait()
            await teller.end("cancelled", deployment="azure-east")
        elif ending == "failed":
            await teller.end("failed", FAILED, deployment="azure-east")
        else:
            usage: Any = {"id": "chatcmpl-1", "choices": [], "usage": {"total_tokens": 10}}
            await teller.raw(chunk({}, finish="stop"), b'{"id":"","choices":[],"prompt_filter_results":[]}')
            await teller.end(deployment="azure-east", trailer=[usage] if "server" in ending else [])

    kit.stages.script = script
    answer = await kit.chat(stream_options={"include_usage": True})
    path = f"/v1/streams/{answer.headers['x-request-id']}"
    if ending == "cancelled":
        await kit.until_said(StreamAttempt)
        first = sse(await answer.part())
        await kit.call("DELETE", path)
        live = first + await answer.events()
        await kit.until_said(StreamEnd)
    else:
        live = await answer.events()
    # But for the resume link, which names the conversation only where the call did.
    live = [Sse(event.id, re.sub(r'\?conversation=[^"]*', "", event.data)) for event in live]
    for number, event in enumerate(live):
        if event.id is not None:
            resumed = await kit.call("GET", f"{path}?include_usage=true", headers={"last-event-id": event.id})
            rest = await resumed.events() if resumed.status == 200 else [Sse(None, (await resumed.body()).decode())]
            assert rest == live[number + 1 :], number
