# pyright: basic, reportMissingTypeStubs=false
# aiokafka has no types.
"""aiokafka on uvloop: what is sent on a connection that has just broken fails as it does on asyncio's loop.

Between the end of a transport and the moment that aiokafka's reader hears of it, uvloop raises RuntimeError for
whatever is sent; aiokafka expects OSError alone (https://github.com/aio-libs/aiokafka/issues/1038) and lets it out: of
a question after an offset, so that a request failed, of a producer, which ended of it, and of a group's coordinator.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError

_SENDING: Final = ("send", "_send_sasl_token")


def expect_closed_transports() -> None:
    """Have connections of this process say KafkaConnectionError, and close, where their transport is closed."""
    for name in _SENDING:
        send = getattr(AIOKafkaConnection, name)
        if not hasattr(send, "__wrapped__"):
            setattr(AIOKafkaConnection, name, _closing(send))


def _closing(send: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(send)
    def sent(connection: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return send(connection, *arguments, **options)
        except RuntimeError as error:
            connection.close(reason=CloseReason.CONNECTION_BROKEN, exc=error)
            raise KafkaConnectionError(f"Connection at {connection.host}:{connection.port} broken: {error}") from error

    return sent
