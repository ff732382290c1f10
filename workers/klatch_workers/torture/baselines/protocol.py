"""What baselines say: one record a chunk and one when a reply is done, as streaming over Kafka is commonly written.

Each record names the delivery that it was made in, so that a careful reader can tell two answers to one request apart.
Keys are conversations, so that a conversation's records stay in order.
"""

import json
from collections.abc import AsyncIterator
from typing import Any, Final
from uuid import uuid4

import aiohttp

from klatch_schemas.events import ChatRequested
from klatch_schemas.topics import CHAT_REQUESTS, CHAT_STREAM

REQUESTS: Final = CHAT_REQUESTS.name
STREAM: Final = CHAT_STREAM.name
_DATA: Final = b"data: "
_DONE: Final = b"[DONE]"
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=25.0)


class ModelFailed(RuntimeError):
    """The model server refused, or its stream had no end."""


async def answer(
    session: aiohttp.ClientSession, model_url: str, request: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The records of a reply to a `chat.requested`, as the model server says it; of other kinds there are none.

    Raises ModelFailed, aiohttp.ClientError, TimeoutError.
    """
    if request.get("kind") != ChatRequested.KIND:
        return
    delivery, seq = uuid4().hex, 0
    async for text in _texts(session, model_url, {**request["body"], "stream": True}):
        yield {"request": request["request"], "delivery": delivery, "seq": seq, "text": text}
        seq += 1
    yield {"request": request["request"], "delivery": delivery, "seq": seq, "done": True}


async def _texts(session: aiohttp.ClientSession, model_url: str, body: dict[str, Any]) -> AsyncIterator[str]:
    async with session.post(f"{model_url}/chat/completions", json=body, timeout=_TIMEOUT) as reply:
        if reply.status != 200:
            raise ModelFailed(f"the model server answered {reply.status}")
        async for line in reply.content:
            data = line.removeprefix(_DATA).strip()
            if data == _DONE:
                return
            if line.startswith(_DATA) and (text := _text(data)):
                yield text
    raise ModelFailed("the model server's stream had no end")


def _text(data: bytes) -> str:
    choices = json.loads(data)["choices"]
    return choices[0]["delta"].get("content") or "" if choices else ""
