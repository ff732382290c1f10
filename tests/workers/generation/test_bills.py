"""What is billed for a reply that no model server counted: it was cut, or nobody was asked at all."""
# pyright: basic, reportArgumentType=false
# Events are made of plain strings, as a producer would; pydantic checks them.

from typing import Any

from klatch_schemas.events import ChatRequested, StreamCancel
from klatch_schemas.topics import CHAT_STREAM
from klatch_streams.estimate import Estimate

SILENT = "fake?first_delay=60"
"""A model that reads its prompt, and says nothing."""


def body(model: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


async def cancel(generation: Any, request: ChatRequested) -> None:
    named = {"request": request.request, "tenant": request.tenant, "conversation": request.conversation}
    await generation.write(CHAT_STREAM, request.conversation, StreamCancel(**named, by="test"))


async def cancelled_once_asked(generation: Any, request: ChatRequested) -> Any:
    """Its settlement, cancelled before the first word."""
    await generation.upstream.changed(lambda: bool(generation.upstream.calls))
    await cancel(generation, request)
    return await generation.settled(request)


async def test_an_image_is_billed_as_it_was_reserved_and_not_by_its_bytes(generation: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 600_000}}
    asked = body(SILENT, [{"type": "text", "text": "What is this? " * 100}, image])
    async with generation.worker():
        settled = await cancelled_once_asked(generation, await generation.admit(SILENT, body=asked))
    assert settled.usage.estimated
    assert 1_200 + 350 < settled.usage.prompt_tokens < Estimate().of(asked).prompt


async def test_tools_are_read_with_the_prompt_and_billed_with_it(generation: Any) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "Looks. " * 1_000}}
    async with generation.worker():
        request = await generation.admit(SILENT, body=body(SILENT, "hello", tools=[tool]))
        settled = await cancelled_once_asked(generation, request)
    assert settled.usage.prompt_tokens > 1_750
